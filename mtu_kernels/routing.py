"""Routing: which experts a sample uses, and how much of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtu_kernels.tracing import is_exporting_or_tracing, static_size


class Routing(NamedTuple):
    """The routing weights of every sample, and the experts that they belong to.

    Attributes:
        weights: (B, K) float. Weight of each active expert, in the dtype of x or float32.
        indices: (B, K) int32 or int64, no expert twice in a row. ``None`` means dense routing: K = E and slot k is
            expert k.
    """

    weights: Tensor
    indices: Tensor | None = None


def top_k_routing(logits: Tensor, k: int) -> Routing:
    """Keeps the k largest logits of each row and renormalises over them.

    ``i = argsort(-logits, stable)[:k]``, ``w = softmax(logits[i])``

    Equal logits keep the lower expert index. ``torch.topk`` would not do: which of two ties it keeps differs by device.
    The kept experts stay in the order of descending logits.

    The softmax over one logit is the constant 1, by which no router could learn. So for ``k = 1 < E`` the weight keeps
    this value and takes the gradient of the expert's log-probability among all experts (straight through):

    ``p = softmax(logits)[i]``, ``w = p / stop(p) = 1``, ``∂w/∂logits[e] = [e = i] − softmax(logits)[e]``

    Args:
        logits: (T, E) float. One row per task or per sample.
        k: number of experts to keep, 1 <= k <= E.

    Returns:
        A ``Routing`` with weights (T, k), float32 (float64 for float64 logits), and indices (T, k) int32. Gradients
        flow into the kept logits only, but for ``k = 1 < E`` into all.

    Raises:
        ValueError: logits are not two-dimensional or not floating point, or k is out of range.

    Source:
        Upcycling Text-to-Image Diffusion Models for Multi-Task Capabilities, arXiv 2503.11905, section 3.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"top_k_routing needs logits (T, E) of a floating-point dtype, got {tuple(logits.shape)} {logits.dtype}."
        )
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_k_routing needs 1 <= k <= E = {logits.shape[1]}, got k = {k}.")
    sorted_TE, order_TE = _stable_descending_sort(logits)
    weights_TK = torch.softmax(sorted_TE[:, :k], dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if k == 1 < logits.shape[1] and torch.is_grad_enabled() and logits.requires_grad:
        weights_TK = _straight_through(weights_TK, logits, order_TE[:, :1])
    return Routing(weights_TK, order_TE[:, :k].to(torch.int32))


def _straight_through(weights_T1: Tensor, logits: Tensor, chosen_T1: Tensor) -> Tensor:
    """The weights, with the gradients of the chosen experts' log-probabilities among all experts.

    The same as p / stop(p), but that compilers divide approximately, while x - x is 0 for any finite x.
    """
    log_p_T1 = torch.log_softmax(logits, dim=-1, dtype=weights_T1.dtype).gather(1, chosen_T1)
    return weights_T1.detach() + (log_p_T1 - log_p_T1.detach())


def dense_weights(routing: Routing, num_experts: int) -> Tensor:
    """Writes routing weights out over all experts, with exact zeros for inactive ones.

    ``w[b, indices[b, k]] = weights[b, k]``

    Args:
        routing: weights (B, K) float and indices (B, K) or ``None``.
        num_experts: E.

    Returns:
        (B, E) in the dtype of the weights; the weights themselves where routing is dense already.
    """
    if routing.indices is None:
        return routing.weights
    zeros_BE = routing.weights.new_zeros(routing.weights.shape[0], num_experts)
    return zeros_BE.scatter(1, routing.indices.long(), routing.weights)


def _stable_descending_sort(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (T, E) of each row in descending order, NaN first, and the experts (T, E) that they belong to.

    ``place_e = #{j < e : l_j ≥ l_e} + #{j > e : l_j > l_e}`` where other runtimes may read the program: ONNX has no
    stable sort. Elsewhere PyTorch's, which takes fewer kernels.
    """
    if not is_exporting_or_tracing():
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    l_T1E = logits.unsqueeze(1)
    # [t, e, j]: l_j ≥ l_e. NaN alone differs from itself.
    not_less_TEE = (l_T1E >= logits.unsqueeze(2)) | (l_T1E != l_T1E)
    expert_E = torch.arange(static_size(logits.shape[1]), device=logits.device)
    is_lower_EE = expert_E < expert_E.unsqueeze(1)
    # Each pair of experts is compared once, for both of them.
    place_TE = (not_less_TEE & is_lower_EE).sum(dim=2) + (not_less_TEE.logical_not() & is_lower_EE).sum(dim=1)
    # No two places are the same.
    order_TE = place_TE.topk(static_size(logits.shape[1]), largest=False).indices
    return logits.gather(1, order_TE), order_TE
