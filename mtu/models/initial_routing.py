"""The initial weights of routers: uniform routing, or routing under which equal experts become different.

Routers themselves live in `mtu.models.router`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mtu.experts import ExpertConfig
from mtu_kernels import dense_weights, top_k_routing

__all__ = ["count_experts_with_proportional_weights", "initial_router_state_dict"]

# The standard deviation of initial logits; 1 would start the smallest of 16 weights at 0.0098.
_DEVIATION = 0.95

# The best of so many draws of initial logits is used, because one draw in two has experts that are nearly equal.
_DRAWS = 64

# Unit vectors nearer than this count as one direction. At this distance, after 60 steps of AdamW the experts differed
# by a fifth of the distance that either had moved; at 0.3 by a half.
_SAME_DIRECTION = 0.1


def initial_router_state_dict(config: ExpertConfig, embedding: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The initial state dict of a router, `logits = linear_2(relu(linear_1(e)))`.

    - Dense routing with G < 1 starts at logits 0, as only uniform weights preserve the function.
    - Top-k routing with G < 1 starts near 0 (linear_2 from N(0, 0.02²)), as under ties all tasks would pick the same
      experts.
    - With G ≥ 1 experts start equal, and would stay equal under equal weights. So the logits of each task start with a
      deviation of 0.95 over the experts, whatever the router's width.

    Args:
        config: the expert layout.
        embedding: (T, W) float32, the initial task embedding.
        generator: the source of random numbers.

    Returns:
        The float32 tensors of a `Router`, by name.
    """
    width, bound = config.router_width, config.router_width**-0.5
    state = {
        "linear_1.weight": torch.empty(width, width).uniform_(-bound, bound, generator=generator),
        "linear_1.bias": torch.empty(width).uniform_(-bound, bound, generator=generator),
        "linear_2.weight": torch.zeros(config.num_experts, width),
        "linear_2.bias": torch.zeros(config.num_experts),
    }
    if config.num_experts > 1 and config.experts_hold_whole_ffn:
        hidden = F.relu(F.linear(embedding, state["linear_1.weight"], state["linear_1.bias"]))
        logits = _spread_logits(config, len(embedding), generator)
        state["linear_2.weight"] = _last_layer(hidden.double(), logits.double()).float()
    elif not config.has_dense_routing:
        state["linear_2.weight"].normal_(0.0, 0.02, generator=generator)
    return state


def _last_layer(hidden: Tensor, logits: Tensor) -> Tensor:
    """The smallest (E, W) weight with `hidden @ weight.T = logits`, for hidden (T, W) and logits (T, E).

    If there is none (more tasks than hidden units), this is the nearest one, scaled to the deviation of the logits.
    """
    weight = (torch.linalg.pinv(hidden, rtol=1e-3) @ logits).T
    measured = (hidden @ weight.T).square().mean().sqrt()
    return weight * (_DEVIATION / measured.clamp_min(1e-6))


def _spread_logits(config: ExpertConfig, num_tasks: int, generator: torch.Generator) -> Tensor:
    """Initial logits (T, E) under which equal experts become different: each task ranks the experts in another order.

    Each row has the values `0.95 √2 cos(π (r + ½) / E)`, r = 0 … E−1, in a random order, so its mean is 0 and its
    deviation 0.95. The values are bounded, so that no expert starts dead: for E from 2 to 16 all weights lie between
    0.01 and 0.9.

    An expert's gradient is `Σ_t w_te g_t`, and optimizers such as Adam ignore its size. So experts move alike if their
    weights over the tasks are in proportion. Of 64 draws, this takes those with the most experts that differ in
    direction, and among them the one whose two nearest experts differ most.
    """
    E, ranks = config.num_experts, torch.arange(config.num_experts)
    values = _DEVIATION * math.sqrt(2) * torch.cos(math.pi * (ranks + 0.5) / E)
    draws = values[torch.rand(_DRAWS, num_tasks, E, generator=generator).argsort(dim=-1)]
    if config.has_dense_routing:
        weights = draws.softmax(dim=-1)
    else:
        weights = dense_weights(top_k_routing(draws.flatten(0, 1), config.num_active_experts), E).view_as(draws)
    used, distances = _directions(weights)
    distinct = used.sum(dim=-1) - _proportional(used, distances).sum(dim=-1)
    # Unit vectors without negative elements are at most √2 apart, so the count of distinct experts decides first.
    nearest = distances.flatten(1).amin(dim=-1).clamp(max=math.sqrt(2))
    return draws[(2.0 * distinct + nearest).argmax()]


def count_experts_with_proportional_weights(routing_weights: Tensor) -> Tensor:
    """Count, for each layer, the experts whose weights over the tasks are in proportion to an earlier expert's.

    Args:
        routing_weights: (…, T, E).

    Returns:
        (…,) int64.
    """
    return _proportional(*_directions(routing_weights)).sum(dim=-1)


def _directions(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Whether some task uses each expert (…, E), and the distances of the experts' directions (…, E, E).

    The direction of an expert is its weights (…, T, E) over the tasks, normalised. The distance to itself, and to
    experts that no task uses, is infinite.
    """
    used = (weights > 0).any(dim=-2)
    unit = F.normalize(weights.double(), dim=-2).transpose(-1, -2)
    # Computed from products instead of differences, rounding would hide small distances.
    distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = used.unsqueeze(-1) & used.unsqueeze(-2) & ~torch.eye(used.shape[-1], dtype=torch.bool, device=used.device)
    return used, distances.masked_fill(~pairs, math.inf)


def _proportional(used: Tensor, distances: Tensor) -> Tensor:
    """Whether an earlier expert's weights are in proportion to this one's, (…, E)."""
    return used & (distances < _SAME_DIRECTION).tril(diagonal=-1).any(dim=-1)
