"""Every exporter: routed and exported UNets compute in other runtimes what they compute in PyTorch."""

import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import Dim

from .outputs import assert_close
from .tiny import SD, inputs, stock_unet, upcycled_unet

# Exporting by torch.export takes seconds for each level of a UNet: this one has one level and one transformer block.
SMALL = {**SD, "block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
NAMES = ("sample", "timestep", "encoder_hidden_states", "task_ids")
TOP2 = {"top_k": 2, "norm": "task_expert"}

pytestmark = [
    # The exporter by TorchScript says that it is the older one, and PyTorch and diffusers compare sizes while traced.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx"),
]


class Noise(nn.Module):
    """Tensors in, one tensor out."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, encoder_hidden_states, task_ids=None):
        more = {} if task_ids is None else {"task_ids": task_ids}
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False, **more)[0]


def arguments(unet, batch, height, width, *ids):
    """Tensors in the order of NAMES, with task ids where such are given."""
    given = inputs(unet, batch, seed=batch)
    given["sample"] = torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(batch))
    return (*given.values(), *([torch.tensor(ids)] if ids else []))


def example_and_others(unet, routed):
    """What a program is exported with, and calls of other batches, sizes and mixes of tasks."""
    ids = ((1, 3), (2, 0, 1), (3,)) if routed else ((), (), ())
    sizes = ((2, 8, 12), (3, 16, 8), (1, 4, 6))
    return [arguments(unet, *size, *own) for size, own in zip(sizes, ids, strict=True)]


def dynamic_shapes(example):
    batch, height, width = Dim("batch", max=63), Dim("height", max=64), Dim("width", max=64)
    return ({0: batch, 2: 2 * height, 3: 2 * width}, *({0: batch} for _ in example[1:]))


def to_onnx_by_torchscript(module, example):
    names, file = list(NAMES[: len(example)]), io.BytesIO()
    axes = {name: {0: "batch"} for name in names}
    axes["sample"] |= {2: "height", 3: "width"}
    torch.onnx.export(
        module, example, file, dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes, verbose=False
    )
    return file.getvalue()


def to_onnx_by_dynamo(module, example):
    program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=dynamic_shapes(example), verbose=False)
    return program.model_proto.SerializeToString()


@torch.no_grad()
def assert_runs_as(graph, module, calls):
    """Raise unless ONNX Runtime computes from the graph what the module computes."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    types = {given.name: given.type for given in session.get_inputs()}
    assert types.get("task_ids", "tensor(int64)") == "tensor(int64)"
    for call in calls:
        feed = {name: tensor.numpy() for name, tensor in zip(types, call, strict=True)}
        assert_close(torch.from_numpy(session.run(None, feed)[0]), module(*call))


def operators(graph):
    onnx = pytest.importorskip("onnx")
    return Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)


ROUTED = [
    pytest.param({}, False, True, id="dense"),
    pytest.param({}, True, False, id="dense-dropped-first_task"),
    pytest.param({"top_k": 2}, True, True, id="top2-dropped"),
    pytest.param(TOP2, False, True, id="expert_norms_top2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "dropped", "has_ids"), ROUTED)
def test_onnx_by_torchscript(settings, dropped, has_ids):
    pytest.importorskip("onnx")
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    module = Noise(unet).eval()
    calls = example_and_others(unet, has_ids)
    graph = to_onnx_by_torchscript(module, calls[0])
    assert_runs_as(graph, module, calls)
    found = operators(graph)
    # No branch or loop on data. Of four blocks and the input convolution, each adds less than ten nodes that compute;
    # the others make shapes.
    assert not found.keys() & {"If", "Loop", "Scan", "SequenceAt", "SplitToSequence"}
    stock = operators(to_onnx_by_torchscript(Noise(stock_unet(in_channels=8)), calls[0][:3]))
    assert found.total() < 1.75 * stock.total()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, TOP2], ids=["dense", "expert_norms_top2"])
def test_onnx_by_dynamo(settings):
    pytest.importorskip("onnxscript")
    unet = upcycled_unet(SMALL, **settings)
    module = Noise(unet).eval()
    calls = example_and_others(unet, True)
    assert_runs_as(to_onnx_by_dynamo(module, calls[0]), module, calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "to_onnx"), [(SD, to_onnx_by_torchscript), (SMALL, to_onnx_by_dynamo)], ids=["torchscript", "dynamo"]
)
def test_onnx_of_a_pruned_export(config, to_onnx):
    pytest.importorskip("onnxscript")
    unet = upcycled_unet(config, top_k=2)
    module = Noise(unet.export_task("edit", prune=True)).eval()
    calls = example_and_others(unet, False)
    assert_runs_as(to_onnx(module, calls[0]), module, calls)


@pytest.mark.slow
def test_onnx_of_a_model_with_an_adapter():
    """Wrapped Linears are called as modules, which is another path."""
    pytest.importorskip("onnx")
    from peft import LoraConfig

    unet = upcycled_unet()
    unet.add_adapter(LoraConfig(target_modules=["ff.net.0.proj", "ff.net.2"], init_lora_weights=False))
    module = Noise(unet).eval()
    calls = example_and_others(unet, True)
    assert_runs_as(to_onnx_by_torchscript(module, calls[0]), module, calls)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_torch_export(strict):
    unet = upcycled_unet(SMALL, **TOP2)
    module = Noise(unet).eval()
    example, *others = example_and_others(unet, True)
    program = torch.export.export(module, example, dynamic_shapes=dynamic_shapes(example), strict=strict)
    # aten alone, which is any runtime's; stable sorts are PyTorch's.
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("mtu_kernels" in target or "sort" in target for target in targets)
    with torch.no_grad():
        assert_close(program.module()(*others[0]), module(*others[0]))


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(TOP2, marks=pytest.mark.slow)], ids=["dense", "expert_norms_top2"]
)
def test_torch_jit_trace(settings):
    unet = upcycled_unet(**settings)
    module = Noise(unet).eval()
    example, *others = example_and_others(unet, True)
    with torch.no_grad():
        program = torch.jit.trace(module, example)
        for call in others:
            assert_close(program(*call), module(*call))
