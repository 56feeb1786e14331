"""The registered operators: schemas, fakes, autograd, FLOP formulas. Later backends join by their name."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mtu_kernels import available_backends, moe_ffn

from .moe_ffn_cases import Sizes, make_problem

OP_BACKENDS = [name for name in available_backends() if name != "eager"]
FORMS = {
    "dense": (Sizes(), {}),
    "top2": (Sizes(K=2), {}),
    "dense_per_expert": (Sizes(), {"expert_norm": True, "expert_bias": True}),
    "top2_per_expert_low": (Sizes(K=2), {"expert_norm": True, "expert_bias": True, "dtype": torch.bfloat16}),
    "no_samples": (Sizes(B=0), {}),
    "no_tokens": (Sizes(L=0, K=1), {}),
}


def ops_of(backend):
    return [getattr(torch.ops.mtu_kernels, f"moe_ffn_{backend}{s}").default for s in ("", "_train", "_backward")]


@pytest.mark.parametrize(("sizes", "options"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_registration(backend, sizes, options):
    inference, train, backward = ops_of(backend)
    problem = make_problem(0, sizes, **options)
    for op in (inference, train):
        torch.library.opcheck(op, problem.op_arguments)
        torch.library.opcheck(op, problem.requires_grad().op_arguments)
    _, *saved = train(*problem.op_arguments)
    for expert_grads in (True, False):
        arguments = (problem.grad_y, *problem.op_arguments[:9], *saved, problem.experts.num_experts, expert_grads)
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_outputs_are_contiguous_whatever_the_inputs(backend):
    """Fakes promise contiguous outputs, and code compiled with them relies on it."""
    inference, train, backward = ops_of(backend)
    problem = make_problem(0, Sizes(K=2), expert_norm=True, expert_bias=True)
    problem = problem.map(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t)
    torch.library.opcheck(inference, problem.op_arguments)
    torch.library.opcheck(train, problem.op_arguments)
    y, *saved = train(*problem.op_arguments)
    arguments = (problem.grad_y, *problem.op_arguments[:9], *saved, problem.experts.num_experts, True)
    torch.library.opcheck(backward, arguments)
    assert all(t.is_contiguous() for t in (y, *saved, *backward(*arguments)))


@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_what_training_saves(backend):
    _, train, _ = ops_of(backend)
    problem = make_problem(0, Sizes(K=2), dtype=torch.float64)
    _, hidden, mean, rstd = train(*problem.op_arguments)
    x, norm, experts, routing = problem.arguments
    torch.testing.assert_close(mean, x.mean(dim=-1))
    torch.testing.assert_close(rstd, (x.var(dim=-1, correction=0) + problem.eps).rsqrt())
    x_hat = F.layer_norm(x, (16,)) * norm.weight[:, None] + norm.bias[:, None]
    z = F.linear(x_hat, experts.w_in, experts.b_in).view(3, -1, 2, 4, 6)
    for b in range(3):
        torch.testing.assert_close(hidden[b].view(-1, 2, 2, 6), z[b][:, :, routing.indices[b]])


@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_inference_saves_nothing_and_training_is_chosen_by_grad_mode(backend):
    problem = make_problem(0)

    def operators(problem):
        with torch.profiler.profile() as profile:
            moe_ffn(*problem.arguments, backend=backend)
        return {event.name for event in profile.events() if event.name.startswith("mtu_kernels::")}

    assert operators(problem) == {f"mtu_kernels::moe_ffn_{backend}"}
    assert operators(problem.requires_grad()) == {f"mtu_kernels::moe_ffn_{backend}_train"}
    with torch.no_grad():
        assert operators(problem.requires_grad()) == {f"mtu_kernels::moe_ffn_{backend}"}


@pytest.mark.parametrize("recompute", [False, True], ids=["save", "recompute"])
@pytest.mark.parametrize("backend", OP_BACKENDS)
def test_a_second_derivative_is_refused_not_zero(backend, recompute):
    problem = make_problem(0).requires_grad()
    y = moe_ffn(*problem.arguments, backend=backend, recompute=recompute)
    (grad,) = torch.autograd.grad(y.square().sum(), problem.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use backend='eager'"):
        grad.sum().backward()


def flops(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("expert_norm", [False, True], ids=["norm", "expert_norm"])
@pytest.mark.parametrize("K", [None, 1, 2, 4])
@pytest.mark.parametrize("backend", available_backends())
def test_flops_are_those_of_the_stock_feed_forward_times_k_over_e(backend, K, expert_norm):
    problem = make_problem(0, Sizes(K=K), expert_norm=expert_norm, expert_bias=True).requires_grad()
    x, _, experts, _ = problem.arguments

    def stock():
        u, g = F.linear(x, experts.w_in, experts.b_in).chunk(2, dim=-1)
        return F.linear(u * F.gelu(g), experts.w_out)

    B, L, D = x.shape
    H = experts.w_out.shape[1]
    expected, _ = flops(stock)
    assert expected == 2 * B * L * D * (2 * H) + 2 * B * L * H * D
    expected = expected * (K or 4) // 4
    forward, y = flops(lambda: moe_ffn(*problem.arguments, eps=problem.eps, backend=backend))
    assert forward == expected
    assert flops(lambda: y.backward(problem.grad_y.detach()))[0] == 2 * expected
    y = moe_ffn(*problem.arguments, backend=backend, recompute=True)
    assert flops(lambda: y.backward(problem.grad_y.detach()))[0] > 2 * expected


@pytest.mark.parametrize("backend", available_backends())
def test_frozen_experts_cost_no_weight_gradients(backend):
    problem = make_problem(0).requires_grad()
    frozen = problem.experts._replace(**{k: getattr(problem.experts, k).detach() for k in problem.experts._fields[:4]})
    forward, y = flops(lambda: moe_ffn(problem.x, problem.norm, frozen, problem.routing, backend=backend))
    assert flops(lambda: y.backward(problem.grad_y.detach()))[0] == forward
