"""Has Inductor generate its code for a GPU on a machine without one: tensors on "cuda" have shapes only.

The code depends on shapes, strides, dtypes and a GPU's properties, which are those of an H100 here. Nothing is compiled
further, loaded or run. Inductor's code for CPUs would not do instead, since it fuses other operators.

Three things differ from a machine with a GPU. Attention is the flash kernel, which PyTorch would choose for 16-bit
tensors without a mask. Brackets and `contiguous` call the operators that they stand for, since PyTorch's methods look
for the device. Constants are not folded, since folding makes tensors with memory.
"""

import contextlib
import functools
import types
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._inductor.config
import torch.nn.functional as F
import torch.utils._triton
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor

# Older compilers make a mode of their own for tensors that are fake already, and refuse to mix the two.
WORKS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
ARCH = "sm_90"
# Source: CUDA C++ programming guide, technical specifications by compute capability; H100 SXM data sheet.
_H100 = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}


class RecordedOperator(NamedTuple):
    """A call of an operator that Inductor does not know; its tensors have shapes only (device "meta")."""

    name: str
    arguments: tuple[Any, ...]


class GeneratedCode(NamedTuple):
    """Inductor's code for a function: Python that launches the kernels, and the calls of `mtu_kernels` in order."""

    wrapper_source: str
    operators: tuple[RecordedOperator, ...]


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Within it tensors may be made on "cuda", and `generate_code` be called."""
    with contextlib.ExitStack() as stack:
        patch = functools.partial(_patch, stack)
        patch(F, "scaled_dot_product_attention", _attention)
        for kind in (FakeTensor, FunctionalTensor):
            patch(kind, "__getitem__", _index)
            patch(kind, "contiguous", _contiguous)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        yield


def to_fake_gpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module that was built on "meta", in eval mode on the fake GPU: parameters in `dtype`, buffers in their own."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                moved = torch.empty(tensor.shape, dtype=dtype, device="cuda", memory_format=layout)
                part._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return module.eval()


def generate_code(function: Callable[..., Any], *arguments: Any) -> GeneratedCode:
    """Inductor's code of a function, in one graph, for arguments made within `fake_gpu`."""
    made: list[GeneratedCode] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        with _patched_inductor(made):
            try:
                compile_fx(module, inputs)
            except Exception:
                # `_CodeIsThere` ends compilation, and comes back wrapped.
                if not made:
                    raise
        return module.forward

    # The code of earlier calls would make sizes symbolic.
    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    torch.compiler.reset()
    return made[0]


class _CodeIsThere(Exception):
    """Ends compilation."""


@contextlib.contextmanager
def _patched_inductor(made: list[GeneratedCode]) -> Iterator[None]:
    properties = types.SimpleNamespace(**_H100, minor=0, name="H100", gcnArchName="", total_memory=80 << 30)
    hints = DeviceProperties(
        type="cuda", index=0, cc=90, **{k: v for k, v in _H100.items() if k in DeviceProperties._fields}
    )
    prepare_patterns = joint_graph.lazy_init

    def keep_code(lowering: GraphLowering) -> None:
        made.append(GeneratedCode(lowering.codegen()[0].value, tuple(_operators(lowering.module.graph))))
        raise _CodeIsThere

    with contextlib.ExitStack() as stack:
        patch = functools.partial(_patch, stack)
        for cuda in (torch.cuda, device_interface.CudaInterface):
            patch(cuda, "current_device", lambda: 0)
            patch(cuda, "get_device_properties", lambda *device: properties)
        patch(torch.cuda, "get_device_capability", lambda *device: (9, 0))
        patch(device_interface.CudaInterface, "is_bf16_supported", lambda *args, **options: True)
        patch(DeviceProperties, "create", lambda device: hints)
        patch(scheduler, "has_triton", lambda *device: True)
        # Inductor asks the driver for this part of its caches' keys.
        patch(torch.utils._triton, "triton_hash_with_backend", lambda: "")
        # Patterns of attention are traced on a device, but serve all.
        patch(joint_graph, "lazy_init", lambda *device: prepare_patterns(torch.device("cpu")))
        patch(GraphLowering, "compile_to_module", keep_code)
        options = {"fx_graph_cache": False, "compile_threads": 1, "joint_graph_constant_folding": False}
        stack.enter_context(torch._inductor.config.patch(options))
        yield


def _operators(graph: torch.fx.Graph) -> Iterator[RecordedOperator]:
    def without_device(value: Any) -> Any:
        if not isinstance(value, torch.fx.Node):
            return value
        tensor = value.meta["val"]
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mtu_kernels":
            with unset_fake_temporarily():
                yield RecordedOperator(node.target._opname, torch.fx.map_arg(node.args, without_device))


def _patch(stack: contextlib.ExitStack, owner: Any, name: str, value: Any, **options: Any) -> None:
    stack.enter_context(unittest.mock.patch.object(owner, name, value, **options))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, **options: Any) -> Tensor:
    if attn_mask is not None:
        raise ValueError(f"Attention is counted without a mask, but got one of {tuple(attn_mask.shape)}.")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.ops.aten.contiguous.default(tensor, memory_format=memory_format)


def _index(tensor: Tensor, index: Any) -> Tensor:
    aten = torch.ops.aten
    parts = index if isinstance(index, tuple) else (index,)
    # By dimension, where rows are picked by a tensor.
    rows: dict[int, Tensor] = {}
    dim = 0
    for number, part in enumerate(parts):
        if part is Ellipsis:
            dim = tensor.dim() - sum(later is not None for later in parts[number + 1 :])
            continue
        if isinstance(part, int):
            tensor = aten.select.int(tensor, dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, Tensor):
            rows[dim] = part
        elif part != slice(None):
            tensor = aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return aten.index.Tensor(tensor, [rows.get(d) for d in range(max(rows) + 1)]) if rows else tensor
