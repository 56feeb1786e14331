"""The backend "reference": the specification as operators, and the formulas of the backward pass for all backends.

It computes in float64 for every storage dtype, rounds its results, and is slow. It tells a wrong kernel from a wrong
model, and is the ground truth for the intermediate results of kernels.

The gradients, for one sample b, its active experts e with weights w_e, and G = ∂loss/∂y[b] (L, D):

    ∂a_e    = w_e · G W_out,e                  ∂W_out,e = w_e · Gᵀ a_e
    ∂w_e    = ⟨G W_out,e, a_e⟩  [+ ⟨G, b_out,e⟩]
    ∂b_out  = Σ_l G  where it is (D,);         ∂b_out,e = w_e · Σ_l G  where it is (E, D)
    ∂u_e    = ∂a_e · gelu(g_e)                 ∂g_e = ∂a_e · u_e · (Φ(g_e) + g_e φ(g_e))
    ∂z_e    = [∂u_e, ∂g_e]                     ∂b_in,e = Σ_l ∂z_e
    ∂x̂_e    = ∂z_e W_in,e                      ∂W_in,e = ∂z_eᵀ x̂_e
    ∂β_e    = Σ_l ∂x̂_e                         ∂γ_e = Σ_l ∂x̂_e · n           (one affine: summed over e)
    ∂n      = Σ_e γ_e · ∂x̂_e                   ∂x = rstd · (∂n − mean(∂n) − n · mean(n · ∂n))

with n = (x − mean) · rstd. No formula divides by w_e, which may be 0. Inactive experts get exact zeros.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mtu_kernels import reference
from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.ops import LIBRARY, NUM_TENSORS, call_ops, define_ops
from mtu_kernels.routing import Routing


def _inference(*args) -> Tensor:
    tensors, (num_experts, eps, *residual) = args[:NUM_TENSORS], args[NUM_TENSORS:]
    y = reference.moe_ffn(*_unflatten(_widen(*tensors), num_experts), eps=eps, residual=any(residual))
    return y.to(tensors[3].dtype).contiguous()


def _train(*args) -> tuple[Tensor, ...]:
    tensors, (num_experts, eps, *residual) = args[:NUM_TENSORS], args[NUM_TENSORS:]
    compute = tensors[3].dtype
    x_BLD, norm, experts, routing = _unflatten(_widen(*tensors), num_experts)
    y = reference.moe_ffn(x_BLD, norm, experts, routing, eps=eps, residual=any(residual))
    B, L, _ = x_BLD.shape
    K = routing.weights.shape[1]
    size = experts.w_out.shape[1] // num_experts
    mean_BL = x_BLD.mean(dim=-1)
    rstd_BL = torch.rsqrt((x_BLD - mean_BL[..., None]).square().mean(dim=-1) + eps)
    z_BL2KF = x_BLD.new_empty(B, L, 2, K, size)
    for b in range(B):
        n_LD = reference.normalize_without_affine(x_BLD[b], eps)
        for k, e in enumerate(reference.active_experts_of_sample(routing, b)):
            expert = reference.weights_of_expert(experts, e)
            gamma_D, beta_D = reference.affine_of_sample_and_expert(norm, b, e)
            z_L2F = (n_LD * gamma_D + beta_D) @ expert.w_in.T + expert.b_in
            z_BL2KF[b, :, :, k] = z_L2F.unflatten(-1, (2, size))
    statistics = torch.promote_types(compute, torch.float32)
    outputs = (y.to(compute), z_BL2KF.flatten(2).to(compute), mean_BL.to(statistics), rstd_BL.to(statistics))
    return tuple(t.contiguous() for t in outputs)


def _backward(grad_y, *args) -> tuple[Tensor, ...]:
    *tensors, hidden, mean_BL, rstd_BL, num_experts, eps, expert_grads = args
    if hidden is None:
        _, hidden, mean_BL, rstd_BL = _train(*tensors, num_experts, eps)
    x_BLD, norm, experts, routing = _unflatten(_widen(*tensors), num_experts)
    grad_y_BLD, hidden, mean_BL, rstd_BL = _widen(grad_y, hidden, mean_BL, rstd_BL)
    z_BL2KF = hidden.unflatten(-1, (2, routing.weights.shape[1], -1))
    grads = [t.new_zeros(t.shape) for t in (x_BLD, *norm, *experts[:4], routing.weights)]
    d_x, d_gamma, d_beta, d_w_in, d_b_in, d_w_out, d_b_out, d_weights = grads
    # Views of the accumulators, by expert.
    d_norm = NormAffine(d_gamma, d_beta)
    d_w_in_2EFD, d_b_in_2EF = (g.unflatten(0, (2, num_experts, -1)) for g in (d_w_in, d_b_in))
    d_w_out_DEF = d_w_out.unflatten(1, (num_experts, -1))
    for b in range(x_BLD.shape[0]):
        n_LD = (x_BLD[b] - mean_BL[b, :, None]) * rstd_BL[b, :, None]
        g_y_LD = grad_y_BLD[b]
        d_n_LD = torch.zeros_like(n_LD)
        if d_b_out.dim() == 1:
            d_b_out += g_y_LD.sum(dim=0)
        for k, e in enumerate(reference.active_experts_of_sample(routing, b)):
            expert = reference.weights_of_expert(experts, e)
            gamma_D, beta_D = reference.affine_of_sample_and_expert(norm, b, e)
            w = routing.weights[b, k]
            z_L2F = z_BL2KF[b, :, :, k].flatten(1)
            a_LF = reference.geglu(z_L2F)
            d_weighted_LF = g_y_LD @ expert.w_out
            d_weights[b, k] = (d_weighted_LF * a_LF).sum()
            if d_b_out.dim() == 2:
                d_weights[b, k] += (g_y_LD @ expert.b_out).sum()
                d_b_out[e] += w * g_y_LD.sum(dim=0)
            d_z_L2F = _geglu_backward(w * d_weighted_LF, z_L2F)
            d_x_hat_LD = d_z_L2F @ expert.w_in
            d_w_out_DEF[:, e] += w * g_y_LD.T @ a_LF
            d_w_in_2EFD[:, e] += (d_z_L2F.T @ (n_LD * gamma_D + beta_D)).unflatten(0, (2, -1))
            d_b_in_2EF[:, e] += d_z_L2F.sum(dim=0).unflatten(0, (2, -1))
            d_gamma_D, d_beta_D = reference.affine_of_sample_and_expert(d_norm, b, e)
            d_gamma_D += (d_x_hat_LD * n_LD).sum(dim=0)
            d_beta_D += d_x_hat_LD.sum(dim=0)
            d_n_LD += gamma_D * d_x_hat_LD
        projection_L1 = (n_LD * d_n_LD).mean(dim=-1, keepdim=True)
        d_x[b] = rstd_BL[b, :, None] * (d_n_LD - d_n_LD.mean(dim=-1, keepdim=True) - n_LD * projection_L1)
    outputs = [grad.to(t.dtype) for grad, t in zip(grads, tensors[:-1], strict=True)]
    if not expert_grads:
        outputs[3:7] = [t.new_empty(0) for t in tensors[3:7]]
    return tuple(outputs)


def _geglu_backward(d_a_LF: Tensor, z_L2F: Tensor) -> Tensor:
    u_LF, g_LF = z_L2F.chunk(2, dim=-1)
    cdf_LF = 0.5 * (1 + torch.erf(g_LF / math.sqrt(2)))
    pdf_LF = torch.exp(-0.5 * g_LF.square()) / math.sqrt(2 * math.pi)
    return torch.cat([d_a_LF * g_LF * cdf_LF, d_a_LF * u_LF * (cdf_LF + g_LF * pdf_LF)], dim=-1)


def _widen(*tensors: Tensor | None) -> list:
    """The tensors with floating-point ones in float64. Indices and ``None`` stay as they are."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def _unflatten(tensors: list, num_experts: int) -> tuple[Tensor, NormAffine, ExpertWeights, Routing]:
    x, gamma, beta, w_in, b_in, w_out, b_out, weights, indices = tensors
    return x, NormAffine(gamma, beta), ExpertWeights(w_in, b_in, w_out, b_out, num_experts), Routing(weights, indices)


_OPS = define_ops("reference", adds_residual=True)
LIBRARY.impl("moe_ffn_reference", _inference, "CompositeExplicitAutograd")
LIBRARY.impl("moe_ffn_reference_train", _train, "CompositeExplicitAutograd")
LIBRARY.impl("moe_ffn_reference_backward", _backward, "CompositeExplicitAutograd")

moe_ffn = functools.partial(call_ops, _OPS)
