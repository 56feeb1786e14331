"""`mtu.compile` and `mtu.warmup`: compiled code and CUDA graphs for a UNet, prepared once for each size of its inputs.

Tasks are values of a tensor, so switching tasks prepares nothing anew. The capture itself and the detection of changed
models live in `mtu.runtime.graphs`.
"""

import contextlib
import functools
import inspect
import logging
import threading
import time
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from tqdm.auto import tqdm

from mtu.compat.plain_linear import has_replaced_forward
from mtu.example_inputs import CLIP_TEXT_TOKENS, fill_in_height_and_width, make_example_inputs
from mtu.models.router import precomputed_tables_context
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.runtime.graphs import CapturedCall, CudaGraphCapture, GraphCapture, ModelSnapshot, UNetCall, UNetInputs

__all__ = ["CompiledUNetCalls", "ExecutionPlan", "compile", "warmup"]

_LOG = logging.getLogger("mtu")
Model = TypeVar("Model", UNet2DConditionModel, DiffusionPipeline)


class ExecutionPlan(NamedTuple):
    """How the calls of a UNet run.

    Args:
        compile_options: arguments of `torch.compile`; None: calls are not compiled.
        uses_cuda_graphs: whether each size is captured in a CUDA graph.
    """

    compile_options: dict[str, Any] | None
    uses_cuda_graphs: bool


_MODES = {
    "default": ExecutionPlan({"mode": "default"}, uses_cuda_graphs=False),
    "reduce-overhead": ExecutionPlan({"mode": "default"}, uses_cuda_graphs=True),
    "max-autotune": ExecutionPlan({"mode": "max-autotune-no-cudagraphs"}, uses_cuda_graphs=True),
    "max-autotune-no-cudagraphs": ExecutionPlan({"mode": "max-autotune-no-cudagraphs"}, uses_cuda_graphs=False),
    "cudagraphs": ExecutionPlan(None, uses_cuda_graphs=True),
    "eager": ExecutionPlan(None, uses_cuda_graphs=False),
}


def compile(model: Model, mode: str = "auto", *, max_cached_sizes: int = 8) -> Model:
    """Prepare a UNet for fast inference on the device that it is on: move it there first.

    On a CUDA device, the default mode compiles the UNet and captures it in CUDA graphs. On a CPU, the default mode only
    converts the weights to the channels-last memory format. No code is compiled there unless `mode` asks for it, as
    compiled code is no faster.

    A size is the shapes and dtypes of a call's tensors. Each size is compiled and captured once, at its first call or
    in `mtu.warmup`. Tasks are values of a tensor, so switching them compiles and captures nothing. Later calls never
    overwrite an earlier output.

    Calls that record gradients, models in training mode, and calls with adapters, hooks or replaced forwards
    (offloading, caching) run uncompiled. If parameters, buffers, modules, attention processors, backends or FreeU's
    strengths are replaced, each size is prepared anew at its next call. If other Python attributes change, call
    `mtu.compile` again. A pipeline runs the routers once for each pipeline call. Your own loop runs them at each step,
    unless it is within `unet.precomputed_routing_context()` or the routers are dropped.

    Args:
        model: an upcycled or a stock UNet, or a pipeline with one; changed in place. Its weights become channels-last,
            with the same values.
        mode: one of the following.
            "auto": "reduce-overhead" if the UNet is on a CUDA device now, and "eager" otherwise.
            "default", "max-autotune-no-cudagraphs": the modes of `torch.compile`.
            "reduce-overhead", "max-autotune": the same with CUDA graphs, which MTU captures.
            "cudagraphs": CUDA graphs of uncompiled code.
            "eager": neither compiled code nor graphs; this also undoes an earlier `mtu.compile`.
        max_cached_sizes: the largest number of sizes to keep; the least recently used one is dropped first.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no UNet, the mode is unknown, the UNet's device cannot run it, or the UNet is
            offloaded.

    Example:
        >>> pipe = mtu.compile(pipe.to("cuda"))
        >>> mtu.warmup(pipe, batches=["edit", ["text-to-image", "remove"]])
        >>> pipe("make it blue", image=image, task="edit")
    """
    unet = _unet_of(model)
    if mode != "auto" and mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(('auto', *_MODES))}, but got {mode!r}.")
    if not isinstance(max_cached_sizes, int) or max_cached_sizes < 1:
        raise ValueError(f"max_cached_sizes must be an integer ≥ 1, but got {max_cached_sizes!r}.")
    is_offloaded = any(map(has_replaced_forward, unet.modules()))
    if mode != "eager" and is_offloaded:
        raise ValueError("mtu.compile expects a UNet that stays on its device, but this UNet is offloaded.")
    on_cuda = unet.device.type == "cuda"
    plan = _MODES[("reduce-overhead" if on_cuda else "eager") if mode == "auto" else mode]
    if plan.uses_cuda_graphs and not on_cuda:
        raise ValueError(f"mode={mode!r} needs a UNet on a CUDA device, but this one is on {unet.device}.")
    if not is_offloaded:
        # Neither torch nor diffusers declares this argument.
        unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # `nn.Module.__call__` calls this attribute, which `nn.Module.compile` sets in the same way.
    unet._compiled_call_impl = None if plan == _MODES["eager"] else CompiledUNetCalls(unet, plan, max_cached_sizes)
    return model


