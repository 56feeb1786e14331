"""`python -m benchmarks.models.launch_count`: the kernels that compiled blocks and UNets launch on a GPU.

They are counted in the code that Inductor generates, so no GPU is needed and nothing is timed. A library's call (a
product, a convolution, attention) counts as one launch. An operator of this project counts as the kernels that it
launches: its own code runs with a recorder in the place of the GPU.
"""

import ast
import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import mtu
from benchmarks.harness.arguments import SHAPE_SETS, names_parser, parse_shapes
from benchmarks.harness.commands import add_commit_option, make_parser, parse_arguments
from benchmarks.harness.contenders import Contender
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.fake_gpu import (
    ARCH,
    WORKS,
    GeneratedCode,
    RecordedOperator,
    fake_gpu,
    generate_code,
    to_fake_gpu,
)
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.rows import append_cells
from benchmarks.models.unet_models import LATENT_FACTOR, MODELS, default_num_experts, picture_edge, task_specs_of
from mtu.example_inputs import CLIP_TEXT_TOKENS, make_example_inputs
from mtu.experts import ExpertConfig
from mtu.models.ffn import TASK_CONTEXT_KEY, RoutedTransformerBlock
from mtu.models.router import TaskContext
from mtu_kernels.triton import operators
from mtu_kernels.triton.launch import LaunchDevice

MODULE = "benchmarks.models.launch_count"
# The implementation is the backend of an upcycled block; None for a stock block.
CONTENDERS = {
    "stock": Contender("the original of diffusers", None),
    "triton": Contender("upcycled, on the backend 'triton'", "triton"),
    "eager": Contender("upcycled, on the backend 'eager'", "eager"),
}
_TASKS, _EXPERTS, _BATCH = 4, 4, 2


class KernelNames(NamedTuple):
    """Names of kernels, in the order of their launches.

    Attributes:
        generated: by Inductor.
        library: calls of PyTorch's libraries.
        ours: kernels of this project's operators.
    """

    generated: tuple[str, ...]
    library: tuple[str, ...]
    ours: tuple[str, ...]

    @property
    def num_kernels(self) -> int:
        return sum(map(len, self))


class CompiledPart(NamedTuple):
    """A part of a model that is compiled by itself.

    Attributes:
        part: "feed-forward" (with its norm and residual), "block", or "unet".
        contender: a key of `CONTENDERS`.
        dtype: of weights and activations.
        width, tokens: of the block; 0 for a UNet.
        model: of a UNet.
    """

    part: str
    contender: str
    dtype: str = "bf16"
    width: int = 0
    tokens: int = 0
    model: str = ""

    @property
    def backend(self) -> str | None:
        return CONTENDERS[self.contender].implementation

    @property
    def csv_cells(self) -> dict[str, str]:
        """Those of the CSV file: a UNet's model stands with its part."""
        cells = {name: str(value) for name, value in self._asdict().items() if name != "model"}
        return cells | {"part": f"{self.part} {self.model}".strip()}


# ------------------------------------------------------------------------------------------------------------- counting

# Calls in generated code that launch nothing.
_BOOKKEEPING = {
    "args.clear", "assert_alignment", "assert_size_stride", "copy_if_misaligned", "empty_strided_cuda",
    "get_raw_stream", "reinterpret_tensor", "torch.cuda._DeviceGuard", "torch.cuda.set_device",
}  # fmt: skip


def kernels_in_code(code: GeneratedCode) -> KernelNames:
    """The launches of generated code.

    Raises:
        ValueError: it calls a function that is not known to launch something or not to.
    """
    waiting: dict[str, collections.deque[RecordedOperator]] = collections.defaultdict(collections.deque)
    for operator in code.operators:
        waiting[operator.name].append(operator)
    generated, library, ours = [], [], []
    for name in _calls(code.wrapper_source):
        if name in _BOOKKEEPING:
            continue
        if name.startswith("triton_") and name.endswith(".run"):
            generated.append(name.removesuffix(".run"))
        elif name.startswith(("extern_kernels.", "torch.ops.aten.")):
            library.append(name.partition(".")[2])
        elif name.startswith("torch.ops.mtu_kernels."):
            ours += kernels_of_operator(waiting[name.split(".")[3]].popleft())
        else:
            raise ValueError(f"Generated code calls {name!r}, which is neither a launch nor bookkeeping that is known.")
    if any(waiting.values()):
        raise ValueError(f"Generated code lacks calls of {[name for name, calls in waiting.items() if calls]}.")
    return KernelNames(tuple(generated), tuple(library), tuple(ours))


def kernels_of_operator(operator: RecordedOperator) -> list[str]:
    """The kernels that an operator of this project launches, and the library's products in it."""
    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "empty" not in str(function) and not function.is_view:
                names.append(str(function))
            return function(*args, **(kwargs or {}))

    machine = LaunchDevice(ARCH, lambda launch: names.append(launch.kernel.__name__))
    with Recorder():
        _RECORDED[operator.name](machine, *operator.arguments)
    return names


def _fused(machine: LaunchDevice, *arguments: Any) -> Tensor:
    *tensors, num_experts, eps = arguments
    return operators.run_inference(operators.build_call(machine, tuple(tensors), num_experts), eps)


_RECORDED: dict[str, Callable[..., Tensor]] = {
    "expert_hidden_triton": operators.run_first_product_alone,
    "moe_ffn_triton": _fused,
}


