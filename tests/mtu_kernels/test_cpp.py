"""What is particular to the backend "cpp": instruction sets, threads, weights that change, odd memory, odd numbers."""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from mtu_kernels import ExpertWeights, NormAffine, Routing, available_backends, cpp, moe_ffn
from mtu_kernels.arguments import Options

from .moe_ffn_cases import (
    Sizes,
    assert_all_as_exact_as_eager,
    assert_as_exact_as_eager,
    forward_and_gradients,
    make_problem,
)

pytestmark = pytest.mark.skipif("cpp" not in available_backends(), reason=f"the extension: {cpp.why_not_installed()}")


def cpp_at(level, *arguments, **options):
    """`mtu_kernels.moe_ffn` of the backend "cpp" with the kernels of one level."""
    return cpp.moe_ffn(*arguments, Options(**options), level=level)


LEVELS = [pytest.param(level, id=level) for level in cpp.instruction_sets()]
AT_EACH_LEVEL = {level: functools.partial(cpp_at, level) for level in cpp.instruction_sets()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMS = {
    "dense": (None, {}),
    "top2": (2, {}),
    "dense_per_expert": (None, {"expert_norm": True, "expert_bias": True}),
    "top2_per_expert": (2, {"expert_norm": True, "expert_bias": True}),
}
# Whole tiles of every level, tiles with rests in every direction, and less than one of each.
SIZES = {
    "whole": Sizes(B=2, L=48, D=64, E=3, F=64),
    "rests": Sizes(B=3, L=37, D=77, E=3, F=41),
    "deep": Sizes(B=1, L=33, D=360, E=4, F=96),
    "odd_experts": Sizes(B=2, L=20, D=64, E=3, F=41),
    "many_experts": Sizes(B=2, L=17, D=32, E=40, F=1),
    "single": Sizes(B=16, L=1, D=5, E=3, F=3),
}
SLOW_SIZES = ("deep", "many_experts", "single")
cpp_op = functools.partial(moe_ffn, backend="cpp")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes", ["whole", "rests", "odd_experts", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SIZES)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_is_as_exact_as_eager(dtype, sizes, form):
    K, options = FORMS[form]
    if sizes == "many_experts" and K:
        K = 39
    problems = [
        make_problem(seed, SIZES[sizes]._replace(K=K), dtype=DTYPES[dtype], affine_dtype=torch.float32, **options)
        for seed in range(12 if sizes == "single" else 6)
    ]
    assert_all_as_exact_as_eager(AT_EACH_LEVEL, problems)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "top2_per_expert"])
