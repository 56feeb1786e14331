"""Routing: the experts that each sample uses, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtu_kernels.tracing import is_exporting_or_tracing, static_size


class Routing(NamedTuple):
    """The routing weights of every sample, and the experts that they belong to.

    Attributes:
        weights: (B, K) float. The weight of each active expert, in the dtype of x or float32.
        indices: (B, K) int32 or int64. The active experts of each sample, all different. ``None`` means dense routing:
            K = E, and the weights are those of experts 0 to E − 1.
    """

    weights: Tensor
    indices: Tensor | None = None


def top_k_routing(logits: Tensor, k: int) -> Routing:
    """Keeps the k largest logits of each row and renormalises over them.

    ``i = argsort(-logits, stable)[:k]``, ``w = softmax(logits[i])``

    Of equal logits, the one with the lower expert index is kept. (``torch.topk`` keeps another one on another device.)
    The kept experts are in the order of descending logits.

    The softmax over one logit is the constant 1, whose gradient is zero, so a router could not learn. For ``k = 1 < E``
    the weight therefore takes the gradient of the expert's log-probability among all experts (straight through):

    ``p = softmax(logits)[i]``, ``w = p / stop(p) = 1``, ``∂w/∂logits[e] = [e = i] − softmax(logits)[e]``

    Args:
        logits: (T, E) float. One row per task or per sample.
        k: number of experts to keep, 1 <= k <= E.

    Returns:
        A ``Routing`` with weights (T, k), float32 (float64 for float64 logits), and indices (T, k) int32. The weights
        have gradients for the kept logits only, or for all logits if ``k = 1 < E``.

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

    ``p / stop(p)`` has the same gradient, but compilers divide approximately. ``x - x`` is 0 for every finite x.
    """
    log_p_T1 = torch.log_softmax(logits, dim=-1, dtype=weights_T1.dtype).gather(1, chosen_T1)
    return weights_T1.detach() + (log_p_T1 - log_p_T1.detach())


def dense_weights(routing: Routing, num_experts: int) -> Tensor:
    """The routing weights of all experts, with exact zeros for inactive ones.

    ``w[b, indices[b, k]] = weights[b, k]``

    Args:
        routing: weights (B, K) float and indices (B, K) or ``None``.
        num_experts: E.

    Returns:
        (B, E) in the dtype of the weights. If routing is dense, these are the weights themselves, not a copy.
    """
    if routing.indices is None:
        return routing.weights
    zeros_BE = routing.weights.new_zeros(routing.weights.shape[0], num_experts)
    return zeros_BE.scatter(1, routing.indices.long(), routing.weights)


def _stable_descending_sort(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (T, E) of each row in descending order, NaN first, and the experts (T, E) that they belong to.

    PyTorch sorts in few kernels, but ONNX has no stable sort. Programs for other runtimes count instead:
    ``place_e = #{j < e : l_j ≥ l_e} + #{j > e : l_j > l_e}``
    """
    if not is_exporting_or_tracing():
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    l_T1E = logits.unsqueeze(1)
    # Element [t, e, j] says whether l_j ≥ l_e. Only NaN differs from itself.
    not_less_TEE = (l_T1E >= logits.unsqueeze(2)) | (l_T1E != l_T1E)
    expert_E = torch.arange(static_size(logits.shape[1]), device=logits.device)
    is_lower_EE = expert_E < expert_E.unsqueeze(1)
    # One comparison of a pair of experts gives the order of both.
    place_TE = (not_less_TEE & is_lower_EE).sum(dim=2) + (not_less_TEE.logical_not() & is_lower_EE).sum(dim=1)
    # All places differ, so topk needs no stable order.
    order_TE = place_TE.topk(static_size(logits.shape[1]), largest=False).indices
    return logits.gather(1, order_TE), order_TE