def _calls(wrapper: str) -> list[str]:
    """Names of the functions that generated code calls each time it runs, in order."""
    runs = [node for node in ast.walk(ast.parse(wrapper)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if len(runs) != 1:
        raise ValueError(f"Generated code should have one function `call`, but has {len(runs)}.")
    calls = [node for node in ast.walk(runs[0]) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset))]


# ------------------------------------------------------------------------------------------------------------- parts


def compile_and_list_kernels(compiled: CompiledPart) -> KernelNames:
    """The launches of one call of a part that is compiled for inference."""
    with fake_gpu():
        make = _whole_unet if compiled.model else _block
        function, arguments = make(compiled)
        code = generate_code(function, *arguments)
    return kernels_in_code(code)


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _block(compiled: CompiledPart) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    D, dtype = compiled.width, DTYPES[compiled.dtype]
    is_xl = (D, compiled.tokens) in SHAPE_SETS["sdxl"]
    heads = D // 64 if is_xl else 8
    context_width = 2048 if is_xl else 768
    with torch.device("meta"):
        block: Any = BasicTransformerBlock(D, heads, D // heads, cross_attention_dim=context_width)
        if compiled.backend is not None:
            experts = ExpertConfig(_EXPERTS, None, 1 / _EXPERTS, "task", float(_EXPERTS), context_width)
            block = RoutedTransformerBlock(block, experts, _TASKS, routers_dropped=True)
            block.ff.backend = compiled.backend
    to_fake_gpu(block, dtype)
    x = _tensor(_BATCH, compiled.tokens, D, dtype=dtype)
    text = _tensor(_BATCH, CLIP_TEXT_TOKENS, context_width, dtype=dtype)
    task_ids = _tensor(_BATCH, dtype=torch.int64)

    def run_block(x: Tensor, text: Tensor, task_ids: Tensor) -> Tensor:
        options = {} if compiled.backend is None else {TASK_CONTEXT_KEY: TaskContext(task_ids, None)}
        return block(x, encoder_hidden_states=text, cross_attention_kwargs=options)

    def run_feed_forward(x: Tensor, task_ids: Tensor) -> Tensor:
        if compiled.backend is None:
            return x + block.ff(block.norm3(x))
        return block.ff(x, block.norm3(task_ids), TaskContext(task_ids, None), residual=True)

    if compiled.part == "block":
        return run_block, (x, text, task_ids)
    return run_feed_forward, (x, task_ids)


def _whole_unet(compiled: CompiledPart) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    model, dtype = compiled.model, DTYPES[compiled.dtype]
    # Fake tensors cannot take the place of parameters, which happens where routers are dropped.
    with unset_fake_temporarily(), torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[model])
        if compiled.backend is not None:
            options = {"num_experts": default_num_experts(model), "init": "paper", "backend": compiled.backend}
            unet = mtu.upcycle(unet, tasks=task_specs_of(model), **options)
            unet.drop_routers_()
    to_fake_gpu(unet, dtype)
    if isinstance(unet, mtu.MTUUNet2DConditionModel):
        unet.conv_in.move_channel_counts_to_own_device_()
    edge = picture_edge(model) // LATENT_FACTOR
    inputs = make_example_inputs(unet, _BATCH, height=edge, width=edge, channels=unet.conv_in.in_channels)
    inputs["timestep"] = _tensor(_BATCH, dtype=torch.float32)
    if compiled.backend is not None:
        inputs["task_ids"] = _tensor(_BATCH, dtype=torch.int64)
    return lambda inputs: unet(**inputs, return_dict=False)[0], (inputs,)


# --------------------------------------------------------------------------------------------------------- command line


def all_compiled_parts(shapes: Sequence[tuple[int, int]], models: Sequence[str], dtype: str) -> Iterator[CompiledPart]:
    """Each part for all contenders."""
    parts = [(part, *shape, "") for part in ("feed-forward", "block") for shape in shapes]
    for part, width, tokens, model in [*parts, *(("unet", 0, 0, model) for model in models)]:
        for contender in CONTENDERS:
            yield CompiledPart(part, contender, dtype, width, tokens, model)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `results/launch_count.csv`."""
    parser = make_parser(MODULE, "The kernels that compiled blocks and UNets launch on a GPU.", CONTENDERS)
    add = parser.add_argument
    add("--shapes", type=parse_shapes, default="sd15,sdxl", help="of blocks (default: sd15,sdxl)")
    add("--unets", type=names_parser(MODELS, "model"), default=(), help="whole UNets (default: none)")
    add("--dtype", choices=("bf16", "fp16"), default="bf16", help="(default: bf16)")
    add("--output", type=Path, default=RESULTS / "launch_count.csv")
    add_commit_option(parser)
    argv, options = parse_arguments(parser, argv)
    if not WORKS:
        parser.error(f"Kernels are counted with torch 2.11 or newer, got {torch.__version__}.")
    source = collect_provenance(command_line(MODULE, argv), commit=options.commit)
    options.output.unlink(missing_ok=True)
    for compiled in all_compiled_parts(options.shapes, options.unets, options.dtype):
        launches = compile_and_list_kernels(compiled)
        counts = {name: len(kernels) for name, kernels in launches._asdict().items()}
        shape = f"{compiled.width}x{compiled.tokens}" if compiled.width else ""
        part = f"{compiled.csv_cells['part']:14} {shape:10} {compiled.contender:8}"
        print(f"{part} {launches.num_kernels:5} = {' + '.join(map(str, counts.values()))}")
        cells = compiled.csv_cells | {"B": _BATCH} | counts | {"launches": launches.num_kernels} | source
        append_cells(options.output, {name: str(cell) for name, cell in cells.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