@pytest.mark.parametrize("sizes", ["whole", "rests", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_adds_the_residual(dtype, sizes, form):
    K, options = FORMS[form]
    options = dict(dtype=DTYPES[dtype], affine_dtype=torch.float32, **options)
    problems = [make_problem(seed, SIZES[sizes]._replace(K=K), **options) for seed in range(6)]
    assert_all_as_exact_as_eager(AT_EACH_LEVEL, problems, residual=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("level", LEVELS)
def test_residual_is_rounded_with_y_and_not_after_it(level, dtype):
    """Biases and routing weights are such that y has more digits than the dtype, and float32 all of them."""
    low = DTYPES[dtype]
    problem = make_problem(0, SIZES["rests"]._replace(E=2), dtype=low, affine_dtype=torch.float32, expert_bias=True)
    grid = 2.0**-7
    x, b_out = ((t.double() / grid).round() * grid for t in (problem.x, problem.experts.b_out))
    experts = problem.experts._replace(w_out=torch.zeros_like(problem.experts.w_out), b_out=b_out.to(low))
    routing = Routing(torch.tensor([[1.0, 2.0**-9]]).repeat(3, 1))
    y = (routing.weights.double() @ b_out)[:, None]
    actual = cpp_at(level, x.to(low), problem.norm, experts, routing, residual=True)
    assert torch.equal(actual, (x + y).to(low))
    assert not torch.equal(actual, x.to(low) + y.to(low))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_recomputes_what_it_saved(level):
    problem = make_problem(0, SIZES["rests"]._replace(K=2), dtype=torch.bfloat16, expert_norm=True)
    saved, recomputed = (
        forward_and_gradients(functools.partial(cpp_at, level, recompute=recompute), problem)
        for recompute in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))


def test_the_best_level_is_the_default():
    problem = make_problem(0, SIZES["rests"], dtype=torch.bfloat16)
    best = forward_and_gradients(functools.partial(cpp_at, cpp.instruction_sets()[0]), problem)
    assert all(torch.equal(a, b) for a, b in zip(best, forward_and_gradients(cpp_op, problem), strict=True))
    assert cpp.instruction_sets()[-1] == "portable"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
# Few tokens: threads share weights. Many: each takes tokens of its own.
@pytest.mark.parametrize("sizes", [Sizes(2, 37, 40, 4, 24), Sizes(3, 700, 24, 4, 20)], ids=("few", "many"))
@pytest.mark.parametrize("form", FORMS)
def test_threads(threads, form, sizes, dtype):
    K, options = FORMS[form]
    problem = make_problem(0, sizes._replace(K=K), dtype=DTYPES[dtype], **options)
    op = functools.partial(cpp_op, residual=True)
    results = {}
    for count in (1, 2, 5):
        threads(count)
        first, second = (forward_and_gradients(op, problem) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results[count] = first[0]
    # y itself does not even depend on their number.
    assert torch.equal(results[1], results[2])
    assert torch.equal(results[1], results[5])
    assert_as_exact_as_eager(cpp_op, [problem])


class Layer(nn.Module):
    """Expert weights as a model holds them."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        experts = make_problem(seed, SIZES["whole"], dtype=dtype).experts
        self.num_experts = experts.num_experts
        for name in ("w_in", "b_in", "w_out", "b_out"):
            setattr(self, name, nn.Parameter(getattr(experts, name)))

    def forward(self, problem):
        experts = ExpertWeights(self.w_in, self.b_in, self.w_out, self.b_out, self.num_experts)
        with torch.no_grad():
            return cpp_op(problem.x, problem.norm, experts, problem.routing)


def changed_in_place(layer, other):
    with torch.no_grad():
        layer.w_in.copy_(other.w_in)
        layer.w_out.copy_(other.w_out)


def changed_behind_autograd(layer, other):
    layer.w_in.data.copy_(other.w_in)
    layer.w_out.data.copy_(other.w_out)


def changed_in_one_element(layer, other):
    layer.w_in.data[70, 33] += 5


def loaded(layer, other):
    layer.load_state_dict(other.state_dict())


def moved(layer, other):
    layer.to(torch.float64)
    with torch.no_grad():
        layer.w_out.mul_(2)
    layer.to(other.w_out.dtype)


def reassigned(layer, other):
    layer.w_in = nn.Parameter(other.w_in.detach().clone())


@pytest.mark.parametrize(
    "change", [changed_in_place, changed_behind_autograd, changed_in_one_element, loaded, moved, reassigned]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
def test_weights_that_change_are_noticed(dtype, change):
    problem = make_problem(0, SIZES["whole"], dtype=dtype)
    layer, other = Layer(1, dtype), Layer(2, dtype)
    before = layer(problem)
    assert torch.equal(layer(problem), before)
    change(layer, other)
    after = layer(problem)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(layer)(problem))


def unaligned(tensor: Tensor) -> Tensor:
    """The tensor one element after an aligned address, amid NaN."""
    if not tensor.is_floating_point():
        return tensor
    memory = tensor.new_full((tensor.numel() + 130,), torch.nan)
    inner = memory[65 : 65 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """The tensor as every other column of another, amid NaN, with its dimensions in reverse order in memory."""
    if not tensor.is_floating_point():
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    memory = tensor.new_full((*reversed(tensor.shape[1:]), 2 * tensor.shape[0]), torch.nan)
    inner = memory[..., ::2].permute(*reversed(range(tensor.dim())))
    return inner.copy_(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("lay_out", [unaligned, strided])
@pytest.mark.parametrize("sizes", ["rests", "odd_experts"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_memory_of_any_layout(level, dtype, form, sizes, lay_out):
    """What lies around the numbers (NaN) is never read, or its product with a zero would show."""
    K, options = FORMS[form]
    op = functools.partial(cpp_at, level)
    problem = make_problem(0, SIZES[sizes]._replace(K=K), dtype=DTYPES[dtype], **options)
    moved = problem.map(lay_out)
    if K:
        moved = moved._replace(routing=moved.routing._replace(indices=lay_out(problem.routing.indices)))
    x, norm, experts, routing = moved.arguments
    for residual in (False, True):
        actual, expected = (op(*p.arguments, residual=residual) for p in (moved, problem))
        assert torch.equal(actual, expected)
    leaves = [t.requires_grad_() for t in moved.tensors]
    gradients = torch.autograd.grad(op(x, norm, experts, routing), leaves, moved.grad_y)
    expected = forward_and_gradients(op, problem)[1:]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("sizes", ["whole", "odd_experts"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_experts_of_no_sample_are_never_read(level, dtype, sizes):
    problem = make_problem(0, SIZES[sizes]._replace(K=2), dtype=DTYPES[dtype], expert_bias=True)
    problem.routing.indices[:] = torch.tensor([2, 0])
    F = SIZES[sizes].F
    w_in, b_in, w_out, b_out, E = problem.experts
    spoilt = ExpertWeights(*(t.clone() for t in (w_in, b_in, w_out, b_out)), E)
    for rows in (slice(F, 2 * F), slice((E + 1) * F, (E + 2) * F)):
        spoilt.w_in[rows], spoilt.b_in[rows] = torch.nan, torch.nan
    spoilt.w_out[:, F : 2 * F], spoilt.b_out[1] = torch.nan, torch.nan
    op = functools.partial(cpp_at, level)
    # The gradient of a routing weight that is not there is not asked for, so b_out enters by its rows alone.
    y = op(problem.x, problem.norm, spoilt, problem.routing)
    assert torch.equal(y, op(*problem.arguments))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_that_of_torch(level, dtype):
    """Every number of 16 bits, its neighbours in float32 and what lies halfway between two of them; NaN as well."""
    low = DTYPES[dtype]
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(low)
    bits = numbers.float().view(torch.int32)[:, None]
    half = 1 << (15 if low == torch.bfloat16 else 12)
    # Sign and magnitude: adding to the bits moves away from zero.
    near = (bits + torch.tensor([0, 1, half - 1, half, half + 1])).view(torch.float32).flatten()
    near = torch.cat([near, torch.tensor([65519.0, 65520.0, 3e38, 2.0**-25, 2.0**-24 * 1.5, 2.0**-26])])
    bits_of_nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for x in (numbers, near, bits_of_nan):
        D = len(x)
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        arguments = x[None, None], zero, one, torch.ones(1, 1, D), torch.zeros(1, 1, D), torch.empty(0, dtype=low)
        actual = torch.ops.mtu_kernels.cpp_normalize(*arguments, cpp.instruction_sets().index(level))[0, 0, 0]
        expected = x.to(low)
        if low == torch.bfloat16 and level in ("amx", "avx512_bf16"):
            # The instruction takes numbers below the normal ones for zero.
            expected = torch.where(x.abs() < torch.finfo(low).tiny, 0.0, expected)
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        assert same.all(), f"{x[~same][:5]} became {actual[~same][:5]}, not {expected[~same][:5]}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_numbers_stay_alone(level, dtype):
    problem = make_problem(0, SIZES["rests"], dtype=DTYPES[dtype])
    x = problem.x.clone()
    x[1, 5, 3], x[2, 36, 0] = torch.nan, torch.inf
    op = functools.partial(cpp_at, level)
    y, expected = op(x, *problem.arguments[1:]), op(*problem.arguments)
    spoilt = y.isnan().any(dim=-1)
    assert spoilt.nonzero().tolist() == [[1, 5], [2, 36]]
    assert torch.equal(y[~spoilt], expected[~spoilt])


@pytest.mark.parametrize("level", LEVELS)
def test_first_numbers_unlike_the_others(level):
    """Sums are taken about a guess of the mean from a row's first numbers. Where it is far off, squares cancel."""
    problem = make_problem(0, Sizes(B=1, L=3, D=1500, E=1, F=1))
    problem.x[..., :16] += 1000
    *_, mean, rstd = torch.ops.mtu_kernels.cpp_train_at(
        cpp.instruction_sets().index(level), False, *problem.op_arguments
    )
    x = problem.x.double()
    exact_mean, exact_rstd = x.mean(dim=-1), (x.var(dim=-1, correction=0) + problem.eps).rsqrt()
    # Some ulps; about the guess, they would count 1500 / 16 times.
    for actual, exact in ((mean, exact_mean), (rstd, exact_rstd)):
        assert ((actual - exact).abs() <= 2**-21 * exact.abs()).all()


GATES = [-3e38, -1e37, -1e30, -100.0, -13.5, -13.0, -8.0, -5.6, -4.3, 0.0, 4.3, 5.6, 13.0, 14.0, 100.0, 1e30]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gates_of_any_size(level, dtype):
    """Where Φ is 0 or 1 to the last bit, in its tail, where squares overflow; and the gradients there."""
    dtype = DTYPES[dtype]
    gates = torch.tensor([g for g in GATES if abs(g) < torch.finfo(dtype).max]).to(dtype)
    D, F = 16, len(gates)
    b_in = torch.cat([torch.full((F,), 0.5, dtype=dtype), gates]).requires_grad_()
    w_out = torch.eye(D, F, dtype=dtype)
    experts = ExpertWeights(torch.zeros(2 * F, D, dtype=dtype), b_in, w_out, torch.zeros(D, dtype=dtype), 1)
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = NormAffine(torch.ones(1, D), torch.zeros(1, D))
    y = cpp_at(level, x, norm, experts, Routing(torch.ones(1, 1)))
    (gradient,) = torch.autograd.grad(y.sum(), b_in)
    exact_gates = gates.double().requires_grad_()
    # Not by torch's gelu, which has no digits left in the tail even in float64.
    exact = 0.5 * exact_gates * torch.special.erfc(-exact_gates / math.sqrt(2)) / 2
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_gates)
    ulp = torch.finfo(dtype).eps
    # float32: Φ has a relative error of some ulps, in its tail that of exp(-g²/2): half an ulp of g²/2 is as many ulps.
    relative = 2 * ulp + 1e-6 + 6e-8 * gates.double().square().clamp(max=200)
    # bfloat16: the polynomial is off by 1.1e-5 at most, times |g| where it is not 0 or 1.
    absolute = 1.1e-5 * gates.abs().clamp(max=6).double() if dtype == torch.bfloat16 else torch.finfo(dtype).tiny
    for actual, expected in ((y[0, 0, :F], exact), (gradient[F:], exact_gradient)):
        error = (actual.double() - expected).abs()
        assert (error <= absolute + relative * expected.abs()).all(), (actual, expected)
