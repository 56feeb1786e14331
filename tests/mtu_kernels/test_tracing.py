"""What `mtu_kernels.tracing` answers in compiled and in exported code, on every version of torch."""

import io

import pytest
import torch

from mtu_kernels import available_backends, moe_ffn, top_k_routing
from mtu_kernels.tracing import is_exporting, supports_autocast

from .moe_ffn_cases import Sizes, make_problem


class Asks(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x


def test_compiled_code_is_not_exported():
    module, x = Asks(), torch.zeros(2)
    assert not is_exporting()
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), x)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_is(strict):
    module, x = Asks(), torch.zeros(2)
    program = torch.export.export(module, (x,), strict=strict)
    assert torch.equal(program.module()(x), x + 1)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the extension is not built")
def test_compiled_code_takes_the_fused_operator_by_itself(monkeypatch):
    monkeypatch.setattr("mtu_kernels.cpp.why_slower_than_eager", lambda: None)  # on any processor
    # One by one: the compiler of torch 2.10 unpacks no property.
    (x, norm, experts, routing), targets = make_problem(sizes=Sizes(L=32)).arguments, []

    def keep(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(lambda: moe_ffn(x, norm, experts, routing), backend=keep, fullgraph=True)()
    assert [target for target in targets if "moe_ffn" in target] == ["mtu_kernels.moe_ffn_cpp.default"]


class Routes(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, logits):
        return tuple(top_k_routing(logits, self.k))


def ties(num_experts):
    """Rows of few different logits, so that most tie: infinities, NaN, both zeros and the smallest number too."""
    numbers = torch.tensor([0.0, -0.0, 1.0, 2.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    return numbers[torch.randint(0, len(numbers), (500, num_experts), generator=torch.Generator().manual_seed(0))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (2, 1), (5, 3), (33, 33)])
def test_exported_top_k_is_the_stable_sort_to_the_bit(num_experts, k):
    logits = ties(num_experts)
    expected = top_k_routing(logits, k)
    for program in (
        torch.export.export(Routes(k), (logits[:7],), dynamic_shapes=({0: torch.export.Dim("rows")},)).module(),
        torch.jit.trace(Routes(k), (logits[:7],), check_trace=False),
    ):
        weights, indices = program(logits)
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(weights, expected.weights, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_ties_go_to_the_lower_index_in_onnx(dynamo):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    logits, file = ties(5), io.BytesIO()
    program = torch.onnx.export(
        Routes(3).eval(), (logits,), None if dynamo else file, dynamo=dynamo, opset_version=18, verbose=False
    )
    graph = program.model_proto.SerializeToString() if dynamo else file.getvalue()
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    _, indices = session.run(None, {session.get_inputs()[0].name: logits.numpy()})
    assert torch.equal(torch.from_numpy(indices), top_k_routing(logits, 3).indices)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_gets_no_operator_that_it_does_not_know(dynamo):
    pytest.importorskip("onnxscript")
    x, *rest = make_problem().arguments

    class Module(torch.nn.Module):
        def forward(self, x):
            return moe_ffn(x, *rest, backend="reference")

    with pytest.raises(RuntimeError, match=r"'reference' cannot serve .*: ONNX does not know .*'auto' or 'eager'"):
        torch.onnx.export(Module().eval(), (x,), io.BytesIO(), dynamo=dynamo, verbose=False)
    assert torch.isfinite(Module()(x)).all()


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_compilers_may_ask_too(device, monkeypatch):
    """torch 2.11 cannot trace its own function; here, no version can."""
    expected = torch.amp.is_autocast_available(device)
    assert supports_autocast(device) == expected
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))

    def one_if_so(x):
        return x + 1 if supports_autocast(device) else x

    compiled = torch.compile(one_if_so, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == expected
