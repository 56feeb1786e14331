"""The specification itself: its derivatives, and that it is the stock feed-forward where the two meet."""

import pytest
import torch
import torch.nn.functional as F

from mtu_kernels import Routing, moe_ffn, reference

from .moe_ffn_cases import Sizes, make_problem

SMALL = Sizes(B=2, L=2, D=3, E=3, F=2)


def flat(function, problem):
    """The function of its differentiable tensors alone."""

    def call(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, weights):
        experts = type(problem.experts)(w_in, b_in, w_out, b_out, problem.experts.num_experts)
        routing = Routing(weights, problem.routing.indices)
        return function(x, type(problem.norm)(norm_weight, norm_bias), experts, routing, eps=problem.eps)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("expert_bias", [False, True], ids=["bias", "expert_bias"])
@pytest.mark.parametrize("expert_norm", [False, True], ids=["norm", "expert_norm"])
@pytest.mark.parametrize("sizes", [SMALL, SMALL._replace(K=2)], ids=["dense", "top2"])
def test_gradients_against_finite_differences(sizes, expert_norm, expert_bias):
    problem = make_problem(0, sizes, dtype=torch.float64, expert_norm=expert_norm, expert_bias=expert_bias)
    problem = problem.requires_grad()
    assert torch.autograd.gradcheck(flat(reference.moe_ffn, problem), problem.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SMALL, SMALL._replace(K=2)], ids=["dense", "top2"])
def test_eager_has_second_derivatives(sizes):
    problem = make_problem(0, sizes, dtype=torch.float64, expert_norm=True, expert_bias=True).requires_grad()
    eager = flat(lambda *args, eps: moe_ffn(*args, eps=eps, backend="eager"), problem)
    assert torch.autograd.gradgradcheck(eager, problem.tensors)


def test_one_expert_of_weight_one_is_the_stock_feed_forward():
    problem = make_problem(0, Sizes(E=1), dtype=torch.float64)
    x, norm, experts, _ = problem.arguments
    y = reference.moe_ffn(x, norm, experts, Routing(torch.ones(3, 1, dtype=torch.float64)), eps=problem.eps)
    for b in range(3):
        x_hat = F.layer_norm(x[b], (16,), norm.weight[b], norm.bias[b], problem.eps)
        u, g = F.linear(x_hat, experts.w_in, experts.b_in).chunk(2, dim=-1)
        torch.testing.assert_close(y[b], F.linear(u * F.gelu(g), experts.w_out, experts.b_out))


def test_split_in_equal_weights_of_one_is_the_unsplit_feed_forward():
    whole = make_problem(0, Sizes(E=1, F=24), dtype=torch.float64)
    split = whole.experts._replace(num_experts=4)
    ones = torch.ones(3, 4, dtype=torch.float64)
    expected = reference.moe_ffn(whole.x, whole.norm, whole.experts, Routing(ones[:, :1]))
    torch.testing.assert_close(reference.moe_ffn(whole.x, whole.norm, split, Routing(ones)), expected)


def test_a_shared_bias_does_not_depend_on_the_weights():
    problem = make_problem(0, dtype=torch.float64)
    nothing = Routing(torch.zeros_like(problem.routing.weights))
    y = reference.moe_ffn(problem.x, problem.norm, problem.experts, nothing)
    assert torch.equal(y, problem.experts.b_out.expand_as(y))


def test_expert_biases_are_weighed():
    problem = make_problem(0, dtype=torch.float64, expert_bias=True)
    experts = problem.experts._replace(w_out=torch.zeros_like(problem.experts.w_out))
    y = reference.moe_ffn(problem.x, problem.norm, experts, problem.routing)
    torch.testing.assert_close(y, (problem.routing.weights @ experts.b_out)[:, None].expand_as(y))


def test_each_sample_is_what_it_is_alone():
    problem = make_problem(0, Sizes(K=2), dtype=torch.float64, expert_norm=True, expert_bias=True)
    x, norm, experts, (weights, indices) = problem.arguments
    y = reference.moe_ffn(*problem.arguments)
    for b in range(3):
        alone = Routing(weights[b : b + 1], indices[b : b + 1])
        norm_b = type(norm)(norm.weight[b : b + 1], norm.bias[b : b + 1])
        assert torch.equal(reference.moe_ffn(x[b : b + 1], norm_b, experts, alone)[0], y[b])
