"""Whether the backend "triton" can run in this installation, and whether it can serve a call."""

from __future__ import annotations

import functools
import importlib

import torch

from mtu_kernels.ops import why_dtype_unsupported

MINIMUM_VERSION = "3.6"


# These two are plain functions around cached ones: torch.compile takes results of plain functions as constants.
def why_not_installed() -> str | None:
    """The reason why this installation cannot run the backend, as a clause; or ``None`` if it can."""
    return _why_not_installed()


def why_unsupported(device: torch.device, compute: torch.dtype) -> str | None:
    """The reason why the backend cannot serve this device and compute dtype, as a clause; or ``None`` if it can."""
    return _why_not(device, compute)


@functools.cache
def _why_not_installed() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError):  # a folder named triton has no version
        return f"it needs the package triton {MINIMUM_VERSION} or newer, which is not installed"
    if _major_minor(version) < _major_minor(MINIMUM_VERSION):
        return f"it needs the package triton {MINIMUM_VERSION} or newer, and {version} is installed"
    return None


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def _why_not(device: torch.device, compute: torch.dtype) -> str | None:
    if (reason := _why_not_installed()) is not None:
        return reason
    if (reason := why_dtype_unsupported(compute)) is not None:
        return reason
    if device.type == "meta":
        return None
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, not on {device.type}"
    launch, probes = (importlib.import_module(f"mtu_kernels.triton.{name}") for name in ("launch", "probes"))
    if launch.is_interpreted():
        if compute == torch.bfloat16:
            return "Triton's interpreter computes products of bfloat16 wrongly"
        if (reason := probes.why_not_interpretable()) is not None:
            return reason
    elif device.type == "cpu":
        return "it runs on CUDA devices, and on CPU tensors under TRITON_INTERPRET=1 only"
    if not torch.cuda.is_available():
        # A fake tensor on a CUDA device, traced on a machine that has none.
        return None
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, not {launch.arch_of(device)}"
    return None if launch.is_interpreted() else probes.why_not_launchable()
