"""Dense inference under `torch.compile`, with as few operators as possible that the compiler cannot see into.

One operator computes the first product with GEGLU and routing weights, ``h = w · u · gelu(g)``. LayerNorm and the
second product are PyTorch's operators. So the compiler fuses the residual and the gathers of γ and β that come before
into LayerNorm, and the residual that comes after into the next operator. A block then launches as many kernels as a
stock one.

In float32, cuBLAS computes the first product as well, as it does without a compiler, so the compiler sees everything.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtu_kernels import eager
from mtu_kernels.arguments import ExpertWeights, NormAffine, Options
from mtu_kernels.ops import LIBRARY, autograd_records
from mtu_kernels.routing import Routing

# The compiler must keep the strides that it traced: the kernel reads contiguous rows, and would copy others.
LIBRARY.define(
    "expert_hidden_triton(Tensor x_hat, Tensor w_in, Tensor b_in, Tensor routing_weights, int num_experts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_EXPERT_HIDDEN = torch.ops.mtu_kernels.expert_hidden_triton


def is_plain_dense_inference(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> bool:
    """Whether a call is dense inference, with one norm affine for each sample and one bias for all experts."""
    if routing.indices is not None or norm.weight.dim() != 2 or experts.b_out.dim() != 1:
        return False
    return not autograd_records((x, *norm, *experts[:4], routing.weights))


def describe_execution(compute: torch.dtype) -> str:
    """The operators that dense inference becomes in this compute dtype, as a phrase for the log."""
    if compute == torch.float32:
        return "dense inference in float32 as PyTorch's operators"
    return "dense inference as PyTorch's operators around one for the experts' hidden units"


def moe_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, options: Options) -> Tensor:
    """`mtu_kernels.moe_ffn` for calls that `is_plain_dense_inference` returns true for."""
    compute = experts.w_in.dtype
    if compute == torch.float32:
        return eager.moe_ffn(x, norm, experts, routing, options)
    # If x has other strides, the compiler's LayerNorm writes x̂ contiguously at no cost.
    x_hat = eager.layer_norm_per_sample(x, norm, compute, options.eps).contiguous()
    h = _EXPERT_HIDDEN(x_hat, experts.w_in, experts.b_in, routing.weights, experts.num_experts)
    y = F.linear(h, experts.w_out, experts.b_out)
    return x + y if options.residual else y


def log_execution_once(path: str) -> None:
    """Logs once how a compiled call runs."""
    _log_once(path)


@functools.cache
def _log_once(path: str) -> None:
    logging.getLogger("mtu_kernels").info("Under torch.compile, backend 'triton' runs %s.", path)


@torch.library.register_fake(_EXPERT_HIDDEN.default, lib=LIBRARY)
def _fake(x_hat: Tensor, w_in: Tensor, b_in: Tensor, routing_weights: Tensor, num_experts: int) -> Tensor:
    return x_hat.new_empty(*x_hat.shape[:2], w_in.shape[0] // 2)


@register_flop_formula(_EXPERT_HIDDEN)
def _flops(x_hat_shape, w_in_shape, *args, out_shape=None) -> int:
    B, L, D = x_hat_shape
    return 2 * B * L * D * w_in_shape[0]


def _no_derivative(ctx, grad_h: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(f"{_EXPERT_HIDDEN.default} has no derivative: call `mtu_kernels.moe_ffn`, which has one.")


# Without a rule, a call that records gradients would get zeros without an error. `is_plain_dense_inference` keeps such
# calls away.
torch.library.register_autograd(_EXPERT_HIDDEN.default, _no_derivative, lib=LIBRARY)
