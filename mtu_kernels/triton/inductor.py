"""Dense inference under `torch.compile`: as little as possible is opaque to the compiler.

One operator computes the first product with GEGLU and routing weights, ``h = w · u · gelu(g)``. LayerNorm before it and
the second product after it are PyTorch's: the compiler then folds the residual and the gathers of γ and β that come
before into the LayerNorm, and the residual that comes after into its neighbours. So a block launches no more kernels
than a stock one does.

In float32 the first product is left to the library (cuBLAS), as it is without a compiler, so nothing stays opaque.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtu_kernels import eager
from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.ops import LIBRARY, records_gradients
from mtu_kernels.routing import Routing

# Strides as they were traced: the kernel reads contiguous rows, and would copy others.
LIBRARY.define(
    "expert_hidden_triton(Tensor x_hat, Tensor w_in, Tensor b_in, Tensor routing_weights, int num_experts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_EXPERT_HIDDEN = torch.ops.mtu_kernels.expert_hidden_triton


def serves(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> bool:
    """Whether a call is dense inference, with one norm affine for each sample and one bias for all experts."""
    if routing.indices is not None or norm.weight.dim() != 2 or experts.b_out.dim() != 1:
        return False
    return not records_gradients((x, *norm, *experts[:4], routing.weights))


def path(compute: torch.dtype) -> str:
    """What runs in this compute dtype, as a phrase."""
    if compute == torch.float32:
        return "dense inference in float32 as PyTorch's operators"
    return "dense inference as PyTorch's operators around one for the experts' hidden units"


def moe_ffn(
    x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, *, eps: float, residual: bool = False
) -> Tensor:
    """`mtu_kernels.moe_ffn` for the calls that `serves` approves."""
    compute = experts.w_in.dtype
    if compute == torch.float32:
        return eager.moe_ffn(x, norm, experts, routing, eps=eps, residual=residual)
    # Where x has other strides, the compiler's LayerNorm writes x̂ contiguously at no cost.
    x_hat = eager.normalize(x, norm, compute, eps).contiguous()
    h = _EXPERT_HIDDEN(x_hat, experts.w_in, experts.b_in, routing.weights, experts.num_experts)
    y = F.linear(h, experts.w_out, experts.b_out)
    return x + y if residual else y


@torch.library.register_fake(_EXPERT_HIDDEN.default, lib=LIBRARY)
def _fake(x_hat: Tensor, w_in: Tensor, b_in: Tensor, routing_weights: Tensor, num_experts: int) -> Tensor:
    return x_hat.new_empty(*x_hat.shape[:2], w_in.shape[0] // 2)


@register_flop_formula(_EXPERT_HIDDEN)
def _flops(x_hat_shape, w_in_shape, *args, out_shape=None) -> int:
    B, L, D = x_hat_shape
    return 2 * B * L * D * w_in_shape[0]


def _no_derivative(ctx, grad_h: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(f"{_EXPERT_HIDDEN.default} has no derivative: `mtu_kernels.moe_ffn` has.")


# Calls that record gradients do not come here. Without this, one that did would get silent zeros.
torch.library.register_autograd(_EXPERT_HIDDEN.default, _no_derivative, lib=LIBRARY)
