"""What routers start from: uniform weights, or weights that let experts part which start alike."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mtu.experts import ExpertConfig
from mtu_kernels import dense_weights, top_k_routing

__all__ = ["count_experts_with_proportional_weights", "initial_router_state_dict"]

# The standard deviation of initial logits; 1 would start the smallest of 16 weights at 0.0098.
_DEVIATION = 0.95

# Among how many draws of initial logits the best is looked for: one draw in two has experts that are nearly twins.
_DRAWS = 64

# Unit vectors nearer than this count as one direction: at that distance 60 steps of AdamW took experts apart by a fifth
# of what either moved; at 0.3 by a half.
_SAME_DIRECTION = 0.1


def initial_router_state_dict(config: ExpertConfig, embedding: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The state dict that a router starts from.

    `logits = linear_2(relu(linear_1(e)))` are 0 for dense routing below G = 1, where only uniform weights preserve the
    function; near 0 (linear_2 from N(0, 0.02²)) for top-k routing there, since under ties every task would pick the
    same experts. From G = 1 on experts start alike, and would stay so under weights that are alike: logits start
    spread, with a deviation of 0.95 over the experts of each task, whatever the router's width.

    Args:
        config: expert layout.
        embedding: (T, W) float32, the initial task embedding.
        generator: what is drawn comes from it.

    Returns:
        The tensors of a `Router`, float32.
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
    elif not config.is_dense:
        state["linear_2.weight"].normal_(0.0, 0.02, generator=generator)
    return state


def _last_layer(hidden: Tensor, logits: Tensor) -> Tensor:
    """The smallest (E, W) weight with `hidden @ weight.T = logits`, for hidden (T, W) and logits (T, E).

    Where no weight gives them all (more tasks than hidden units), the nearest, with their deviation.
    """
    weight = (torch.linalg.pinv(hidden, rtol=1e-3) @ logits).T
    measured = (hidden @ weight.T).square().mean().sqrt()
    return weight * (_DEVIATION / measured.clamp_min(1e-6))


def _spread_logits(config: ExpertConfig, num_tasks: int, generator: torch.Generator) -> Tensor:
    """Initial logits (T, E) by which experts that start alike part: each task ranks the experts in another order.

    Each row has the values `0.95 √2 cos(π (r + ½) / E)`, r = 0 … E−1, in an order that is drawn: mean 0 and deviation
    0.95. They are bounded, so that no expert starts dead: for E from 2 to 16 all weights lie between 0.01 and 0.9.

    An expert's gradients are `Σ_t w_te g_t`, and optimizers such as Adam forget their size: experts whose weights over
    the tasks are in proportion move alike. So of 64 draws the one is taken where most experts differ in direction, and
    of those the one whose nearest two differ most.
    """
    E, ranks = config.num_experts, torch.arange(config.num_experts)
    values = _DEVIATION * math.sqrt(2) * torch.cos(math.pi * (ranks + 0.5) / E)
    draws = values[torch.rand(_DRAWS, num_tasks, E, generator=generator).argsort(dim=-1)]
    if config.is_dense:
        weights = draws.softmax(dim=-1)
    else:
        weights = dense_weights(top_k_routing(draws.flatten(0, 1), config.num_active_experts), E).view_as(draws)
    used, distances = _directions(weights)
    distinct = used.sum(dim=-1) - _proportional(used, distances).sum(dim=-1)
    # Unit vectors without negative elements are at most √2 apart: the count of distinct experts goes first.
    nearest = distances.flatten(1).amin(dim=-1).clamp(max=math.sqrt(2))
    return draws[(2.0 * distinct + nearest).argmax()]


def count_experts_with_proportional_weights(routing_weights: Tensor) -> Tensor:
    """How many experts have weights in proportion to those of an earlier one, by layer: (…, T, E) to (…,) int64."""
    return _proportional(*_directions(routing_weights)).sum(dim=-1)


def _directions(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts some task uses (…, E), and how far apart the directions of their weights (…, T, E) are (…, E, E).

    An expert to itself and to those that no task uses counts as infinitely far.
    """
    used = (weights > 0).any(dim=-2)
    unit = F.normalize(weights.double(), dim=-2).transpose(-1, -2)
    # From differences: by way of products, rounding would hide how near two are.
    distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = used.unsqueeze(-1) & used.unsqueeze(-2) & ~torch.eye(used.shape[-1], dtype=torch.bool, device=used.device)
    return used, distances.masked_fill(~pairs, math.inf)


def _proportional(used: Tensor, distances: Tensor) -> Tensor:
    """Whether an earlier expert's weights are in proportion to this one's, (…, E)."""
    return used & (distances < _SAME_DIRECTION).tril(diagonal=-1).any(dim=-1)
