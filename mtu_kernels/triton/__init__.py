"""The backend "triton": kernels for GPUs, and for CPU tensors under Triton's interpreter.

This module defines the operators. Their kernels, and Triton itself, are imported by the first call that needs them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.exporting import is_exporting
from mtu_kernels.ops import LIBRARY, call_ops, define_ops
from mtu_kernels.routing import Routing
from mtu_kernels.triton import availability, inductor

_OPS = define_ops("triton")


def moe_ffn(
    x: Tensor,
    norm: NormAffine,
    experts: ExpertWeights,
    routing: Routing,
    *,
    eps: float = 1e-5,
    recompute: bool = False,
    residual: bool = False,
) -> Tensor:
    """`mtu_kernels.moe_ffn` for arguments that are already checked.

    The fused operators, unless a compiler can fuse more around a part of them; the log says which, once.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        from mtu_kernels.triton import constant_answers

        if inductor.serves(x, norm, experts, routing):
            constant_answers.log_path(inductor.path(experts.w_in.dtype))
            return inductor.moe_ffn(x, norm, experts, routing, eps=eps, residual=residual)
        constant_answers.log_path("LayerNorm, experts and their sum as one operator")
    return call_ops(_OPS, x, norm, experts, routing, eps=eps, recompute=recompute, residual=residual)


def why_not_installed() -> str | None:
    """What keeps this installation from running the backend, as a clause; or ``None``."""
    if torch.compiler.is_compiling():
        from mtu_kernels.triton import constant_answers

        return constant_answers.why_not_installed()
    return availability.why_not_installed()


def why_not(device: torch.device, compute: torch.dtype) -> str | None:
    """What keeps the backend from serving a call on this device in this compute dtype, as a clause; or ``None``."""
    if torch.compiler.is_compiling():
        from mtu_kernels.triton import constant_answers

        return constant_answers.why_not(device, compute)
    return availability.why_not(device, compute)


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


def _expert_hidden(x_hat: Tensor, w_in: Tensor, b_in: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    operators, launch = _operators()
    with launch.on_device(x_hat.device) as machine:
        return operators.expert_hidden(machine, x_hat, w_in, b_in, weights, num_experts)


for _key in ("CUDA", "CPU"):
    LIBRARY.impl("moe_ffn_triton", _inference, _key)
    LIBRARY.impl("moe_ffn_triton_train", _train, _key)
    LIBRARY.impl("moe_ffn_triton_backward", _backward, _key)
    LIBRARY.impl("expert_hidden_triton", _expert_hidden, _key)
