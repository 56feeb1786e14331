"""The specification of `moe_ffn` in plain PyTorch, for one sample and one expert at a time.

Names of tensors here and in all kernels end in their shape: B samples, L tokens, D width, E experts, K active experts,
F hidden units of one expert, H = E·F hidden units of all experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.routing import Routing


def moe_ffn(
    x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, *, eps: float = 1e-5, residual: bool = False
) -> Tensor:
    """LayerNorm, the active experts' GEGLU feed-forwards, and their weighted sum.

    ``x̂_e = LayerNorm(x[b]) · γ_e + β_e``, ``u_e, g_e = x̂_e W_in,eᵀ + b_in,e``, ``a_e = u_e · gelu(g_e)``,
    ``y[b] = Σ_e w[b,e] · (W_out,e a_e) + bias``, and ``x[b] + y[b]`` with the residual

    All floating-point tensors must have the same dtype, which may be any. Tests check the function against finite
    differences in float64. It is not meant to be fast.

    Args:
        x: (B, L, D) float.
        norm: weight and bias (B, D) or (B, E, D) float.
        experts: w_in (2H, D), b_in (2H,), w_out (D, H), b_out (D,) or (E, D) float.
        routing: weights (B, K) float, indices (B, K) int, or ``None`` for K = E.
        eps: added to the variance.
        residual: return x + y.

    Returns:
        y (B, L, D), or x + y.
    """
    y = []
    for b in range(x.shape[0]):
        n_LD = normalize_without_affine(x[b], eps)
        # A bias (D,) belongs to the FFN and not to an expert, so no routing weight multiplies it.
        y_LD = torch.zeros_like(n_LD) if experts.b_out.dim() == 2 else experts.b_out.expand_as(n_LD)
        for k, e in enumerate(active_experts_of_sample(routing, b)):
            expert = weights_of_expert(experts, e)
            gamma_D, beta_D = affine_of_sample_and_expert(norm, b, e)
            z_L2F = (n_LD * gamma_D + beta_D) @ expert.w_in.T + expert.b_in
            out_LD = geglu(z_L2F) @ expert.w_out.T
            if experts.b_out.dim() == 2:
                out_LD = out_LD + expert.b_out
            y_LD = y_LD + routing.weights[b, k] * out_LD
        y.append(x[b] + y_LD if residual else y_LD)
    return torch.stack(y) if y else x.clone()


def normalize_without_affine(x_LD: Tensor, eps: float) -> Tensor:
    """LayerNorm without the affine: ``(x − mean) / sqrt(var + eps)`` over D, where var is the biased variance."""
    centred_LD = x_LD - x_LD.mean(dim=-1, keepdim=True)
    return centred_LD * torch.rsqrt(centred_LD.square().mean(dim=-1, keepdim=True) + eps)


def geglu(z_L2F: Tensor) -> Tensor:
    """``u · gelu(g)`` of values and gates [u, g], where ``gelu(g) = g · Φ(g)`` is exact and not the tanh formula."""
    u_LF, g_LF = z_L2F.chunk(2, dim=-1)
    return u_LF * g_LF * 0.5 * (1 + torch.erf(g_LF / math.sqrt(2)))


def active_experts_of_sample(routing: Routing, b: int) -> list[int]:
    """The experts of sample b, in the order of their routing weights."""
    return list(range(routing.weights.shape[1])) if routing.indices is None else routing.indices[b].tolist()


def affine_of_sample_and_expert(norm: NormAffine, b: int, e: int) -> tuple[Tensor, Tensor]:
    """γ and β (D,) of sample b and expert e."""
    if norm.weight.dim() == 2:
        return norm.weight[b], norm.bias[b]
    return norm.weight[b, e], norm.bias[b, e]


def weights_of_expert(experts: ExpertWeights, e: int) -> ExpertWeights:
    """The weights of expert e: its F rows of values and F of gates, its columns of w_out, its row of a bias (E, D)."""
    w_in_2EFD = experts.w_in.unflatten(0, (2, experts.num_experts, -1))
    b_in_2EF = experts.b_in.unflatten(0, (2, experts.num_experts, -1))
    w_out_DEF = experts.w_out.unflatten(1, (experts.num_experts, -1))
    b_out_D = experts.b_out if experts.b_out.dim() == 1 else experts.b_out[e]
    return ExpertWeights(w_in_2EFD[:, e].flatten(0, 1), b_in_2EF[:, e].flatten(), w_out_DEF[:, e], b_out_D, 1)
