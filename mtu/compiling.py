"""`mtu.compile`: a UNet compiled, and on a GPU captured, once for each size; switching tasks costs neither."""

import contextlib
import functools
import inspect
import logging
import time
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map_only
from tqdm.auto import tqdm

from mtu.graphs import Capture, Inputs, Parts, Replay, Step, cuda_graphs
from mtu.guidance import plan_guidance
from mtu.router import held
from mtu.unet import MTUUNet2DConditionModel

__all__ = ["CompiledCalls", "Plan", "compile", "warmup"]

_LOG = logging.getLogger("mtu")
_TEXT_TOKENS = 77
Model = TypeVar("Model", UNet2DConditionModel, DiffusionPipeline)


class Plan(NamedTuple):
    """How calls are run.

    Args:
        compile: arguments of `torch.compile`; None: not compiled.
        graphs: whether each size is captured in a CUDA graph.
    """

    compile: dict[str, Any] | None
    graphs: bool


_MODES = {
    "default": Plan({"mode": "default"}, graphs=False),
    "reduce-overhead": Plan({"mode": "default"}, graphs=True),
    "max-autotune": Plan({"mode": "max-autotune-no-cudagraphs"}, graphs=True),
    "max-autotune-no-cudagraphs": Plan({"mode": "max-autotune-no-cudagraphs"}, graphs=False),
    "cudagraphs": Plan(None, graphs=True),
    "eager": Plan(None, graphs=False),
}


def compile(model: Model, mode: str = "auto", *, max_sizes: int = 8) -> Model:
    """Have a UNet run by compiled code and CUDA graphs, whatever the tasks of a batch.

    A size is what the shapes and dtypes of a call's tensors are. Each is compiled and captured once, at its first call
    or in `mtu.warmup`. Tasks are tensors: switching them compiles and captures nothing. Calls that record gradients,
    and models in training mode, run as before. Outputs are never overwritten by later calls.

    Routers run again when a version counter of their parameters changes; after writes through `.data` call
    `unet.invalidate_routing_cache()`. Changes that no tensor or module shows (hooks, Python attributes of your own)
    need another `mtu.compile`.

    Args:
        model: an upcycled or a stock UNet, or a pipeline with one; changed in place. Its weights become channels-last,
            with the same values.
        mode: "default", "reduce-overhead", "max-autotune" and "max-autotune-no-cudagraphs" as in `torch.compile`, the
            graphs of the second and third being captured here; "cudagraphs": graphs of the uncompiled kernels;
            "eager": neither, which takes an earlier mode back. "auto": "reduce-overhead" on CUDA devices, and
            elsewhere "eager", which is the fastest on CPUs.
        max_sizes: how many sizes are kept; the least recently used one goes first.

    Returns:
        The same model.

    Raises:
        ValueError: no UNet, an unknown mode, a mode that the UNet's device cannot run, or a model whose weights are
            moved by hooks (offloading).
    """
    unet = _unet_of(model)
    if mode != "auto" and mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(('auto', *_MODES))}, but got {mode!r}.")
    if not isinstance(max_sizes, int) or max_sizes < 1:
        raise ValueError(f"max_sizes must be an integer ≥ 1, but got {max_sizes!r}.")
    if any(hasattr(module, "_hf_hook") for module in unet.modules()):
        raise ValueError(
            "A model that stays on its device is needed, but this UNet is offloaded: compile one that is not."
        )
    on_cuda = unet.device.type == "cuda"
    plan = _MODES[("reduce-overhead" if on_cuda else "eager") if mode == "auto" else mode]
    if plan.graphs and not on_cuda:
        raise ValueError(f"mode={mode!r} needs a UNet on a CUDA device, but this one is on {unet.device}.")
    unet.to(memory_format=torch.channels_last)
    # The place where `nn.Module.compile` puts what calls go through.
    unet._compiled_call_impl = None if plan == _MODES["eager"] else CompiledCalls(unet, plan, max_sizes)
    return model


