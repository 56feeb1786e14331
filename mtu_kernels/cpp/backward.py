"""The backward pass of the backend "cpp": its formulas are in `mtu_kernels.reference_ops`.

PyTorch makes the matrix products, which take most of the time. Operators of the extension compute what lies between
them: LayerNorm, the activation, and their gradients.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine

_kernels = torch.ops.mtu_kernels


class _Call(NamedTuple):
    """The arguments of one backward pass, all contiguous.

    Attributes:
        x: (B, L, D) compute dtype or float32.
        norm: (B, S, D) float32, where S is 1 for one affine per sample, and K for one per active expert.
        experts: as the operator takes them.
        weights: (B, K) float32 routing weights.
        active: the K active experts of each sample, or ``None`` for dense routing.
        mean, rstd: (B, L) float32, the statistics of LayerNorm.
        level: the number of the instruction set.
    """

    x: Tensor
    norm: NormAffine
    experts: ExpertWeights
    weights: Tensor
    active: list[list[int]] | None
    mean: Tensor
    rstd: Tensor
    level: int

    @property
    def is_one_product(self) -> bool:
        """Whether one product serves all samples and experts: routing is dense, and each sample has one affine."""
        return self.active is None and self.norm.weight.shape[1] == 1

    @property
    def slots(self) -> list[tuple[int, int, int]]:
        """The sample, the slot and the expert (b, k, e) of every active expert."""
        B, K = self.weights.shape
        return [(b, k, k if self.active is None else self.active[b][k]) for b in range(B) for k in range(K)]

    def units(self, e: int) -> slice:
        """The hidden units of expert e."""
        size = self.experts.w_out.shape[1] // self.experts.num_experts
        return slice(e * size, (e + 1) * size)


def compute_gradients(level: int, grad_y: Tensor, *args) -> tuple[Tensor, ...]:
    """The kernel of ``moe_ffn_cpp_backward``, with the number of a level before the operator's arguments."""
    # Autograd may run this under autocast, which would round the operands of float32 products.
    with torch.autocast("cpu", enabled=False):
        return _gradients(level, grad_y, *args)


def _gradients(level: int, grad_y: Tensor, *args) -> tuple[Tensor, ...]:
    *tensors, hidden, mean, rstd, num_experts, eps, expert_grads = args
    if hidden is None:
        _, hidden, mean, rstd = _kernels.cpp_train_at(level, False, *tensors, num_experts, eps)
    x, gamma, beta, w_in, b_in, w_out, b_out, weights, indices = tensors
    grad_y = grad_y.contiguous()
    call = _Call(
        x.contiguous(),
        NormAffine(*(_by_slot(affine, indices) for affine in (gamma, beta))),
        ExpertWeights(*(t.contiguous() for t in (w_in, b_in, w_out, b_out)), num_experts=num_experts),
        weights.float().contiguous(),
        None if indices is None else indices.tolist(),
        mean.contiguous(),
        rstd.contiguous(),
        level,
    )
    # h is the gradient of w·a at first. If experts are trained, the kernel overwrites it with w·a.
    h = _output_product_gradient(call, grad_y)
    d_hidden, d_weights, d_b_in = _kernels.cpp_geglu_backward(h, hidden.contiguous(), call.weights, expert_grads, level)
    d_weights = d_weights.sum(dim=1).float()
    grad_y_sum = grad_y.sum(dim=1, dtype=torch.float32)
    if b_out.dim() == 2:
        products_BE = grad_y_sum @ call.experts.b_out.float().T
        d_weights += products_BE if indices is None else products_BE.gather(1, indices.long())
    expert_gradients = [t.new_empty(0) for t in (w_in, b_in, w_out, b_out)]
    if expert_grads:
        expert_gradients = _expert_gradients(call, grad_y, grad_y_sum, h, d_hidden, d_b_in.sum(dim=1))
    del h
    d_x_hat = _input_product_gradient(call, d_hidden)
    d_x, d_gamma, d_beta = _kernels.cpp_norm_backward(
        d_x_hat, call.x, call.mean, call.rstd, call.norm.weight, call.level
    )
    d_norm = [_from_slots(runs.sum(dim=1), gamma.shape, indices) for runs in (d_gamma, d_beta)]
    gradients = (d_x, *d_norm, *expert_gradients, d_weights)
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(gradients, tensors[:-1], strict=True))


def _by_slot(affine: Tensor, indices: Tensor | None) -> Tensor:
    """Affines (B, D) → (B, 1, D), or (B, E, D) → those of the active experts (B, K, D), in float32."""
    affine = affine.float()
    if affine.dim() == 2:
        return affine[:, None].contiguous()
    if indices is None:
        return affine.contiguous()
    return affine.gather(1, indices[:, :, None].expand(-1, -1, affine.shape[2]).long())


def _from_slots(gradient: Tensor, shape: torch.Size, indices: Tensor | None) -> Tensor:
    """Gradients (B, S, D) → the shape of the affine. Experts that a sample does not use get exact zeros."""
    if len(shape) == 2:
        return gradient[:, 0]
    if indices is None:
        return gradient
    spread = indices[:, :, None].expand(-1, -1, shape[2]).long()
    return gradient.new_zeros(shape).scatter(1, spread, gradient)


