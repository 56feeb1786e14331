"""What is particular to the backend "cpp": instruction sets, threads, weights that change, odd memory, absence."""

import copy
import functools
import logging

import pytest
import torch
from torch import Tensor, nn

from mtu_kernels import ExpertWeights, NormAffine, Routing, available_backends, check_backend, cpp, moe_ffn
from mtu_kernels.moe_ffn import _fastest

from .moe_ffn_cases import DENSE, Sizes, assert_as_exact_as_eager, forward_and_gradients, make_problem

pytestmark = pytest.mark.skipif("cpp" not in available_backends(), reason=f"the extension: {cpp.why_not_installed()}")

LEVELS = [pytest.param(level, id=level) for level in cpp.levels()]
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
    "single": Sizes(B=16, L=1, D=5, E=3, F=3),
}
cpp_op = functools.partial(moe_ffn, backend="cpp")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_as_exact_as_eager(level, dtype, sizes, form):
    K, options = FORMS[form]
    op = functools.partial(cpp.moe_ffn, level=level)
    problems = [
        make_problem(seed, SIZES[sizes]._replace(K=K), dtype=DTYPES[dtype], affine_dtype=torch.float32, **options)
        for seed in range(12 if sizes == "single" else 6)
    ]
    assert_as_exact_as_eager(op, problems)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_recomputes_what_it_saved(level):
    problem = make_problem(0, SIZES["rests"]._replace(K=2), dtype=torch.bfloat16, expert_norm=True)
    saved, recomputed = (
        forward_and_gradients(functools.partial(cpp.moe_ffn, level=level, recompute=recompute), problem)
        for recompute in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))


def test_the_best_level_is_the_default():
    problem = make_problem(0, SIZES["rests"], dtype=torch.bfloat16)
    best = forward_and_gradients(functools.partial(cpp.moe_ffn, level=cpp.levels()[0]), problem)
    assert all(torch.equal(a, b) for a, b in zip(best, forward_and_gradients(cpp_op, problem), strict=True))
    assert cpp.levels()[-1] == "portable"


def test_auto_leaves_portable_kernels_alone(monkeypatch, caplog):
    """They are slower than what libraries have for any processor; asked for by name they run."""
    monkeypatch.setattr(cpp, "_EXTENSION", cpp.Extension(("portable",), None))
    problem = make_problem()
    with caplog.at_level(logging.WARNING, logger="mtu_kernels"):
        assert torch.equal(moe_ffn(*problem.arguments), moe_ffn(*problem.arguments, backend="eager"))
    words = "it has no kernels for this processor's vector instructions"
    assert [r.message for r in caplog.records] == [f"backend='auto' takes 'eager' on cpu instead of 'cpp': {words}."]
    assert "cpp" in available_backends()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
# Few tokens: threads share weights. Many: each takes tokens of its own.
@pytest.mark.parametrize("sizes", [Sizes(2, 37, 40, 4, 24), Sizes(3, 700, 24, 4, 20)], ids=("few", "many"))
@pytest.mark.parametrize("form", FORMS)
def test_threads(threads, form, sizes, dtype):
    K, options = FORMS[form]
    problem = make_problem(0, sizes._replace(K=K), dtype=DTYPES[dtype], **options)
    results = {}
    for count in (1, 2, 5):
        threads(count)
        first, second = (forward_and_gradients(cpp_op, problem) for _ in range(2))
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


@pytest.mark.parametrize("lay_out", [unaligned, strided])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_memory_of_any_layout(level, dtype, form, lay_out):
    """What lies around the numbers (NaN) is never read, or its product with a zero would show."""
    K, options = FORMS[form]
    op = functools.partial(cpp.moe_ffn, level=level)
    problem = make_problem(0, SIZES["rests"]._replace(K=K), dtype=DTYPES[dtype], **options)
    moved = problem.map(lay_out)
    if K:
        moved = moved._replace(routing=moved.routing._replace(indices=lay_out(problem.routing.indices)))
    x, norm, experts, routing = moved.arguments
    assert torch.equal(op(x, norm, experts, routing), op(*problem.arguments))
    leaves = [t.requires_grad_() for t in moved.tensors]
    gradients = torch.autograd.grad(op(x, norm, experts, routing), leaves, moved.grad_y)
    expected = forward_and_gradients(op, problem)[1:]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_numbers_stay_alone(level, dtype):
    problem = make_problem(0, SIZES["rests"], dtype=DTYPES[dtype])
    x = problem.x.clone()
    x[1, 5, 3], x[2, 36, 0] = torch.nan, torch.inf
    op = functools.partial(cpp.moe_ffn, level=level)
    y, expected = op(x, *problem.arguments[1:]), op(*problem.arguments)
    spoilt = y.isnan().any(dim=-1)
    assert spoilt.nonzero().tolist() == [[1, 5], [2, 36]]
    assert torch.equal(y[~spoilt], expected[~spoilt])


