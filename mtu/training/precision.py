"""Numerical precision of training: the check of parameters' dtypes, and autocast to a dtype or to none."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import Parameter

from mtu_kernels.tracing import supports_autocast

__all__ = ["autocast_to", "check_parameter_dtypes"]


def check_parameter_dtypes(trained: Mapping[str, Parameter]) -> None:
    """Refuse to train float16 parameters, and warn of bfloat16 ones.

    Args:
        trained: the parameters to train, by name.

    Raises:
        ValueError: some parameters are float16, in which the squares of gradients and AdamW's ε round to zero.

    Warns:
        UserWarning: some parameters are bfloat16, in which small updates round to nothing.
    """
    for dtype in (torch.float16, torch.bfloat16):
        names = [name for name, parameter in trained.items() if parameter.dtype == dtype]
        if not names:
            continue
        fault = f"{len(names)} of {len(trained)} parameters to train are {dtype}, for example {names[0]}"
        remedy = "train float32 parameters, and compute in fewer bits by autocast"
        if dtype == torch.float16:
            raise ValueError(f"{fault}, whose squared gradients round to zero, by which AdamW divides: {remedy}.")
        warnings.warn(
            f"{fault}, which rounds away updates below a few thousandths of a weight: {remedy}.",
            UserWarning,
            stacklevel=4,
        )


def autocast_to(device_type: str, dtype: torch.dtype | None, *, cache_weights: bool = True) -> AbstractContextManager:
    """Return a context that autocasts to a dtype, or that turns autocast off.

    Args:
        device_type: "cpu", "cuda", ….
        dtype: the compute dtype; None: no autocast, even if a surrounding context asks for it.
        cache_weights: whether converted weights are kept until the end of the context. Threads share that cache, so
            contexts in several threads must not use it.
    """
    if dtype is None and not supports_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=cache_weights)
