"""Every backend against the specification: values, gradients, edges, tracing."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtu_kernels import ExpertWeights, NormAffine, Routing, dense_weights, moe_ffn, reference

from .moe_ffn_cases import DENSE, SMALL, Problem, Sizes, assert_as_exact_as_eager, forward_and_gradients, make_problem
from .places import PLACES, SLOW_IF_INTERPRETED, Place, cases

TOP_2 = DENSE._replace(K=2)
EAGER = Place("eager", "cpu")


@pytest.fixture(params=SLOW_IF_INTERPRETED)
def place(request):
    return request.param


@pytest.fixture
def op(place):
    return place.op


@pytest.mark.parametrize("expert_bias", [False, True], ids=("bias", "expert_bias"))
@pytest.mark.parametrize("sizes", [DENSE, TOP_2], ids=("dense", "top2"))
@cases("float32", "low", "float16", places=PLACES)
def test_values_and_gradients(place, dtype, expert_norm, sizes, expert_bias):
    options = dict(dtype=dtype, expert_norm=expert_norm, expert_bias=expert_bias)
    assert_as_exact_as_eager(place.op, place.problems(sizes, **options))


@pytest.mark.parametrize("sizes", [DENSE, TOP_2], ids=("dense", "top2"))
@pytest.mark.parametrize("x_is_float32", [False, True], ids=("low_x", "float32_x"))
@cases("low", "float16")
def test_float32_affines_and_routing_under_low_precision(place, dtype, expert_norm, x_is_float32, sizes):
    options = dict(dtype=dtype, x_dtype=torch.float32 if x_is_float32 else dtype, affine_dtype=torch.float32)
    problems = place.problems(sizes, expert_norm=expert_norm, expert_bias=True, **options)
    assert_as_exact_as_eager(place.op, problems)


def one_nan(y):
    return torch.where(torch.arange(y.numel()).view_as(y) == 5, float("nan"), y)


@pytest.mark.parametrize("spoil", [one_nan, lambda y: y * (1 + 2**-19), lambda y: y.roll(1, dims=1)])
def test_the_rule_itself_rejects(spoil):
    with pytest.raises(AssertionError, match="moe_ffn, y: "):
        assert_as_exact_as_eager(lambda *args, **options: spoil(moe_ffn(*args, **options)), EAGER.problems())


EDGE_SIZES = {
    "no_tokens": Sizes(L=0),
    "no_tokens_top2": Sizes(L=0, K=2),
    "no_samples": Sizes(B=0),
    "no_samples_top2": Sizes(B=0, K=2),
    "one_token": Sizes(L=1),
    "one_token_top1": Sizes(L=1, K=1),
    # A little more of each than fits the tiles of 32 rows, 16 columns and 16 steps in the interpreter.
    "odd": Sizes(B=2, L=33, D=17, E=3, F=9),
    "odd_top2": Sizes(B=2, L=33, D=17, E=3, F=9, K=2),
    "all_experts_by_index": Sizes(K=4),
    "one_expert": Sizes(E=1),
    "one_expert_by_index": Sizes(E=1, K=1),
    "one_hidden_unit_each": Sizes(F=1, K=1),
}


@pytest.mark.parametrize("sizes", EDGE_SIZES.values(), ids=EDGE_SIZES.keys())
@cases("float32", "low", halved=True)
def test_edge_sizes(place, dtype, expert_norm, sizes):
    options = dict(dtype=dtype, expert_norm=expert_norm, expert_bias=expert_norm)
    assert_as_exact_as_eager(place.op, place.problems(sizes, **options))


def mean_far_above_deviation(p: Problem) -> Problem:
    return p._replace(x=p.x + 100)


def variance_below_eps(p: Problem) -> Problem:
    return p._replace(x=p.x * 2**-10)


def constant_tokens(p: Problem) -> Problem:
    return p._replace(x=p.x[:, :, :1].expand_as(p.x).contiguous())


def large_eps(p: Problem) -> Problem:
    return p._replace(eps=0.1)


def one_expert_takes_all(p: Problem) -> Problem:
    weights = torch.zeros_like(p.routing.weights)
    weights[:, 0] = 1
    indices = None if p.routing.indices is None else torch.tensor([2, 1]).expand_as(p.routing.indices)
    return p._replace(routing=Routing(weights, indices))


def a_weight_is_zero(p: Problem) -> Problem:
    weights = p.routing.weights.clone()
    weights[0, 1] = 0
    return p._replace(routing=Routing(weights, p.routing.indices))


def negative_and_large_weights(p: Problem) -> Problem:
    return p._replace(routing=Routing(4 * p.routing.weights - 2, p.routing.indices))


def tasks_mixed_and_repeated(p: Problem) -> Problem:
    tasks = torch.tensor([1, 0, 1])
    indices = None if p.routing.indices is None else p.routing.indices[tasks]
    norm = type(p.norm)(*(t[tasks] for t in p.norm))
    return p._replace(norm=norm, routing=Routing(p.routing.weights[tasks], indices))


def nothing_contiguous(p: Problem) -> Problem:
    p = p.map(lambda t: t.repeat_interleave(2, dim=-1)[..., ::2].mT.contiguous().mT if t.dim() > 1 else t)
    p = p.map(lambda t: t.repeat_interleave(2)[::2] if t.dim() == 1 else t)
    indices = p.routing.indices
    return p._replace(routing=Routing(p.routing.weights, None if indices is None else indices.T.contiguous().T))


def everything_expanded(p: Problem) -> Problem:
    """One sample stands for all: expanded x, affines, routing, and a gradient that comes back expanded."""
    first = p._replace(x=p.x[:1].expand_as(p.x), grad_y=p.grad_y[:, :, :1].expand_as(p.grad_y))
    weights = p.routing.weights[:1].expand_as(p.routing.weights)
    indices = None if p.routing.indices is None else p.routing.indices[:1].expand_as(p.routing.indices)
    norm = type(p.norm)(*(t[:1].expand_as(t) for t in p.norm))
    return first._replace(norm=norm, routing=Routing(weights, indices))


def int64_indices(p: Problem) -> Problem:
    return p._replace(
        routing=Routing(p.routing.weights, None if p.routing.indices is None else p.routing.indices.long())
    )


LAYER_NORM_EDGES = (mean_far_above_deviation, variance_below_eps, constant_tokens, large_eps)
ROUTED_EDGES = (
    one_expert_takes_all, a_weight_is_zero, negative_and_large_weights, tasks_mixed_and_repeated, nothing_contiguous,
    everything_expanded,
)  # fmt: skip
EDGES = (*LAYER_NORM_EDGES, *ROUTED_EDGES)


# LayerNorm does not ask which experts follow it, and dense routing has no indices.
@pytest.mark.parametrize(
    ("edge", "sizes"),
    [
        *(pytest.param(edge, TOP_2, id=f"{edge.__name__}-top2") for edge in (*EDGES, int64_indices)),
        *(pytest.param(edge, DENSE, id=f"{edge.__name__}-dense") for edge in ROUTED_EDGES),
    ],
)
@cases("float32", "low", halved=True)
def test_edge_values(place, dtype, expert_norm, edge, sizes):
    options = dict(affine_dtype=torch.float32, expert_norm=expert_norm, expert_bias=expert_norm)
    problems = place.problems(sizes, dtype=dtype, **options)
    assert_as_exact_as_eager(place.op, [edge(p) for p in problems])


def right_index(dtype):
    """A wrong index is an error of order 1, rounding one of eps times the small condition of LayerNorm: any bound in
    between tells them apart, and sqrt(eps) is in the middle of it."""
    return torch.finfo(dtype).eps ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("place", SLOW_IF_INTERPRETED)
def test_every_shape(place):
    @settings(max_examples=16 if place.is_interpreter else 40, deadline=None, derandomize=True)
    @given(
        sizes=st.builds(
            Sizes,
            B=st.integers(0, 3), L=st.integers(0, 5), D=st.integers(1, 9), E=st.integers(1, 4), F=st.integers(1, 5),
        ),
        data=st.data(),
    )  # fmt: skip
    def check(sizes, data):
        sizes = sizes._replace(K=data.draw(st.none() | st.integers(1, sizes.E), label="K"))
        expert_norm, expert_bias, recompute = (data.draw(st.booleans()) for _ in range(3))
        problem = make_problem(1, sizes, dtype=place.exact, expert_norm=expert_norm, expert_bias=expert_bias)
        actual = forward_and_gradients(functools.partial(place.op, recompute=recompute), problem)
        exact = forward_and_gradients(reference.moe_ffn, problem)
        for a, b in zip(actual, exact, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            assert ((a - b).abs() <= right_index(place.exact) * scale).all()

    check()


def test_all_experts_by_index_is_dense(place, op):
    dense = make_problem(0, dtype=place.exact, expert_norm=True, expert_bias=True)
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
    by_index = Routing(dense.routing.weights.gather(1, order), order.int())
    assert torch.equal(dense_weights(by_index, 4), dense.routing.weights)
    expected = forward_and_gradients(op, dense)
    actual = forward_and_gradients(op, dense._replace(routing=by_index))
    actual[-1] = dense_weights(Routing(actual[-1], order), 4)
    for a, b in zip(actual, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert ((a - b).abs() <= right_index(place.exact) * scale).all()


def test_the_gradient_of_a_shared_bias_is_rounded_once(place, op):
    problem = make_problem(0, dtype=place.low)
    gradient = forward_and_gradients(op, problem)[7].double()
    exact = problem.grad_y.double().sum(dim=(0, 1))
    # B·L = 39 numbers of at most sqrt(3) are added in float32.
    sums = 39**2 * 3**0.5 * 2**-24
    assert ((gradient - exact).abs() <= sums + torch.finfo(place.low).eps / 2 * (exact.abs() + sums)).all()


@pytest.mark.parametrize("expert_norm", [False, True], ids=("norm", "expert_norm"))
def test_weight_zero_is_exactly_nothing(op, expert_norm):
    problem = make_problem(0, expert_norm=expert_norm, expert_bias=True)
    problem.routing.weights[:, 2] = 0
    outputs = forward_and_gradients(op, problem)
    problem.experts.w_out[:, 12:18] += 1e4
    problem.experts.b_out[2] += 1e4
    assert torch.equal(op(*problem.arguments), outputs[0])
    _, _, _, _, d_w_in, d_b_in, d_w_out, d_b_out, d_weights = outputs
    for grad in (d_w_in.view(2, 4, 6, 16)[:, 2], d_b_in.view(2, 4, 6)[:, 2], d_w_out[:, 12:18], d_b_out[2]):
        assert (grad == 0).all()
    # The weight itself still learns.
    assert (d_weights[:, 2] != 0).all()


@pytest.mark.parametrize("expert_norm", [False, True], ids=("norm", "expert_norm"))
def test_inactive_experts_are_not_looked_at(op, expert_norm):
    problem = make_problem(0, TOP_2, expert_norm=expert_norm, expert_bias=True)
    problem = problem._replace(routing=Routing(problem.routing.weights, torch.tensor([[3, 0], [0, 3], [3, 1]])))
    expected = forward_and_gradients(op, problem)
    problem.experts.w_in.view(2, 4, 6, 16)[:, 2] = float("nan")
    problem.experts.w_out[:, 12:18] = float("nan")
    problem.experts.b_out[2] = float("nan")
    actual = forward_and_gradients(op, problem)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert (actual[4].view(2, 4, 6, 16)[:, 2] == 0).all()
    assert (actual[6][:, 12:18] == 0).all()


@pytest.mark.parametrize("sizes", [DENSE, TOP_2], ids=("dense", "top2"))
def test_recompute_changes_nothing(op, sizes):
    problem = make_problem(0, sizes, expert_norm=True, expert_bias=True, eps=0.1)
    plain = forward_and_gradients(op, problem)
    again = forward_and_gradients(functools.partial(op, recompute=True), problem)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recompute_saves_inputs_only(op):
    problem = make_problem(0).requires_grad()
    inputs = {t.data_ptr() for t in problem.tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None):
        op(*problem.arguments, recompute=True)
        # At 0 lie tensors without elements, by which torch 2.11 marks what is computed again.
        assert set(saved) - {0} <= inputs
        op(*problem.arguments)
        assert not set(saved) - {0} <= inputs


@pytest.mark.parametrize("frozen", ["x", "norm", "experts", "routing"])
def test_gradients_of_some_inputs(op, frozen):
    names = ("x", "norm", "norm", "experts", "experts", "experts", "experts", "routing")
    problem = make_problem(0, expert_bias=True)
    expected = forward_and_gradients(op, problem)[1:]
    problem = problem.requires_grad()
    for name, tensor in zip(names, problem.tensors, strict=True):
        tensor.requires_grad_(name != frozen)
    op(*problem.arguments).backward(problem.grad_y.detach())
    for name, tensor, grad in zip(names, problem.tensors, expected, strict=True):
        assert tensor.grad is None if name == frozen else torch.equal(tensor.grad, grad)


def test_autocast_casts_the_experts_alone(place, op):
    problem = make_problem(0, expert_bias=True)
    with torch.autocast(place.device, dtype=place.low):
        actual = forward_and_gradients(op, problem._replace(grad_y=problem.grad_y.to(place.low)))
    experts = type(problem.experts)(*(t.to(place.low) for t in problem.experts[:4]), 4)
    expected = forward_and_gradients(op, problem._replace(experts=experts, grad_y=problem.grad_y.to(place.low)))
    assert [t.dtype for t in actual] == [place.low] + [torch.float32] * 8
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_autocast_leaves_float64_alone():
    problem = make_problem(0, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = moe_ffn(*problem.arguments)
    assert torch.equal(actual, moe_ffn(*problem.arguments))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("recompute", [False, True], ids=("save", "recompute"))
@pytest.mark.parametrize("K", [None, 2], ids=("dense", "top2"))
@pytest.mark.parametrize("expert_norm", [False, True], ids=("norm", "expert_norm"))
def test_traces_in_one_graph_for_all_routings(place, expert_norm, K, recompute):
    # Of four choices any three in all combinations: the fourth follows from them.
    residual = expert_norm ^ recompute ^ (K is None)
    sizes = SMALL._replace(K=K)
    op = functools.partial(place.op, recompute=recompute, residual=residual)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for problem in EAGER.problems(sizes, expert_norm=expert_norm, expert_bias=expert_norm)[:2]:
            actual, expected = (forward_and_gradients(f, problem) for f in (compiled, op))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [DENSE, TOP_2], ids=("dense", "top2"))
def test_compiles(place, sizes):
    compiled = torch.compile(place.op, fullgraph=True)
    problems = place.problems(sizes, dtype=place.low, affine_dtype=torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_as_exact_as_eager(compiled, problems)


@pytest.mark.slow
def test_traces_under_autocast(place, op):
    problem = make_problem(0)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast(place.device, dtype=place.low):
        assert torch.equal(compiled(*problem.arguments), op(*problem.arguments))


class Exportable(torch.nn.Module):
    """Weights as parameters; x, affines and routing as run-time inputs."""

    def __init__(self, problem: Problem, backend: str):
        super().__init__()
        self.w_in, self.b_in, self.w_out, self.b_out = (torch.nn.Parameter(t) for t in problem.experts[:4])
        self.num_experts, self.backend = problem.experts.num_experts, backend

    def forward(self, x, norm_weight, norm_bias, weights, indices):
        experts = ExpertWeights(self.w_in, self.b_in, self.w_out, self.b_out, self.num_experts)
        norm, routing = NormAffine(norm_weight, norm_bias), Routing(weights, indices)
        return moe_ffn(x, norm, experts, routing, backend=self.backend, recompute=True)


@pytest.mark.parametrize(
    "strict", [pytest.param(False, id="non_strict"), pytest.param(True, id="strict", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sizes", [DENSE, TOP_2], ids=("dense", "top2"))
@pytest.mark.parametrize("backend", [param.values[0].backend for param in PLACES if not param.marks])
def test_exports_with_dynamic_batch_and_length(backend, sizes, strict):
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    row = {0: batch}
    shapes = ({0: batch, 1: length}, row, row, row, row if sizes.K else None)
    problem = make_problem(0, sizes, expert_bias=True)
    module = Exportable(problem, backend)
    inputs = (problem.x, *problem.norm, *problem.routing)
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    other = make_problem(1, sizes._replace(B=5, L=11))
    inputs = (other.x, *other.norm, *other.routing)
    assert torch.equal(exported.module()(*inputs), module(*inputs))
    targets = [node.target for node in exported.graph.nodes]
    namespaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    # For foreign runtimes: "eager" leaves nothing but PyTorch's own operators, and no checkpoint either.
    assert namespaces == {"aten"} if backend == "eager" else "mtu_kernels" in namespaces
    assert not any(isinstance(target, torch._ops.HigherOrderOperator) for target in targets)