def _output_product_gradient(call: _Call, grad_y: Tensor) -> Tensor:
    """``∂y W_out`` (B, L, K·F) over the active experts' columns: the gradient of w·a, with w = 1."""
    B, L, _ = grad_y.shape
    w_out = call.experts.w_out
    if call.active is None:
        return (grad_y.flatten(0, 1) @ w_out).view(B, L, w_out.shape[1])
    size = w_out.shape[1] // call.experts.num_experts
    d_weighted = grad_y.new_empty(B, L, call.weights.shape[1] * size)
    for b, k, e in call.slots:
        d_weighted[b, :, k * size : (k + 1) * size] = grad_y[b] @ w_out[:, call.units(e)]
    return d_weighted


def _input_product_gradient(call: _Call, d_hidden: Tensor) -> Tensor:
    """∂x̂ (B, S, L, D): ``∂z W_in`` over the active experts' rows, summed over the experts that share an affine."""
    B, L, D = call.x.shape
    w_in = call.experts.w_in
    if call.is_one_product:
        return (d_hidden.flatten(0, 1) @ w_in).view(B, 1, L, D)
    num_slots = call.norm.weight.shape[1]
    d_x_hat = d_hidden.new_empty(B, num_slots, L, D)
    w_in_2HD = w_in.unflatten(0, (2, -1))
    d_hidden_BL2KF = d_hidden.unflatten(-1, (2, call.weights.shape[1], -1))
    if call.active is None:
        # Every expert has an affine of its own, so it has one product for all samples.
        for e in range(num_slots):
            rows = w_in_2HD[:, call.units(e)].flatten(0, 1)
            d_x_hat[:, e] = (d_hidden_BL2KF[:, :, :, e].reshape(B * L, rows.shape[0]) @ rows).view(B, L, D)
        return d_x_hat
    # Experts that share an affine share a product, so that their sum is rounded once.
    for (b, i), group in itertools.groupby(call.slots, key=lambda slot: (slot[0], slot[1] if num_slots > 1 else 0)):
        _, slots, members = zip(*group, strict=True)
        rows = torch.cat([w_in_2HD[:, call.units(e)] for e in members], dim=1).flatten(0, 1)
        d_x_hat[b, i] = d_hidden_BL2KF[b, :, :, slots[0] : slots[-1] + 1].reshape(L, rows.shape[0]) @ rows
    return d_x_hat


def _expert_gradients(
    call: _Call, grad_y: Tensor, grad_y_sum: Tensor, h: Tensor, d_hidden: Tensor, d_hidden_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂W_in, ∂b_in, ∂W_out and ∂b_out. Experts that no sample uses get exact zeros.

    Args:
        call: the arguments of the backward pass.
        grad_y: (B, L, D) compute dtype.
        grad_y_sum: (B, D) float32, summed over the tokens of each sample.
        h: (B, L, K·F) compute dtype, the weighted activations w·a.
        d_hidden: (B, L, 2·K·F) compute dtype, the gradient of the pre-activations.
        d_hidden_sum: (B, 2·K·F) float32, summed over the tokens of each sample.
    """
    w_in, b_in, w_out, b_out, num_experts = call.experts
    x_hat = _kernels.cpp_normalize(call.x, call.mean, call.rstd, *call.norm, w_in, call.level)
    d_b_in_B2KF = d_hidden_sum.unflatten(-1, (2, call.weights.shape[1], -1))
    if call.active is None:
        d_w_out = grad_y.flatten(0, 1).T @ h.flatten(0, 1)
        d_b_in = d_b_in_B2KF.sum(dim=0).flatten()
        d_b_out = call.weights.T @ grad_y_sum if b_out.dim() == 2 else grad_y_sum.sum(dim=0)
    else:
        d_w_out, d_b_in = torch.zeros_like(w_out), torch.zeros_like(b_in, dtype=torch.float32)
        d_b_out = torch.zeros_like(b_out, dtype=torch.float32) if b_out.dim() == 2 else grad_y_sum.sum(dim=0)
        d_b_in_2EF = d_b_in.view(2, num_experts, -1)
        for b, k, e in call.slots:
            d_b_in_2EF[:, e] += d_b_in_B2KF[b, :, k]
            if b_out.dim() == 2:
                d_b_out[e] += call.weights[b, k] * grad_y_sum[b]
    if call.is_one_product:
        return d_hidden.flatten(0, 1).T @ x_hat.flatten(0, 2), d_b_in, d_w_out, d_b_out
    d_w_in_2HD = torch.zeros_like(w_in).unflatten(0, (2, -1))
    d_hidden_BL2KF = d_hidden.unflatten(-1, (2, call.weights.shape[1], -1))
    h_BLKF = h.unflatten(-1, (call.weights.shape[1], -1))
    for e, slots in itertools.groupby(sorted(call.slots, key=lambda slot: slot[2]), key=lambda slot: slot[2]):
        # The samples of an expert share a product, so that their sum is rounded once.
        members = [(b, k) for b, k, _ in slots]
        x_hat_ND = torch.cat([x_hat[b, k if x_hat.shape[1] > 1 else 0] for b, k in members])
        d_hidden_N2F = torch.cat([d_hidden_BL2KF[b, :, :, k].flatten(1) for b, k in members])
        d_w_in_2HD[:, call.units(e)] = (d_hidden_N2F.T @ x_hat_ND).unflatten(0, (2, -1))
        if call.active is not None:
            h_NF = torch.cat([h_BLKF[b, :, k] for b, k in members])
            d_w_out[:, call.units(e)] = torch.cat([grad_y[b] for b, _ in members]).T @ h_NF
    return d_w_in_2HD.flatten(0, 1), d_b_in, d_w_out, d_b_out
