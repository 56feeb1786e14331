"""When the backend "cpp" is taken, what its operator refuses, and how it is missed."""

import functools
import logging

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from mtu_kernels import available_backends, check_backend, cpp, moe_ffn
from mtu_kernels.arguments import Options
from mtu_kernels.cpp.extension import LoadedExtension, load_extension
from mtu_kernels.moe_ffn import _fastest

from .moe_ffn_cases import DENSE, Sizes, make_problem

needs_extension = pytest.mark.skipif("cpp" not in available_backends(), reason="the extension is not installed")
WHOLE = Sizes(B=2, L=48, D=64, E=3, F=64)
cpp_op = functools.partial(moe_ffn, backend="cpp")


@needs_extension
@pytest.mark.parametrize(
    ("index", "words"),
    [(4, r"lie in \[0, 4\), got 4"), (-1, r"lie in \[0, 4\), got -1"), (2**32, r"lie in \[0, 4\), got 4294967296")],
)
def test_indices_out_of_range_are_refused_by_the_operator_itself(index, words):
    problem = make_problem(0, DENSE._replace(K=2))
    arguments = list(problem.op_arguments)
    arguments[8] = arguments[8].long()
    arguments[8][1, 1] = index
    with pytest.raises(RuntimeError, match=f"expert_indices must {words}"):
        torch.ops.mtu_kernels.moe_ffn_cpp(*arguments)


@needs_extension
def test_repeated_indices_are_refused_by_the_operator_itself():
    problem = make_problem(0, DENSE._replace(K=2))
    problem.routing.indices[1] = 3
    with pytest.raises(RuntimeError, match="must name an expert at most once for each sample, got 3 again"):
        torch.ops.mtu_kernels.moe_ffn_cpp(*problem.op_arguments)


@needs_extension
@pytest.mark.parametrize("position", range(8))
def test_tensors_of_other_shapes_are_refused_by_the_operator_itself(position):
    arguments = list(make_problem(0, DENSE).op_arguments)
    arguments[position] = arguments[position][:1]
    if position == 0:
        arguments[0] = arguments[0][0]
    with pytest.raises(RuntimeError, match="must be"):
        torch.ops.mtu_kernels.moe_ffn_cpp(*arguments)


@needs_extension
@pytest.mark.parametrize("position", [0, 4, 5, 6])
def test_tensors_of_other_dtypes_are_refused_by_the_operator_itself(position):
    arguments = list(make_problem(0, DENSE).op_arguments)
    arguments[position] = arguments[position].bfloat16()
    with pytest.raises(RuntimeError, match="must have the dtype of w_in"):
        torch.ops.mtu_kernels.moe_ffn_cpp(*arguments)


@needs_extension
@pytest.mark.parametrize("num_experts", [0, -1, 5])
def test_experts_that_do_not_divide_are_refused_by_the_operator_itself(num_experts):
    *arguments, _, eps = make_problem(0, DENSE).op_arguments
    with pytest.raises(RuntimeError, match="num_experts must divide H"):
        torch.ops.mtu_kernels.moe_ffn_cpp(*arguments, num_experts, eps)


@needs_extension
def test_auto_takes_plain_operators_where_the_fused_ones_have_no_rule():
    problem = make_problem(0, WHOLE)
    assert _fastest(problem.x, problem.experts) is not _fastest(problem.x[:, :1], problem.experts)
    x, rest = problem.x, problem.arguments[1:]

    def auto(x):
        return moe_ffn(x, *rest)

    eager = functools.partial(moe_ffn, backend="eager")
    expected = torch.func.jvp(lambda x: eager(x, *rest), (x,), (x,))
    for a, b in zip(torch.func.jvp(auto, (x,), (x,)), expected, strict=True):
        assert torch.equal(a, b)
    grad, expected_grad = (torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (auto, lambda x: eager(x, *rest)))
    assert torch.equal(grad, expected_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        tangents = [forward_ad.unpack_dual(f(dual)).tangent for f in (auto, lambda x: eager(x, *rest))]
        assert torch.equal(*tangents)
        with pytest.raises(NotImplementedError, match=r"forward-mode differentiation: use backend='eager'"):
            cpp_op(dual, *rest)
        cpp_op(x, *rest)  # no tangent comes in here
    with pytest.raises(NotImplementedError, match=r"functional transforms \(Grad\): use backend='eager'"):
        torch.func.grad(lambda x: cpp_op(x, *rest).sum())(x)
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(auto)(several), torch.stack([eager(x, *rest), eager(2 * x, *rest)]))

    class Module(nn.Module):
        def forward(self, x):
            return moe_ffn(x, *rest)

    targets = {str(node.target) for node in torch.export.export(Module(), (x,)).graph.nodes}
    assert any("aten.gelu" in target for target in targets)
    assert not any("mtu_kernels" in target for target in targets)


@needs_extension
def test_float64_is_for_other_backends():
    problem = make_problem(0, DENSE, dtype=torch.float64)
    words = "it computes in float32, bfloat16 and float16, not in float64"
    with pytest.raises(RuntimeError, match=rf"^The backend 'cpp' cannot serve this call: {words}\.$"):
        cpp_op(*problem.arguments)


@needs_extension
def test_a_level_that_is_not_there():
    with pytest.raises(ValueError, match=r"^level must be one that this machine runs, .*portable, got 'avx1024'\.$"):
        cpp.moe_ffn(*make_problem().arguments, Options(), level="avx1024")


def test_auto_leaves_portable_kernels_alone(monkeypatch, caplog):
    """They are slower than what libraries have for any processor; asked for by name they run."""
    monkeypatch.setattr(cpp, "EXTENSION", LoadedExtension(("portable",), None))
    problem = make_problem(0, WHOLE)
    with caplog.at_level(logging.WARNING, logger="mtu_kernels"):
        assert torch.equal(moe_ffn(*problem.arguments), moe_ffn(*problem.arguments, backend="eager"))
    words = "it has no kernels for this processor's vector instructions"
    assert [r.message for r in caplog.records] == [f"backend='auto' takes 'eager' on cpu instead of 'cpp': {words}."]
    assert "cpp" in available_backends()


def test_an_extension_that_was_not_built(tmp_path):
    assert load_extension(tmp_path).instruction_sets == ()
    assert load_extension(tmp_path).why_not_loaded.startswith("its extension was not built when mtu was installed")


def test_an_extension_that_does_not_load(tmp_path):
    """As one built for another system; one for another torch lacks symbols, and dlopen says so in the same way."""
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    extension = load_extension(tmp_path)
    assert extension.instruction_sets == ()
    assert extension.why_not_loaded.startswith(f"its extension does not load with torch {torch.__version__} (")
    assert "\n" not in extension.why_not_loaded


def test_without_the_extension_auto_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(cpp, "EXTENSION", LoadedExtension((), "its extension was not built"))
    problem = make_problem(0, WHOLE)
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
