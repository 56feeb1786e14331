"""The backend "triton": kernels for GPUs, and for CPU tensors under Triton's interpreter.

This module registers the operators. Their kernels import Triton, so the first call that needs them imports them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine, Options
from mtu_kernels.ops import LIBRARY, call_ops, define_ops
from mtu_kernels.routing import Routing
from mtu_kernels.tracing import call_once_while_tracing, is_exporting
from mtu_kernels.triton import availability, torch_compile

_OPS = define_ops("triton")


def moe_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, options: Options) -> Tensor:
    """`mtu_kernels.moe_ffn` for arguments that have been checked.

    A call runs as one fused operator. Under torch.compile, dense inference runs as several, which the compiler fuses
    with their surroundings. The log says once which of the two a compiled call runs.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        if torch_compile.is_plain_dense_inference(x, norm, experts, routing):
            call_once_while_tracing(
                torch_compile.log_execution_once, torch_compile.describe_execution(experts.w_in.dtype)
            )
            return torch_compile.moe_ffn(x, norm, experts, routing, options)
        call_once_while_tracing(torch_compile.log_execution_once, "LayerNorm, experts and their sum as one operator")
    return call_ops(_OPS, x, norm, experts, routing, options)


def why_not_installed() -> str | None:
    """The reason why this installation cannot run the backend, as a clause; or ``None`` if it can."""
    return call_once_while_tracing(availability.why_not_installed)


def why_unsupported(device: torch.device, compute: torch.dtype) -> str | None:
    """The reason why the backend cannot serve this device and compute dtype, as a clause; or ``None`` if it can."""
    return call_once_while_tracing(availability.why_unsupported, device, compute)


def indices_valid_flag(indices: Tensor, num_experts: int) -> Tensor:
    """`mtu_kernels.arguments.indices_valid_flag` in one kernel."""
    index_check = importlib.import_module("mtu_kernels.triton.kernels.index_check")
    with _operators()[1].current_launch_device(indices.device) as machine:
        return index_check.indices_valid_flag(indices, num_experts, machine)


@functools.cache
def _operators() -> tuple[ModuleType, ModuleType]:
    return (
        importlib.import_module("mtu_kernels.triton.operators"),
        importlib.import_module("mtu_kernels.triton.launch"),
    )


def _inference(*args) -> Tensor:
    *tensors, num_experts, eps = args
    operators, launch = _operators()
    with launch.current_launch_device(tensors[0].device) as machine:
        return operators.run_inference(operators.build_call(machine, tensors, num_experts), eps)


def _train(*args) -> tuple[Tensor, ...]:
    *tensors, num_experts, eps = args
    operators, launch = _operators()
    with launch.current_launch_device(tensors[0].device) as machine:
        return operators.run_training_forward(operators.build_call(machine, tensors, num_experts), eps)


def _backward(grad_y, *args) -> tuple[Tensor, ...]:
    *tensors, hidden, mean, rstd, num_experts, eps, expert_grads = args
    operators, launch = _operators()
    # Hooks on saved tensors may give them back with other strides.
    saved = None if hidden is None else tuple(t.contiguous() for t in (hidden, mean, rstd))
    # The backward pass may run under autocast, which would round the operands of cuBLAS products.
    with launch.current_launch_device(grad_y.device) as machine, torch.autocast(grad_y.device.type, enabled=False):
        call = operators.build_call(machine, tensors, num_experts)
        return operators.compute_gradients(call, grad_y, saved, eps, expert_grads)


def _expert_hidden(x_hat: Tensor, w_in: Tensor, b_in: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    operators, launch = _operators()
    with launch.current_launch_device(x_hat.device) as machine:
        return operators.run_first_product_alone(machine, x_hat, w_in, b_in, weights, num_experts)


for _key in ("CUDA", "CPU"):
    LIBRARY.impl("moe_ffn_triton", _inference, _key)
    LIBRARY.impl("moe_ffn_triton_train", _train, _key)
    LIBRARY.impl("moe_ffn_triton_backward", _backward, _key)
    LIBRARY.impl("expert_hidden_triton", _expert_hidden, _key)
