"""The backend "triton": kernels for GPUs, and for CPU tensors under Triton's interpreter.

This module defines the operators. Their kernels, and Triton itself, are imported by the first call that needs them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mtu_kernels.ops import LIBRARY, call_ops, define_ops, why_not_dtype

MINIMUM_VERSION = "3.6"

_OPS = define_ops("triton")
moe_ffn = functools.partial(call_ops, _OPS)


# Compilers take the answers of both questions as constants: nothing behind them changes while a program runs.
@torch.compiler.assume_constant_result
def why_not_installed() -> str | None:
    """What keeps this installation from running the backend, as a clause; or ``None``."""
    return _why_not_installed()


@torch.compiler.assume_constant_result
def why_not(device: torch.device, compute: torch.dtype) -> str | None:
    """What keeps the backend from serving a call on this device in this compute dtype, as a clause; or ``None``."""
    return _why_not(device, compute)


@functools.cache
def _why_not_installed() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError):  # or a folder of this name
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
    if (reason := why_not_dtype(compute)) is not None:
        return reason
    if device.type == "meta":
        return None
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, not on {device.type}"
    launch = importlib.import_module("mtu_kernels.triton.launch")
    if device.type == "cpu" and not launch.interpreted():
        return "it runs on CUDA devices, and on CPU tensors under TRITON_INTERPRET=1 only"
    if launch.interpreted() and compute == torch.bfloat16:
        return "Triton's interpreter computes products of bfloat16 wrongly"
    if not torch.cuda.is_available():
        return None  # a tensor without memory that is meant for a GPU elsewhere
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, not {launch.arch_of(device)}"
    return None


def indices_are_valid(indices: Tensor, num_experts: int) -> Tensor:
    """`mtu_kernels.arguments.indices_are_valid` by one kernel."""
    index_check = importlib.import_module("mtu_kernels.triton.index_check")
    with _operators()[1].on_device(indices.device) as machine:
        return index_check.indices_are_valid(indices, num_experts, machine)


@functools.cache
def _operators() -> tuple[ModuleType, ModuleType]:
    return (
        importlib.import_module("mtu_kernels.triton.operators"),
        importlib.import_module("mtu_kernels.triton.launch"),
    )


def _inference(*args) -> Tensor:
    *tensors, num_experts, eps = args
    operators, launch = _operators()
    with launch.on_device(tensors[0].device) as machine:
        return operators.inference(operators.make_call(machine, tensors, num_experts), eps)


def _train(*args) -> tuple[Tensor, ...]:
    *tensors, num_experts, eps = args
    operators, launch = _operators()
    with launch.on_device(tensors[0].device) as machine:
        return operators.train(operators.make_call(machine, tensors, num_experts), eps)


def _backward(grad_y, *args) -> tuple[Tensor, ...]:
    *tensors, hidden, mean, rstd, num_experts, eps, expert_grads = args
    operators, launch = _operators()
    # Hooks on saved tensors may hand back other strides.
    saved = None if hidden is None else tuple(t.contiguous() for t in (hidden, mean, rstd))
    # The backward pass may run where autocast is on, which would cast the operands of library products.
    with launch.on_device(grad_y.device) as machine, torch.autocast(grad_y.device.type, enabled=False):
        call = operators.make_call(machine, tensors, num_experts)
        return operators.backward(call, grad_y, saved, eps, expert_grads)


for _key in ("CUDA", "CPU"):
    LIBRARY.impl("moe_ffn_triton", _inference, _key)
    LIBRARY.impl("moe_ffn_triton_train", _train, _key)
    LIBRARY.impl("moe_ffn_triton_backward", _backward, _key)