def warmup(
    model: UNet2DConditionModel | DiffusionPipeline,
    batches: Sequence[int | Sequence[str]],
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
) -> dict[int | tuple[str, ...], float]:
    """Run one step at each size that is to come, so that nothing is compiled or captured later.

    Args:
        model: what `mtu.compile` returned.
        batches: of each size the rows of the UNet's batch; or the tasks of its samples, whose guidance branches are the
            rows (by the tasks' own guidance scales).
        height, width: of the pictures in pixels for a pipeline, of the latents for a UNet; None: the model's own.
        text_tokens: of a prompt; None: those of the pipeline's tokenizer, or 77.

    Returns:
        The seconds that each of `batches` took.

    Raises:
        ValueError: a batch without rows, an unknown task, or a size that is no multiple of the VAE's factor.
    """
    unet = _unet_of(model)
    factor = model.vae_scale_factor if isinstance(model, DiffusionPipeline) else 1
    size = unet.config.sample_size
    own = (size, size) if isinstance(size, int) else tuple(size)
    edges = [latents * factor if given is None else given for given, latents in zip((height, width), own, strict=True)]
    if any(not isinstance(edge, int) or edge < factor or edge % factor for edge in edges):
        raise ValueError(f"height and width must be positive multiples of {factor}, but got {edges[0]} and {edges[1]}.")
    if text_tokens is None:
        text_tokens = getattr(getattr(model, "tokenizer", None), "model_max_length", _TEXT_TOKENS)
    names = [batch if isinstance(batch, int) else tuple(batch) for batch in batches]
    rows = [_rows(unet, name) for name in names]
    seconds = {}
    with tqdm(zip(names, rows, strict=True), total=len(names), desc="warm-up", unit="size") as progress:
        for name, count in progress:
            progress.set_postfix_str(f"{count} rows of {edges[0]}×{edges[1]}")
            inputs = _example(unet, count, *(edge // factor for edge in edges), text_tokens)
            start = time.perf_counter()
            with torch.no_grad(), _unannounced(unet):
                unet(**inputs)
            if unet.device.type == "cuda":
                torch.cuda.synchronize(unet.device)
            seconds[name] = time.perf_counter() - start
    return seconds


class CompiledCalls:
    """What the calls of a UNet go through: one compiled and captured step for each size.

    Args:
        unet: the UNet.
        plan: how a size is prepared.
        max_sizes: how many are kept.
        capture: makes a graph; by default a CUDA graph on the UNet's device.
    """

    def __init__(self, unet: UNet2DConditionModel, plan: Plan, max_sizes: int, capture: Capture | None = None) -> None:
        self.unet = unet
        self.plan = plan
        self.max_sizes = max_sizes
        self.announces = True
        self._signature = inspect.signature(type(unet).forward)
        self._capture = cuda_graphs(unet.device) if capture is None and plan.graphs else capture
        self._sizes: OrderedDict[Any, Step] = OrderedDict()
        self._parts: Parts | None = None
        self._said: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> UNet2DConditionOutput | tuple[Tensor]:
        """As the UNet's own `forward`."""
        unet = self.unet
        if unet.training or (reason := self._why_uncompiled()) is not None:
            if not unet.training:
                self._say_once(f"Calls run uncompiled, as {reason}.")
            return unet._call_impl(*args, **kwargs)
        given = self._signature.bind(unet, *args, **kwargs).arguments
        del given["self"]
        return_dict = given.pop("return_dict", True)
        inputs = _plain_inputs(unet, given)
        if self._parts is None or not self._parts.are_current():
            self._sizes.clear()
            self._parts = Parts(unet)
        embedding = unet.embedding_table(unet.task_device) if self._parts.routers else None
        # In a pipeline the tables are held already.
        with held(self._parts.routers, embedding, trust_versions=True):
            sample = self._step(inputs)(inputs)
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)

    def _step(self, inputs: Inputs) -> Step:
        graph = self.plan.graphs and self._why_no_graph() is None
        size = (
            graph,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(self.unet.device.type),
            _size(inputs),
        )
        if size in self._sizes:
            self._sizes.move_to_end(size)
            return self._sizes[size]
        if self.announces:
            full = f", in the place of another of at most {self.max_sizes}" * (len(self._sizes) >= self.max_sizes)
            _LOG.warning("New size, %s: it is prepared now%s; mtu.warmup does so beforehand.", _words(inputs), full)
        while len(self._sizes) >= self.max_sizes:
            self._sizes.popitem(last=False)
        step = self._prepared(inputs, graph)
        self._sizes[size] = step
        return step

    def _prepared(self, inputs: Inputs, graph: bool) -> Step:
        function = functools.partial(_fresh(_call), self.unet)
        if self.plan.compile is not None:
            function = torch.compile(function.func, fullgraph=True, dynamic=False, **self.plan.compile)
            function = functools.partial(function, self.unet)
        return Replay(function, inputs, self._capture) if graph else function

    def _why_uncompiled(self) -> str | None:
        if torch.is_grad_enabled():
            return "they may record gradients: call the UNet under torch.no_grad()"
        # Offloading replaces it.
        if "forward" in vars(self.unet):
            return "the UNet's forward was replaced by another, as offloading does"
        return None

    def _why_no_graph(self) -> str | None:
        reason = None
        if getattr(self.unet, "_hf_peft_config_loaded", False):
            reason = "an adapter's strength is no tensor: fuse the adapter, or unload it"
        elif torch.is_autocast_enabled(self.unet.device.type):
            reason = "autocast keeps casts of weights: cast the UNet instead"
        if reason is not None:
            self._say_once(f"Calls run without a CUDA graph, as {reason}.")
        return reason

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _LOG.warning(message)


def _call(unet: UNet2DConditionModel, inputs: Inputs) -> Tensor:
    return unet._call_impl(**inputs, return_dict=False)[0]


def _fresh(function: types.FunctionType) -> types.FunctionType:
    """The same function with code of its own: compilers keep what they made by code, and count how often they did."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _plain_inputs(unet: UNet2DConditionModel, given: Inputs) -> Inputs:
    """The arguments of a call in the form that they are compiled for, whatever the tasks, the scheduler and the layout.

    `sample` has the channels of the widest task, `timestep` is (B,) float32, `task_ids` is (B,).
    """
    sample = given["sample"]
    rows, channels = sample.shape[:2]
    inputs = {name: value for name, value in given.items() if value is not None}
    if isinstance(unet, MTUUNet2DConditionModel):
        unet.conv_in.check_channels(channels)
        inputs["sample"] = F.pad(sample, (0, 0, 0, 0, 0, unet.conv_in.in_channels - channels))
        inputs["task_ids"] = unet.checked_task_ids(given.get("task_ids"), sample)
    timestep = given["timestep"]
    if isinstance(timestep, Tensor) and timestep.device == sample.device:
        timestep = timestep.to(torch.float32).expand(rows)
    elif isinstance(timestep, Tensor) and timestep.numel() > 1:
        timestep = timestep.to(sample.device, torch.float32).expand(rows)
    else:
        # A number reaches a GPU as an argument of a kernel, for which the host need not wait.
        timestep = torch.full((rows,), float(timestep), dtype=torch.float32, device=sample.device)
    inputs["timestep"] = timestep
    return tree_map_only(Tensor, lambda tensor: tensor.detach().contiguous(), inputs)


def _size(inputs: Inputs) -> tuple[Any, ...]:
    leaves, spec = tree_flatten(inputs)
    return str(spec), *(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )


def _words(inputs: Inputs) -> str:
    sample, text = inputs["sample"], inputs["encoder_hidden_states"]
    rows, _, height, width = sample.shape
    dtype = str(sample.dtype).removeprefix("torch.")
    return f"{rows} rows of {height}×{width} latents with {text.shape[1]} text tokens in {dtype}"


def _unet_of(model: nn.Module | DiffusionPipeline) -> UNet2DConditionModel:
    unet = model.unet if isinstance(model, DiffusionPipeline) and hasattr(model, "unet") else model
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"A UNet2DConditionModel or a pipeline with one is needed, but got a {type(unet).__name__}.")
    return unet


def _rows(unet: UNet2DConditionModel, batch: int | tuple[str, ...]) -> int:
    if isinstance(batch, int):
        rows = batch
    else:
        if not isinstance(unet, MTUUNet2DConditionModel):
            raise ValueError(f"Names of tasks are for upcycled UNets, but got {batch!r} for a {type(unet).__name__}.")
        specs = [unet.tasks[unet.task_index(name)] for name in batch]
        scales = [[getattr(spec, name) or 1.0 for spec in specs] for name in ("guidance_scale", "image_guidance_scale")]
        rows = len(plan_guidance(specs, *scales).samples) if specs else 0
    if rows < 1:
        raise ValueError(f"A batch has at least one row, but got {batch!r}.")
    return rows


def _example(unet: UNet2DConditionModel, rows: int, height: int, width: int, text_tokens: int) -> Inputs:
    """Arguments of a call of this size."""
    config = unet.config

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=unet.dtype, device=unet.device)

    inputs = {
        "sample": zeros(rows, config.in_channels, height, width),
        "timestep": torch.zeros((), device=unet.device),
        "encoder_hidden_states": zeros(rows, text_tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        numbers = 6
        pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(rows, pooled), "time_ids": zeros(rows, numbers)}
    return inputs


@contextlib.contextmanager
def _unannounced(unet: UNet2DConditionModel) -> Iterator[None]:
    calls = unet._compiled_call_impl
    if not isinstance(calls, CompiledCalls):
        yield
        return
    calls.announces = False
    try:
        yield
    finally:
        calls.announces = True