def warmup(
    model: UNet2DConditionModel | DiffusionPipeline,
    batches: Sequence[int | str | Sequence[str]],
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
) -> dict[int | tuple[str, ...], float]:
    """Run one step at each size that will be used, so that later calls compile and capture nothing.

    Args:
        model: the model that `mtu.compile` returned.
        batches: one entry per size: the number of rows of the UNet's batch, or the task or tasks of its samples. Tasks
            give one row for each guidance branch, by the tasks' own guidance scales.
        height, width: of the pictures in pixels for a pipeline, of the latents for a UNet; None: the model's own.
        text_tokens: the tokens of a prompt; None: those of the pipeline's tokenizer, or 77.

    Returns:
        The seconds that each of `batches` took.

    Raises:
        ValueError: a batch has no rows, a task is unknown, a size is no multiple of the VAE's factor, there are more
            sizes than the model keeps, or the UNet is in training mode.

    Example:
        >>> mtu.warmup(mtu.compile(pipe), batches=["text-to-image", ["edit", "remove"]], height=512, width=512)
    """
    unet = _unet_of(model)
    factor: int = model.vae_scale_factor if isinstance(model, DiffusionPipeline) else 1
    height, width = fill_in_height_and_width(unet, height, width, factor)
    if any(not isinstance(edge, int) or edge < factor or edge % factor for edge in (height, width)):
        raise ValueError(f"height and width must be positive multiples of {factor}, but got {height} and {width}.")
    if text_tokens is None:
        text_tokens = getattr(getattr(model, "tokenizer", None), "model_max_length", CLIP_TEXT_TOKENS)
    names = [
        batch if isinstance(batch, int) else (batch,) if isinstance(batch, str) else tuple(batch) for batch in batches
    ]
    rows = [_rows(unet, name) for name in names]
    calls = unet._compiled_call_impl
    if isinstance(calls, CompiledUNetCalls) and len(set(rows)) > calls.max_cached_sizes:
        raise ValueError(
            f"At most max_cached_sizes = {calls.max_cached_sizes} sizes are kept, but got {len(set(rows))} to warm up."
        )
    if unet.training:
        raise ValueError("mtu.warmup expects a UNet in eval mode, but this one is in training mode.")
    # If parameters are offloaded to the meta device, calls accept inputs on any device.
    is_offloaded = unet.device.type == "meta" and any(map(has_replaced_forward, unet.modules()))
    device = torch.device("cpu") if is_offloaded else unet.device
    size = {"height": height // factor, "width": width // factor}
    seconds = {}
    with tqdm(zip(names, rows, strict=True), total=len(names), desc="warm-up", unit="size") as progress:
        for name, count in progress:
            progress.set_postfix_str(f"{count} rows of {height}×{width}")
            inputs = make_example_inputs(unet, count, **size, text_tokens=text_tokens, device=device)
            start = time.perf_counter()
            with torch.no_grad(), _unannounced(unet):
                unet(**inputs)
            if unet.device.type == "cuda":
                torch.cuda.synchronize(unet.device)
            seconds[name] = time.perf_counter() - start
    return seconds


class CompiledUNetCalls:
    """A callable in the place of a UNet's forward, with one compiled and captured call for each size of the inputs.

    Args:
        unet: the UNet.
        plan: how calls run.
        max_cached_sizes: the largest number of sizes to keep.
        capture: captures graphs; None: CUDA graphs on the UNet's device.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        plan: ExecutionPlan,
        max_cached_sizes: int,
        capture: GraphCapture | None = None,
    ) -> None:
        self.unet = unet
        self.plan = plan
        self.max_cached_sizes = max_cached_sizes
        self.logs_new_sizes = True
        self._signature = inspect.signature(type(unet).forward)
        self._given_capture = capture
        self._captures: dict[torch.device, GraphCapture] = {}
        self._sizes: OrderedDict[Any, UNetCall] = OrderedDict()
        self._snapshot: ModelSnapshot | None = None
        self._said: set[str] = set()
        # A graph has one set of input tensors, and the routing tables belong to one call at a time.
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> UNet2DConditionOutput | tuple[Tensor]:
        """Run the UNet; the arguments and the result are those of its own `forward`."""
        with self._lock:
            unet = self.unet
            if unet.training:
                return unet._call_impl(*args, **kwargs)
            snapshot = self._current_snapshot()
            given = self._signature.bind(unet, *args, **kwargs).arguments
            del given["self"]
            return_dict = given.pop("return_dict", True)
            reason = "they may record gradients: call the UNet under torch.no_grad()"
            if not torch.is_grad_enabled():
                reason = snapshot.why_not_compilable() or _why_no_size(given)
            if reason is not None:
                self._say_once(f"Calls run uncompiled, as {reason}.")
                return unet._call_impl(*args, **kwargs)
            inputs = _plain_inputs(unet, given)
            # Within a pipeline call, the routing tables are precomputed already.
            embedding = unet.task_embedding_weight(unet.task_ids_device) if snapshot.routers else None
            capture = self._capture_of(inputs)
            # Graphs also read the routing tables, so those are written within the exclusive use.
            with (
                contextlib.nullcontext() if capture is None else capture.exclusive_use(),
                precomputed_tables_context(snapshot.routers, embedding),
            ):
                sample = self._run(inputs, capture)
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)

    def _current_snapshot(self) -> ModelSnapshot:
        if self._snapshot is None or not self._snapshot.matches_model():
            self._drop_sizes(keep=0)
            self._captures.clear()
            self._snapshot = ModelSnapshot(self.unet)
        return self._snapshot

    def _run(self, inputs: UNetInputs, capture: GraphCapture | None) -> Tensor:
        autocast = torch.is_autocast_enabled(inputs["sample"].device.type)
        size = (capture is not None, torch.is_inference_mode_enabled(), autocast, _size(inputs))
        if size in self._sizes:
            self._sizes.move_to_end(size)
            return self._sizes[size](inputs)
        if self.logs_new_sizes:
            is_full = len(self._sizes) >= self.max_cached_sizes
            full = f", in the place of another of at most {self.max_cached_sizes}" if is_full else ""
            _LOG.warning("New size, %s: it is prepared now%s; mtu.warmup does so beforehand.", _words(inputs), full)
        step = self._prepared(inputs, capture)
        sample = step(inputs)
        # A call that failed is not kept.
        self._sizes[size] = step
        self._drop_sizes(keep=self.max_cached_sizes)
        return sample

    def _drop_sizes(self, keep: int) -> None:
        if len(self._sizes) > keep:
            # Calls that still run on other streams read the memory of the graphs.
            for capture in self._captures.values():
                capture.synchronize()
        while len(self._sizes) > keep:
            self._sizes.popitem(last=False)

    def _prepared(self, inputs: UNetInputs, capture: GraphCapture | None) -> UNetCall:
        function = functools.partial(_fresh(_call), self.unet)
        if self.plan.compile_options is not None:
            function = torch.compile(function.func, fullgraph=True, dynamic=False, **self.plan.compile_options)
            function = functools.partial(function, self.unet)
        return function if capture is None else CapturedCall(function, inputs, capture)

    def _capture_of(self, inputs: UNetInputs) -> GraphCapture | None:
        """The capture for these inputs; None: they run without a graph."""
        if not self.plan.uses_cuda_graphs or self._why_no_graph(inputs) is not None:
            return None
        device = inputs["sample"].device
        if device not in self._captures:
            self._captures[device] = self._given_capture or CudaGraphCapture(device)
        return self._captures[device]

    def _why_no_graph(self, inputs: UNetInputs) -> str | None:
        device, reason = inputs["sample"].device, None
        if self._given_capture is None and device.type != "cuda":
            reason = f"the UNet is on {device} now"
        elif torch.is_autocast_enabled(device.type):
            reason = "autocast keeps casts of weights: cast the UNet instead"
        if reason is not None:
            self._say_once(f"Calls run without a CUDA graph, as {reason}.")
        return reason

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _LOG.warning(message)


def _call(unet: UNet2DConditionModel, inputs: UNetInputs) -> Tensor:
    return unet._call_impl(**inputs, return_dict=False)[0]


def _fresh(function: types.FunctionType) -> types.FunctionType:
    """A copy of a function with its own code object, by which torch.compile keeps and counts compiled versions."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _plain_inputs(unet: UNet2DConditionModel, given: UNetInputs) -> UNetInputs:
    """The arguments of a call in one form, which does not depend on tasks, scheduler or memory layout.

    `sample` gets the channels of the widest task, `timestep` becomes (B,) float32, and `task_ids` becomes (B,).
    """
    sample = given["sample"]
    rows, channels = sample.shape[:2]
    # An empty dictionary and None mean the same.
    inputs = {
        n: value for n, value in given.items() if value is not None and not (isinstance(value, dict) and not value)
    }
    if isinstance(unet, MTUUNet2DConditionModel):
        unet.conv_in.check_channel_count(channels)
        inputs["sample"] = F.pad(sample, (0, 0, 0, 0, 0, unet.conv_in.in_channels - channels))
        inputs["task_ids"] = unet.prepare_task_ids(given.get("task_ids"), sample)
    timestep = given["timestep"]
    if isinstance(timestep, Tensor) and timestep.device == sample.device:
        timestep = timestep.to(torch.float32).expand(rows)
    elif isinstance(timestep, Tensor) and timestep.numel() > 1:
        timestep = timestep.to(sample.device, torch.float32).expand(rows)
    else:
        # A number reaches the GPU as an argument of a kernel, so the host need not wait for it.
        timestep = torch.full((rows,), float(timestep), dtype=torch.float32, device=sample.device)
    inputs["timestep"] = timestep
    return tree_map_only(Tensor, lambda tensor: tensor.detach().contiguous(), inputs)


def _why_no_size(given: UNetInputs) -> str | None:
    for leaf in tree_leaves(given):
        if not isinstance(leaf, Hashable):
            return f"an argument holds a {type(leaf).__name__}, which cannot be told from others by its shape or value"
    return None


def _size(inputs: UNetInputs) -> tuple[Any, ...]:
    leaves, spec = tree_flatten(inputs)
    return str(spec), *(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )


def _words(inputs: UNetInputs) -> str:
    sample, text = inputs["sample"], inputs.get("encoder_hidden_states")
    rows, _, height, width = sample.shape
    dtype = str(sample.dtype).removeprefix("torch.")
    tokens = f" with {text.shape[1]} text tokens" if isinstance(text, Tensor) else ""
    return f"{rows} rows of {height}×{width} latents{tokens} in {dtype}"


def _unet_of(model: nn.Module | DiffusionPipeline) -> UNet2DConditionModel:
    unet = model.unet if isinstance(model, DiffusionPipeline) and hasattr(model, "unet") else model
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"Expected a UNet2DConditionModel or a pipeline with one, but got a {type(unet).__name__}.")
    return unet


def _rows(unet: UNet2DConditionModel, batch: int | tuple[str, ...]) -> int:
    if isinstance(batch, int):
        rows = batch
    else:
        if not isinstance(unet, MTUUNet2DConditionModel):
            raise ValueError(
                f"Only upcycled UNets have tasks, but got the tasks {batch!r} for a {type(unet).__name__}."
            )
        specs = [unet.tasks[unet.task_index(name)] for name in batch]
        embeds_guidance_scale = unet.config.time_cond_proj_dim is not None
        rows = sum(len(spec.guidance_branches(embeds_guidance_scale=embeds_guidance_scale)) for spec in specs)
    if rows < 1:
        raise ValueError(f"A batch has at least one row, but got {batch!r}.")
    return rows


@contextlib.contextmanager
def _unannounced(unet: UNet2DConditionModel) -> Iterator[None]:
    calls = unet._compiled_call_impl
    if not isinstance(calls, CompiledUNetCalls):
        yield
        return
    calls.logs_new_sizes = False
    try:
        yield
    finally:
        calls.logs_new_sizes = True
