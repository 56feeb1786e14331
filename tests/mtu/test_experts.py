"""Expert layouts: which hidden units each expert gets, and what keeps the function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtu.experts import ExpertConfig


def layout(num_experts=4, top_k=None, expert_ratio=0.25, norm="task", routing_scale=None, router_width=16):
    scale = 1 / expert_ratio if routing_scale is None else routing_scale
    return ExpertConfig(num_experts, top_k, expert_ratio, norm, scale, router_width)


@pytest.mark.parametrize(
    ("num_experts", "ratio", "hidden", "width"),
    [(4, 0.25, 128, 32), (1, 1.0, 128, 128), (4, 1.0, 128, 128), (3, 1 / 3, 1920, 640), (2, 0.75, 8, 6), (2, 2, 8, 16)],
)
def test_width_of_an_expert(num_experts, ratio, hidden, width):
    assert layout(num_experts, expert_ratio=ratio).hidden_units_per_expert(hidden) == width


@pytest.mark.parametrize(
    ("num_experts", "ratio", "message"),
    [
        (3, 1 / 3, "num_experts must divide the hidden width of every FFN, but 3 does not divide 128"),
        (256, 1 / 256, "256 does not divide 128"),
        (4, 1 / 3, "must be a whole number"),
        (4, 1e-3, "must be a whole number"),
    ],
)
def test_a_width_that_is_not_whole_raises(num_experts, ratio, message):
    with pytest.raises(ValueError, match=message):
        layout(num_experts, expert_ratio=ratio).hidden_units_per_expert(128)


def test_slots_are_the_stock_units_in_order_tiled_or_truncated():
    assert layout(4, expert_ratio=0.25).stock_unit_indices(8) is None
    assert layout(2, expert_ratio=0.25).stock_unit_indices(8).tolist() == [0, 1, 2, 3]
    assert layout(2, expert_ratio=0.75).stock_unit_indices(8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert layout(2, expert_ratio=1.0).stock_unit_indices(4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    shifted = layout(4, expert_ratio=0.5).stock_unit_indices(8)
    assert shifted.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 0, 1]


@given(num_experts=st.sampled_from([2, 3, 4, 8]), width=st.integers(1, 23))
def test_no_two_experts_below_the_whole_hold_the_same_units(num_experts, width):
    config, hidden = layout(num_experts, expert_ratio=width / 24), 24
    units = config.stock_unit_indices(hidden)
    units = torch.arange(hidden) if units is None else units
    held = [frozenset(own.tolist()) for own in units.view(num_experts, width)]
    assert len(set(held)) == num_experts
    assert all(len(own) == width for own in held)
    assert len(frozenset.union(*held)) == min(hidden, num_experts * width)


@given(
    num_experts=st.sampled_from([1, 2, 3, 4, 8]),
    quarters=st.integers(1, 12),
    routing_scale=st.sampled_from([None, 1.0, 3.7]),
)
def test_dense_columns_of_each_unit_add_up_to_one(num_experts, quarters, routing_scale):
    """The law behind preservation: Σ over the copies of a unit of w_e · scale is 1, whatever the routing scale."""
    config, hidden = layout(num_experts, expert_ratio=quarters / 4, routing_scale=routing_scale), 24
    units, scale = config.stock_unit_indices(hidden), config.output_column_scales(hidden)
    units = torch.arange(hidden) if units is None else units
    scale = torch.ones(len(units)).double() if scale is None else scale
    total = torch.zeros(hidden).double().index_add(0, units, config.routing_scale / num_experts * scale)
    present = torch.bincount(units, minlength=hidden) > 0
    assert torch.allclose(total[present], torch.ones_like(total[present]), rtol=1e-12)
    assert bool(present.all()) == (config.why_output_not_preserved() is None)


@given(
    num_experts=st.sampled_from([2, 3, 4]),
    idle=st.integers(0, 1),
    quarters=st.integers(4, 12),
    routing_scale=st.sampled_from([None, 1.0, 3.7]),
    seed=st.integers(0, 9),
)
def test_columns_of_whole_experts_add_up_to_one_anywhere_on_the_simplex(
    num_experts, idle, quarters, routing_scale, seed
):
    config, hidden = layout(num_experts, num_experts - idle, quarters / 4, routing_scale=routing_scale), 24
    units, scale = config.stock_unit_indices(hidden), config.output_column_scales(hidden)
    scale = torch.ones(len(units)).double() if scale is None else scale
    logits = torch.randn(num_experts, generator=torch.Generator().manual_seed(seed)).double()
    logits[seed % num_experts] = -math.inf
    weights = config.routing_scale * logits.softmax(0).repeat_interleave(config.hidden_units_per_expert(hidden))
    total = torch.zeros(hidden).double().index_add(0, units, weights * scale)
    assert torch.allclose(total, torch.ones_like(total), rtol=1e-12)
    assert config.why_output_not_preserved() is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"num_experts": 3, "expert_ratio": 1 / 3}, None),
        ({"top_k": 4}, None),
        ({"top_k": 1, "expert_ratio": 1.0}, None),
        ({"top_k": 1}, "top_k = 1 of 4"),
        ({"expert_ratio": 0.125}, "drops hidden units"),
    ],
)
def test_what_cannot_be_preserved(settings, reason):
    found = layout(**settings).why_output_not_preserved()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("top_k", "dense", "active"), [(None, True, 4), (4, True, 4), (3, False, 3), (1, False, 1)])
def test_dense_and_active(top_k, dense, active):
    assert (layout(top_k=top_k).has_dense_routing, layout(top_k=top_k).num_active_experts) == (dense, active)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("num_experts", value) for value in (0, -1, 2.0, "4", True, None)],
        *[("top_k", value) for value in (0, 5, 1.0, True)],
        *[("router_width", value) for value in (0, None)],
        *[("norm", value) for value in ("expert", None, "Task")],
        *[("expert_ratio", value) for value in (-0.25, math.nan, math.inf, "1", None)],
        *[("routing_scale", value) for value in (0, -1, math.nan, "1")],
    ],
)
def test_a_value_out_of_its_range_raises(field, value):
    good = dict(num_experts=4, top_k=2, expert_ratio=0.25, norm="task", routing_scale=4.0, router_width=16)
    with pytest.raises(ValueError, match=f"{field} must be .*but got"):
        ExpertConfig(**{**good, field: value})
