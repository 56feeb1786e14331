"""Autocast as a setting: a compute dtype, or none."""

from contextlib import AbstractContextManager, nullcontext

import torch

from mtu_kernels.autocast import has_autocast

__all__ = ["autocast"]


def autocast(device_type: str, dtype: torch.dtype | None, *, cached: bool = True) -> AbstractContextManager:
    """Compute in a dtype, or in that of the parameters.

    Args:
        device_type: where: "cpu", "cuda", ….
        dtype: None: whatever context surrounds this one, no autocast within.
        cached: keep converted weights until the end of the context. Threads would share them.
    """
    if dtype is None and not has_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=cached)
