"""Dtypes of training: those that parameters may have, and autocast as a setting."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import Parameter

from mtu_kernels.tracing import supports_autocast

__all__ = ["autocast_to", "check_parameter_dtypes"]


def check_parameter_dtypes(trained: Mapping[str, Parameter]) -> None:
    """Refuse float16 parameters, and warn of bfloat16 ones.

    Args:
        trained: the parameters to train, by name.

    Raises:
        ValueError: float16 parameters: the squares of their gradients round to zero, as AdamW's ε does.

    Warns:
        UserWarning: bfloat16 parameters, which round small updates away.
    """
    for dtype in (torch.float16, torch.bfloat16):
        names = [name for name, parameter in trained.items() if parameter.dtype == dtype]
        if not names:
            continue
        fault = f"{len(names)} of {len(trained)} parameters to train are {dtype}, for example {names[0]}"
        remedy = "train float32 parameters, and compute in fewer bits by autocast"
        if dtype == torch.float16:
            raise ValueError(f"fit: {fault}, whose squared gradients round to zero, by which AdamW divides: {remedy}.")
        warnings.warn(
            f"fit: {fault}, which rounds away updates below a few thousandths of a weight: {remedy}.",
            UserWarning,
            stacklevel=4,
        )


def autocast_to(device_type: str, dtype: torch.dtype | None, *, cache_weights: bool = True) -> AbstractContextManager:
    """Compute in a dtype, or in that of the parameters.

    Args:
        device_type: where: "cpu", "cuda", ….
        dtype: None: whatever context surrounds this one, no autocast within.
        cache_weights: keep converted weights until the end of the context. Threads would share them.
    """
    if dtype is None and not supports_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=cache_weights)
