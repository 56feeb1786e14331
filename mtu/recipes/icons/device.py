"""Where the icon models are trained and run: on the CPU, or on an accelerator of this machine."""

import os
from contextlib import AbstractContextManager

import torch

from mtu.training.precision import autocast_to


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device, after a number has been there and come back.

    Args:
        name: as PyTorch writes it: "cpu", "cuda", "cuda:1", …

    Raises:
        ValueError: PyTorch knows no such device, or it is not there, or it holds no numbers.
    """
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    # Which one depends on the device: an assertion where PyTorch is built without it.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"The device {str(name)!r} cannot be used; expected cpu, or an accelerator of this machine such as cuda "
            f"({reason})."
        ) from error
    return device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The compute dtype of training: bfloat16 on the CPU and on GPUs that have it; None elsewhere, for float32.

    Float16, which older GPUs have, would need its loss scaled.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return torch.bfloat16 if device.type in ("cpu", "cuda") else None


def mixed_precision(device: torch.device, *, cache_weights: bool = True) -> AbstractContextManager:
    """Autocast to a device's compute dtype; see `autocast_to`."""
    return autocast_to(device.type, autocast_dtype(device), cache_weights=cache_weights)


def describe_device(device: torch.device) -> str:
    """What a machine computes with, for a table's or a model's provenance."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device.type