@pytest.mark.parametrize("level", LEVELS)
def test_gates_of_any_size(level):
    """Where Φ is 0 or 1 to the last bit, and where its square overflows."""
    gates = torch.tensor([-3e38, -1e30, -100.0, -5.6, -4.3, 0.0, 4.3, 5.6, 100.0, 1e30])
    for dtype in (torch.float32, torch.bfloat16):
        D, F = 16, len(gates)
        w_in = torch.zeros(2 * F, D, dtype=dtype)
        b_in = torch.cat([torch.full((F,), 0.5), gates]).to(dtype)
        experts = ExpertWeights(w_in, b_in, torch.eye(D, F, dtype=dtype), torch.zeros(D, dtype=dtype), 1)
        x = torch.randn(1, 3, D, generator=torch.Generator().manual_seed(0)).to(dtype)
        norm = NormAffine(torch.ones(1, D), torch.zeros(1, D))
        y = cpp.moe_ffn(x, norm, experts, Routing(torch.ones(1, 1)), level=level)[0, 0, :F]
        exact = 0.5 * torch.nn.functional.gelu(b_in[F:].double())
        # The approximation of Φ is off by 1.1e-5 at most, for 16 bits, and by 1.7e-7 otherwise.
        bound = gates.abs().clamp(max=6).double() * (2e-7 if dtype == torch.float32 else 1.1e-5)
        assert (y.double() - exact).abs().le(bound + torch.finfo(dtype).eps * exact.abs()).all()


def test_indices_out_of_range_are_refused_by_the_operator_itself():
    problem = make_problem(0, DENSE._replace(K=2))
    problem.routing.indices[1, 1] = 4
    with pytest.raises(RuntimeError, match=r"expert_indices must lie in \[0, 4\), got 4"):
        torch.ops.mtu_kernels.moe_ffn_cpp(*problem.op_arguments)


# torch's own forward derivatives use it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_auto_takes_plain_operators_where_the_fused_ones_have_no_rule():
    problem = make_problem(0, DENSE)
    x, rest = problem.x, problem.arguments[1:]

    def auto(x):
        return moe_ffn(x, *rest)

    eager = functools.partial(moe_ffn, backend="eager")
    expected = torch.func.jvp(lambda x: eager(x, *rest), (x,), (x,))
    for a, b in zip(torch.func.jvp(auto, (x,), (x,)), expected, strict=True):
        assert torch.equal(a, b)
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(auto)(several), torch.stack([eager(x, *rest), eager(2 * x, *rest)]))

    class Module(nn.Module):
        def forward(self, x):
            return moe_ffn(x, *rest)

    targets = {str(node.target) for node in torch.export.export(Module(), (x,)).graph.nodes}
    assert any("aten.gelu" in target for target in targets)
    assert not any("mtu_kernels" in target for target in targets)


def test_float64_is_for_other_backends():
    problem = make_problem(0, DENSE, dtype=torch.float64)
    words = "it computes in float32, bfloat16 and float16, not in float64"
    with pytest.raises(RuntimeError, match=rf"^The backend 'cpp' cannot serve this call: {words}\.$"):
        cpp_op(*problem.arguments)


def test_a_level_that_is_not_there():
    with pytest.raises(ValueError, match=r"^level must be one that this machine runs, .*portable, got 'avx1024'\.$"):
        cpp.moe_ffn(*make_problem().arguments, level="avx1024")


def test_an_extension_that_was_not_built(tmp_path):
    assert cpp.load(tmp_path).levels == ()
    assert cpp.load(tmp_path).why_not.startswith("its extension was not built when mtu was installed")


def test_an_extension_that_does_not_load(tmp_path):
    """As one built for another system; one for another torch lacks symbols, and dlopen says so in the same way."""
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    extension = cpp.load(tmp_path)
    assert extension.levels == ()
    assert extension.why_not.startswith(f"its extension does not load with torch {torch.__version__} (")
    assert "\n" not in extension.why_not


def test_without_the_extension_auto_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(cpp, "_EXTENSION", cpp.Extension((), "its extension was not built"))
    problem = make_problem()
    with caplog.at_level(logging.WARNING, logger="mtu_kernels"):
        assert _fastest(problem.x, problem.experts) is _fastest(problem.x, problem.experts)
    message = "backend='auto' takes 'eager' on cpu instead of 'cpp': its extension was not built."
    assert [record.message for record in caplog.records] == [message]
    assert torch.equal(moe_ffn(*problem.arguments), moe_ffn(*problem.arguments, backend="eager"))
    with pytest.raises(
        RuntimeError, match=r"^The backend 'cpp' cannot run here: its extension was not built; available"
    ):
        check_backend("cpp")
    assert "cpp" not in available_backends()
