"""The backend "eager": PyTorch's own operators, for every device and dtype, and for exporters.

It is deliberately not a custom operator. So `torch.export`, `torch.jit.trace` and both exporters of `torch.onnx` record
only aten operators, autograd differentiates it any number of times, and `torch.compile` can fuse it with other code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtu_kernels.arguments import ExpertWeights, NormAffine, Options
from mtu_kernels.routing import Routing
from mtu_kernels.tracing import is_exporting, static_size


def moe_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, options: Options) -> Tensor:
    """`mtu_kernels.moe_ffn` for arguments that have been checked.

    Dense routing costs as many products as a stock FFN. Top-k routing does K/E of that work. It gathers the weights of
    the active experts for each sample, which takes the memory of B·K/E copies of the FFN during the call. (A loop over
    experts that selects their samples would need no copies, but needs the routing on the host.)
    """
    eps, recompute, residual = options
    # Exported programs have no backward pass, so checkpoints would save no memory.
    if recompute and torch.is_grad_enabled() and not is_exporting():
        tensors = (*norm, *experts[:4], *routing)
        y = checkpoint(
            _moe_ffn_flat, x, *tensors, experts.num_experts, eps, use_reentrant=False, preserve_rng_state=False
        )
    else:
        y = _moe_ffn(x, norm, experts, routing, eps)
    return x + y if residual else y


def _moe_ffn_flat(x: Tensor, *args) -> Tensor:
    # Under torch.compile, a checkpointed function can take tensors and numbers, but no tuples.
    norm_weight, norm_bias, w_in, b_in, w_out, b_out, weights, indices, num_experts, eps = args
    experts = ExpertWeights(w_in, b_in, w_out, b_out, num_experts)
    return _moe_ffn(x, NormAffine(norm_weight, norm_bias), experts, Routing(weights, indices), eps)


def layer_norm_per_sample(x: Tensor, norm: NormAffine, compute: torch.dtype, eps: float) -> Tensor:
    """x̂ (B, L, D) in the compute dtype, for one affine (B, D) per sample. It is rounded once."""
    accumulate = torch.promote_types(compute, torch.float32)
    n_BLD = _normalize(x.to(accumulate), eps)
    return _apply_affine(n_BLD, NormAffine(norm.weight.to(accumulate), norm.bias.to(accumulate)), compute)


def _moe_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, eps: float) -> Tensor:
    compute = experts.w_in.dtype
    accumulate = torch.promote_types(compute, torch.float32)
    n_BLD = _normalize(x.to(accumulate), eps)
    norm = NormAffine(norm.weight.to(accumulate), norm.bias.to(accumulate))
    weights_BK = routing.weights.to(accumulate)
    if routing.indices is not None:
        return _top_k(n_BLD, norm, experts, weights_BK, routing.indices)
    hidden = _hidden if norm.weight.dim() == 2 else _hidden_of_expert_norms
    h_BLH = _weigh(hidden(n_BLD, norm, experts), weights_BK, compute)
    if experts.b_out.dim() == 1:
        return F.linear(h_BLH, experts.w_out, experts.b_out)
    bias_B1D = (weights_BK.unsqueeze(2) * experts.b_out).sum(dim=1, keepdim=True)
    return (F.linear(h_BLH, experts.w_out) + bias_B1D).to(compute)


def _normalize(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (static_size(x.shape[-1]),), eps=eps)


def _expert_size(experts: ExpertWeights) -> int:
    """F, the hidden units of one expert."""
    return static_size(experts.w_out.shape[1]) // experts.num_experts


def _apply_affine(n_BLD: Tensor, norm: NormAffine, compute: torch.dtype) -> Tensor:
    return torch.addcmul(norm.bias.unsqueeze(1), n_BLD, norm.weight.unsqueeze(1)).to(compute)


def _hidden(n_BLD: Tensor, norm: NormAffine, experts: ExpertWeights) -> Tensor:
    """Activations (B, L, E, F) of all experts, for one affine (B, D) per sample."""
    x_hat_BLD = _apply_affine(n_BLD, norm, experts.w_in.dtype)
    u_BLH, g_BLH = F.linear(x_hat_BLD, experts.w_in, experts.b_in).chunk(2, dim=-1)
    B, L, _ = n_BLD.shape
    return (u_BLH * F.gelu(g_BLH)).view(B, L, experts.num_experts, _expert_size(experts))


def _hidden_of_expert_norms(n_BLD: Tensor, norm: NormAffine, experts: ExpertWeights) -> Tensor:
    """Activations (B, L, E, F) of all experts, for one affine (B, E, D) per sample and expert."""
    B, L, _ = n_BLD.shape
    E, D, size = experts.num_experts, static_size(n_BLD.shape[2]), _expert_size(experts)
    gamma_EB1D, beta_EB1D = (affine.transpose(0, 1).unsqueeze(2) for affine in norm)
    x_hat_END = torch.addcmul(beta_EB1D, n_BLD, gamma_EB1D).to(experts.w_in.dtype).reshape(E, B * L, D)
    w_u_EFD, w_g_EFD = experts.w_in.view(2, E, size, D).unbind()
    b_u_EF, b_g_EF = experts.b_in.view(2, E, size).unbind()
    u_ENF = torch.baddbmm(b_u_EF.unsqueeze(1), x_hat_END, w_u_EFD.transpose(1, 2))
    g_ENF = torch.baddbmm(b_g_EF.unsqueeze(1), x_hat_END, w_g_EFD.transpose(1, 2))
    return (u_ENF * F.gelu(g_ENF)).view(E, B, L, size).permute(1, 2, 0, 3)


def _top_k(n_BLD: Tensor, norm: NormAffine, experts: ExpertWeights, weights_BK: Tensor, indices_BK: Tensor) -> Tensor:
    B, L, _ = n_BLD.shape
    D, K, size = static_size(n_BLD.shape[2]), static_size(indices_BK.shape[1]), _expert_size(experts)
    H = experts.num_experts * size
    compute = experts.w_in.dtype
    units_BKF = indices_BK.unsqueeze(2) * size + torch.arange(size, device=n_BLD.device, dtype=indices_BK.dtype)
    # The gate rows of each slot follow its value rows, so that the products below need no further copy.
    rows = torch.stack([units_BKF, units_BKF + H], dim=2).flatten()
    w_in = experts.w_in.index_select(0, rows)
    b_in = experts.b_in.index_select(0, rows)
    if norm.weight.dim() == 2:
        x_hat_BLD = _apply_affine(n_BLD, norm, compute)
        z = torch.baddbmm(b_in.view(B, 1, 2 * K * size), x_hat_BLD, w_in.view(B, 2 * K * size, D).transpose(1, 2))
        z_BLK2F = z.view(B, L, K, 2, size)
    else:
        picked_BKD = indices_BK.unsqueeze(2).expand(B, K, D).long()
        gamma_BK1D, beta_BK1D = (affine.gather(1, picked_BKD).unsqueeze(2) for affine in norm)
        x_hat_BKLD = torch.addcmul(beta_BK1D, n_BLD.unsqueeze(1), gamma_BK1D).to(compute)
        x_hat = x_hat_BKLD.reshape(B * K, L, D)
        z = torch.baddbmm(b_in.view(B * K, 1, 2 * size), x_hat, w_in.view(B * K, 2 * size, D).transpose(1, 2))
        z_BLK2F = z.view(B, K, L, 2, size).transpose(1, 2)
    u_BLKF, g_BLKF = z_BLK2F.unbind(3)
    h_BLH = _weigh(u_BLKF * F.gelu(g_BLKF), weights_BK, compute)
    w_out_DBH = experts.w_out.index_select(1, units_BKF.flatten()).view(D, B, K * size)
    y_BLD = torch.bmm(h_BLH, w_out_DBH.permute(1, 2, 0))
    if experts.b_out.dim() == 1:
        return y_BLD + experts.b_out
    b_out_BKD = experts.b_out.index_select(0, indices_BK.flatten()).view(B, K, D)
    return (y_BLD + (weights_BK.unsqueeze(2) * b_out_BKD).sum(dim=1, keepdim=True)).to(compute)


def _weigh(a_BLKF: Tensor, weights_BK: Tensor, compute: torch.dtype) -> Tensor:
    """``w · a`` (B, L, K·F), rounded once: the weights are not rounded to the compute dtype before."""
    return (a_BLKF * weights_BK.unsqueeze(1).unsqueeze(3)).to(compute).flatten(2)
