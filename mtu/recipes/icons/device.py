"""The device of the icon models: its check, its compute dtype, and its description."""

import os
from contextlib import AbstractContextManager

import torch

from mtu.training.precision import autocast_to


def usable_device(name: str | torch.device) -> torch.device:
    """Return the device of a name, after a tensor has been copied to it and back.

    Args:
        name: a device of PyTorch: "cpu", "cuda", "cuda:1", …

    Raises:
        ValueError: PyTorch does not know the device, this machine lacks it, or it holds no values (as "meta").
    """
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    # The exception depends on the device. A PyTorch that is built without it raises an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"The device {str(name)!r} cannot be used; expected cpu, or an accelerator of this machine such as cuda "
            f"({reason})."
        ) from error
    return device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the compute dtype of training: bfloat16 on CPUs and on GPUs that have it, else None for float32.

    float16, which older GPUs have, would need a scaled loss.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return torch.bfloat16 if device.type in ("cpu", "cuda") else None


def mixed_precision(device: torch.device, *, cache_weights: bool = True) -> AbstractContextManager:
    """Return a context that autocasts to the compute dtype of a device, as `autocast_to` does."""
    return autocast_to(device.type, autocast_dtype(device), cache_weights=cache_weights)


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU or the number of CPU cores, for the provenance of a table or model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device.type
