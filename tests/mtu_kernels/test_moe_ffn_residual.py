"""x + y of every backend against the specification."""

import functools

import pytest
import torch

from mtu_kernels import warmup

from .moe_ffn_cases import DENSE, Sizes, assert_as_exact_as_eager, forward_and_gradients, make_problem
from .places import ADDING_PLACES, PLACES, cases

TOP_2 = DENSE._replace(K=2)
EDGE_SIZES = {"no_tokens": Sizes(L=0), "no_samples": Sizes(B=0, K=2), "one_token": Sizes(L=1)}


def check_residual(place, dtype, expert_norm, sizes):
    options = dict(dtype=dtype, affine_dtype=torch.float32, expert_norm=expert_norm, expert_bias=expert_norm)
    assert_as_exact_as_eager(place.op, place.problems(sizes, **options), residual=True)


@pytest.mark.parametrize("sizes", [DENSE, TOP_2], ids=("dense", "top2"))
@cases("float32", "low", halved=True)
def test_residual(place, dtype, expert_norm, sizes):
    check_residual(place, dtype, expert_norm, sizes)


@pytest.mark.parametrize("sizes", EDGE_SIZES.values(), ids=EDGE_SIZES.keys())
@cases("float32", "low", places=ADDING_PLACES)
def test_residual_of_edge_sizes(place, dtype, expert_norm, sizes):
    check_residual(place, dtype, expert_norm, sizes)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1, :1].expand_as(x),
    "far_from_zero": lambda x: x + 100,
}


@pytest.mark.slow
@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS.keys())
@cases("low", places=ADDING_PLACES)
def test_residual_of_any_layout(place, dtype, expert_norm, lay_out):
    problems = place.problems(dtype=dtype, affine_dtype=torch.float32, expert_norm=expert_norm)
    problems = [p._replace(x=lay_out(p.x), grad_y=lay_out(p.grad_y)) for p in problems]
    assert_as_exact_as_eager(place.op, problems, residual=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_residual_of_float32_keeps_its_precision(place):
    """As PyTorch's own sum of x and a y of low precision does."""
    problems = place.problems(dtype=place.low, x_dtype=torch.float32)
    problems = [p._replace(grad_y=p.grad_y.float()) for p in problems]
    assert_as_exact_as_eager(place.op, problems, residual=True)
    for p in problems:
        assert torch.equal(place.op(*p.arguments, residual=True), p.x + place.op(*p.arguments))
        with torch.autocast(place.device, dtype=place.low):
            assert place.op(*p.arguments, residual=True).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_residual_is_the_same_however_gradients_are_prepared(place):
    op = place.op
    problem = make_problem(0, TOP_2, dtype=place.low)
    x = problem.x.clone()
    y = op(*problem.arguments, residual=True)
    options = ({}, {"recompute": True})
    first, second = (forward_and_gradients(functools.partial(op, residual=True, **o), problem) for o in options)
    assert torch.equal(y, first[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # y is memory of its own, and x stays what it was.
    y.zero_()
    assert torch.equal(problem.x, x)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_residual_passes_no_gradient_to_a_frozen_x(place):
    problem = make_problem(0, dtype=place.exact).requires_grad()
    expected = forward_and_gradients(place.op, problem)[2:]
    problem.x.requires_grad_(False)
    trained = problem.tensors[1:]
    grads = torch.autograd.grad(place.op(*problem.arguments, residual=True), trained, problem.grad_y.detach())
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_warmup_takes_what_the_call_takes(place):
    problem = place.move(make_problem(0))
    warmup(*problem.arguments, backend=place.backend, residual=True, recompute=True, backward=True)
    assert all(t.grad is None for t in problem.tensors)
