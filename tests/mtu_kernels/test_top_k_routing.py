"""Which experts are kept, with what weights, and what happens to ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mtu_kernels import Routing, dense_weights, top_k_routing


class OperatorNames(TorchDispatchMode):
    """The names of the operators that run."""

    def __enter__(self):
        super().__enter__()
        self.names = []
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_keeps_the_largest_and_renormalises():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 4.0]])
    weights, indices = top_k_routing(logits, 2)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [[1, 2], [3, 0]]
    probabilities = torch.softmax(logits, dim=-1).gather(1, indices.long())
    torch.testing.assert_close(weights, probabilities / probabilities.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("num_experts", [4, 16, 300])
def test_ties_go_to_the_lower_index(num_experts):
    # Sorts that are not stable still look stable on short rows: hence a long one.
    for k in (1, 3, num_experts):
        assert top_k_routing(torch.zeros(2, num_experts), k).indices.tolist() == [list(range(k))] * 2


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 8).flatmap(
        lambda E: st.lists(st.lists(st.integers(-2, 2), min_size=E, max_size=E), min_size=1, max_size=4)
    ),
    data=st.data(),
)
def test_is_the_stable_sort_of_python(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    weights, indices = top_k_routing(torch.tensor(rows, dtype=torch.float32), k)
    assert indices.tolist() == [sorted(range(len(row)), key=lambda e: -row[e])[:k] for row in rows]
    kept = torch.tensor([[row[e] for e in chosen] for row, chosen in zip(rows, indices.tolist(), strict=True)])
    torch.testing.assert_close(weights, torch.softmax(kept.float(), dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_are_at_least_float32(dtype):
    weights, _ = top_k_routing(torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype), 2)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradients_reach_the_kept_logits_only():
    logits = torch.tensor([[0.5, 2.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    top_k_routing(logits, 2).weights[:, 0].sum().backward()
    assert (logits.grad[0, [1, 2]] != 0).all()
    assert (logits.grad[0, [0, 3]] == 0).all()
    assert torch.autograd.gradcheck(lambda t: top_k_routing(t, 2).weights, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("largest", [0.0, 3.0, 200.0])
def test_top_1_is_one_and_learns_by_the_log_probability(dtype, largest):
    rows = [[0.5, largest, -1.0, 0.25], [largest + 1, -300.0, largest, largest]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    weights, indices = top_k_routing(logits, 1)
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert (weights == 1).all()
    grad = torch.tensor([[2.0], [-3.0]], dtype=weights.dtype)
    weights.backward(grad)
    chosen = F.one_hot(indices.long().squeeze(1), 4)
    expected = grad * (chosen - logits.detach().to(weights.dtype).softmax(dim=-1))
    torch.testing.assert_close(logits.grad, expected.to(dtype))
    assert torch.equal(logits.grad[:, :3] != 0, expected.to(dtype)[:, :3] != 0)


def test_top_1_without_gradients_is_the_softmax_of_one_logit():
    """Straight-through terms are for training alone; of one expert there is nothing to choose."""
    with torch.no_grad():
        kept = top_k_routing(torch.tensor([[0.0, 2.0]], requires_grad=True), 1)
    assert kept.weights.grad_fn is None
    learning = torch.tensor([[0.0, 2.0]], requires_grad=True)
    for logits in (learning.detach(), torch.tensor([[2.0]], requires_grad=True), learning):
        with OperatorNames() as names:
            assert top_k_routing(logits, 1).weights.tolist() == [[1.0]]
        assert any("log_softmax" in name for name in names) == (logits is learning)


def test_compiled_top_1_is_one_and_learns():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(lambda t: top_k_routing(t, 1), fullgraph=True, backend="aot_eager")
    eager_grad, compiled_grad = (
        torch.autograd.grad(call(logits).weights.sum(), logits)[0] for call in (lambda t: top_k_routing(t, 1), compiled)
    )
    assert (compiled(logits).weights == 1).all()
    assert compiled_grad.abs().max() > 0.1
    torch.testing.assert_close(compiled_grad, eager_grad)


def test_exported_top_1_is_one():
    class Routed(torch.nn.Module):
        def forward(self, logits):
            return tuple(top_k_routing(logits, 1))

    logits = torch.tensor([[0.0, 2.0, 1.0], [4.0, 2.0, 1.0]], requires_grad=True)
    weights, indices = torch.export.export(Routed(), (logits,)).module()(logits.detach() + 0.5)
    assert weights.tolist() == [[1.0], [1.0]]
    assert indices.tolist() == [[1], [0]]


def test_all_experts_kept_is_the_softmax():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense_weights(top_k_routing(logits, 4), 4), torch.softmax(logits, dim=-1))


def test_dense_weights_are_zero_where_inactive_and_differentiable():
    weights = torch.tensor([[0.25, 0.75]], requires_grad=True)
    table = dense_weights(Routing(weights, torch.tensor([[3, 1]], dtype=torch.int32)), 4)
    assert table.tolist() == [[0, 0.75, 0, 0.25]]
    table[0, 1].backward()
    assert weights.grad.tolist() == [[0, 1]]


def test_dense_weights_of_dense_routing_are_its_weights():
    weights = torch.rand(2, 4)
    assert dense_weights(Routing(weights), 4) is weights


@pytest.mark.parametrize(
    ("logits", "k", "words"),
    [
        (torch.zeros(4), 1, r"\(T, E\).*\(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int64), 1, "floating-point.*int64"),
        (torch.zeros(2, 4), 0, "1 <= k <= E = 4, got k = 0"),
        (torch.zeros(2, 4), 5, "1 <= k <= E = 4, got k = 5"),
    ],
)
def test_errors(logits, k, words):
    with pytest.raises(ValueError, match=words):
        top_k_routing(logits, k)


def test_traces_in_one_graph():
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    compiled = torch.compile(lambda t: top_k_routing(t, 2), fullgraph=True, backend="aot_eager")
    assert compiled(logits).indices.tolist() == [[1, 2]]
