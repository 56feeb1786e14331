"""`upcycle` and `load_trained`: a stock UNet or pipeline becomes a multi-task one.

This module checks the arguments, computes the new tensors, and assigns them and the stock tensors to an empty upcycled
UNet. The layers of that UNet are built in `mtu.models`: the constructor of `MTUUNet2DConditionModel` replaces the stock
blocks and the input convolution.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterable
from typing import Literal, overload

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import mtu_kernels
from mtu.compat.plain_linear import has_replaced_forward
from mtu.compat.private_interfaces import has_accelerate_hook
from mtu.experts import ExpertConfig, NormMode, stock_config
from mtu.models import partial_checkpoints
from mtu.models.ffn import Backend, check_unet_upcyclable
from mtu.models.initial_routing import count_experts_with_proportional_weights, initial_router_state_dict
from mtu.models.settings import copy_settings_, unfused_state_dict
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.pipelines import MTUPipeline
from mtu.pipelines.conversion import check_pipeline_not_offloaded, pipeline_with_class_and_unet
from mtu.tasks import SD_TASKS, SDXL_TASKS, TaskSpec, as_task_specs

__all__ = ["load_trained", "upcycle"]

InitMode = Literal["preserve", "paper"]


@overload
def upcycle(
    unet_or_pipeline: UNet2DConditionModel,
    tasks: Iterable[TaskSpec | str] | None = None,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    expert_ratio: float | None = None,
    norm: NormMode = "task",
    init: InitMode = "preserve",
    backend: Backend = "auto",
    seed: int = 0,
) -> MTUUNet2DConditionModel: ...


@overload
def upcycle(
    unet_or_pipeline: StableDiffusionPipeline,
    tasks: Iterable[TaskSpec | str] | None = None,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    expert_ratio: float | None = None,
    norm: NormMode = "task",
    init: InitMode = "preserve",
    backend: Backend = "auto",
    seed: int = 0,
) -> MTUPipeline: ...


def upcycle(
    unet_or_pipeline: UNet2DConditionModel | StableDiffusionPipeline,
    tasks: Iterable[TaskSpec | str] | None = None,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    expert_ratio: float | None = None,
    norm: NormMode = "task",
    init: InitMode = "preserve",
    backend: Backend = "auto",
    seed: int = 0,
) -> MTUUNet2DConditionModel | MTUPipeline:
    """Upcycle a pre-trained UNet: split its feed-forward networks into experts, and give each task its own layers.

        y = Σ_e w_te · W_out,e (u_e · gelu(g_e)) + b_out,   w_t = routing_scale · softmax(MLP(e_t))

    Each task gets its own LayerNorms and its own input convolution, and all other weights are frozen. The new model
    takes over the weights without copying them, so do not use the original afterwards.

    Args:
        unet_or_pipeline: a Stable Diffusion UNet (1.5, XL, or of that family), on any device, also meta; or a
            `StableDiffusionPipeline`, whose UNet is upcycled and whose other components are kept.
        tasks: `TaskSpec`s or built-in names; None: text-to-image, edit, super-resolution and remove.
        num_experts: E; None: the paper's best, 4, and 1 for SDXL.
        top_k: the number of active experts per task; None: all (dense routing).
        expert_ratio: G, the hidden width of an expert / that of the whole FFN; None: 1/E, which keeps the parameter
            count.
        norm: "task" for one LayerNorm per task, or "task_expert" for one per task and expert.
        init: "preserve" keeps the output of the original; "paper" is the plain split (routing_scale = 1).
        backend: how the FFNs are computed: "auto", "eager", "triton" or "cpp" ("reference" is slow, for tests).
        seed: the seed for the initial values of routers and task embedding.

    Returns:
        The upcycled model, on the same device and in the same dtype; for a pipeline, an `MTUPipeline`.

    Raises:
        TypeError: the first argument is neither a UNet nor a `StableDiffusionPipeline`.
        ValueError: an argument is out of range, the UNet has no FFNs, or it is upcycled already.
        RuntimeError: the backend is not part of this installation.

    Source: MTU (arXiv 2503.11905) §3.

    Example:
        >>> unet = UNet2DConditionModel.from_pretrained("…/stable-diffusion-v1-5", subfolder="unet")
        >>> unet = mtu.upcycle(unet, tasks=["text-to-image", "edit"], num_experts=4)
        >>> noise = unet(latents, timestep, text, task_ids=unet.task_ids(["edit", "text-to-image"])).sample
    """
    pipeline = unet_or_pipeline if isinstance(unet_or_pipeline, DiffusionPipeline) else None
    unet = unet_or_pipeline if pipeline is None else _unet_of(pipeline, "upcycle")
    specs, config = _resolve(unet, tasks, num_experts, top_k, expert_ratio, norm, init)
    mtu_kernels.check_backend(backend)
    reason = config.why_output_not_preserved() if init == "preserve" else None
    if reason is not None:
        warnings.warn(f"The output of the original cannot be preserved: {reason}.", UserWarning, stacklevel=2)

    upcycled = _convert(unet, specs, config, preserve=init == "preserve", seed=seed)
    upcycled.set_backend(backend)
    _warn_of_wasted_experts(upcycled)
    return upcycled if pipeline is None else pipeline_with_class_and_unet(pipeline, MTUPipeline, upcycled)


def _unet_of(pipeline: DiffusionPipeline, verb: str) -> UNet2DConditionModel:
    if type(pipeline) is not StableDiffusionPipeline and not isinstance(pipeline, MTUPipeline):
        raise TypeError(f"{verb} takes a UNet or a StableDiffusionPipeline, but got a {type(pipeline).__name__}.")
    if isinstance(pipeline.unet, MTUUNet2DConditionModel) and not isinstance(pipeline, MTUPipeline):
        raise ValueError(
            "The UNet of this pipeline is upcycled already: mtu.MTUPipeline.from_pipe(pipe) makes a multi-task "
            f"pipeline of it, where {verb} expects a stock UNet."
        )
    check_pipeline_not_offloaded(pipeline)
    return pipeline.unet


@overload
def load_trained(
    unet_or_pipeline: UNet2DConditionModel, directory: str | os.PathLike, *, backend: Backend = "auto"
) -> MTUUNet2DConditionModel: ...


@overload
def load_trained(
    unet_or_pipeline: StableDiffusionPipeline, directory: str | os.PathLike, *, backend: Backend = "auto"
) -> MTUPipeline: ...


def load_trained(
    unet_or_pipeline: UNet2DConditionModel | StableDiffusionPipeline,
    directory: str | os.PathLike,
    *,
    backend: Backend = "auto",
) -> MTUUNet2DConditionModel | MTUPipeline:
    """Upcycle a base UNet with the settings that `save_trained` saved, and load the trained parameters into it.

    Args:
        unet_or_pipeline: the base UNet, or a `StableDiffusionPipeline` with it, whose other components are kept.
        directory: the folder that `save_trained` wrote into.
        backend: "auto", "eager", "triton", "cpp" or "reference".

    Returns:
        The model; for a pipeline, an `MTUPipeline`.

    Raises:
        TypeError: the first argument is neither a UNet nor a `StableDiffusionPipeline`.
        ValueError: the checkpoint is of another architecture, or a file is truncated or altered.
        RuntimeError: the backend is not part of this installation.

    Example:
        >>> mtu.upcycle(base_unet).save_trained("trained")
        >>> unet = mtu.load_trained(another_copy_of_the_base_unet, "trained")
    """
    pipeline = unet_or_pipeline if isinstance(unet_or_pipeline, DiffusionPipeline) else None
    unet = unet_or_pipeline if pipeline is None else _unet_of(pipeline, "load_trained")
    mtu_kernels.check_backend(backend)
    _check_stock(unet)
    specs, config, tensors = partial_checkpoints.read_tasks_layout_and_trained_parameters(directory, stock_config(unet))
    # A model without memory tells whether the tensors fit, before the UNet changes.
    expected = {name: p.shape for name, p in _skeleton(unet, specs, config).named_trainable_parameters()}
    partial_checkpoints.check_tensor_names_and_shapes(expected, tensors, directory)
    upcycled = _convert(unet, specs, config, preserve=False, seed=0)
    upcycled.load_state_dict({k: v.to(unet.device, unet.dtype) for k, v in tensors.items()}, strict=False)
    upcycled.set_backend(backend)
    return upcycled if pipeline is None else pipeline_with_class_and_unet(pipeline, MTUPipeline, upcycled)


def _skeleton(unet: UNet2DConditionModel, specs: tuple[TaskSpec, ...], config: ExpertConfig) -> MTUUNet2DConditionModel:
    """The upcycled architecture of a stock UNet, on the meta device, without values."""
    with init_empty_weights():
        return MTUUNet2DConditionModel(**stock_config(unet), tasks=specs, **dataclasses.asdict(config))


def _convert(
    unet: UNet2DConditionModel, specs: tuple[TaskSpec, ...], config: ExpertConfig, *, preserve: bool, seed: int
) -> MTUUNet2DConditionModel:
    """Build the upcycled model on the tensors of the stock one, which must not be used afterwards."""
    upcycled = _skeleton(unet, specs, config)
    state = unfused_state_dict(unet)
    _check_same_keys(upcycled, state)
    new = _new_state(upcycled, state, config, preserve=preserve, seed=seed)
    merged = {**state, **new}
    for name, tensor in upcycled.state_dict().items():
        if merged[name].shape != tensor.shape:
            raise ValueError(
                f"{name} must have shape {tuple(tensor.shape)} by the UNet's configuration, but got "
                f"{tuple(merged[name].shape)}."
            )
    copy_settings_(unet, upcycled)
    upcycled.load_state_dict(merged, assign=True)
    upcycled.freeze_stock_parameters_()
    return upcycled


def _resolve(
    unet: UNet2DConditionModel,
    tasks: Iterable[TaskSpec | str] | None,
    num_experts: int | None,
    top_k: int | None,
    expert_ratio: float | None,
    norm: NormMode,
    init: InitMode,
) -> tuple[tuple[TaskSpec, ...], ExpertConfig]:
    """Check the arguments against the UNet and fill in the defaults."""
    _check_stock(unet)
    if init not in ("preserve", "paper"):
        raise ValueError(f"init must be 'preserve' or 'paper', but got {init!r}.")
    is_xl = unet.config.addition_embed_type == "text_time"
    built_in = SDXL_TASKS if is_xl else SD_TASKS
    specs = built_in if tasks is None else as_task_specs(tasks, built_in)
    num_experts = (1 if is_xl else 4) if num_experts is None else num_experts
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts must be an integer ≥ 1, but got {num_experts!r}.")
    ratio = 1.0 / num_experts if expert_ratio is None else expert_ratio
    preserving = init == "preserve" and isinstance(ratio, int | float) and ratio > 0  # ExpertConfig refuses others
    width = unet.config.cross_attention_dim
    config = ExpertConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_ratio=ratio,
        norm=norm,
        routing_scale=1.0 / ratio if preserving else 1.0,
        router_width=max(width) if isinstance(width, list | tuple) else width,
    )
    return specs, config


def _check_stock(unet: object) -> None:
    if isinstance(unet, MTUUNet2DConditionModel):
        raise ValueError(
            f"This UNet is upcycled already (tasks {[spec.name for spec in unet.tasks]}): expected a stock UNet."
        )
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"upcycle takes a UNet2DConditionModel, but got {type(unet).__name__}.")
    check_unet_upcyclable(unet)
    if unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"upcycle starts from a text-to-image UNet with {unet.config.out_channels} input channels, but got "
            f"{unet.config.in_channels} (an editing or inpainting UNet)."
        )
    if any(module._compiled_call_impl is not None for module in unet.modules()):
        raise ValueError("upcycle takes a UNet that is not compiled: compile the upcycled one, with mtu.compile.")
    # The upcycled model is built from the tensors alone, so hooks and other changes to the modules would be lost.
    hooked = [name for name, m in unet.named_modules() if has_accelerate_hook(m) or has_replaced_forward(m)]
    dtypes = {parameter.dtype for parameter in unet.parameters()}
    devices = {parameter.device.type for parameter in unet.parameters()}
    if hooked or not dtypes <= {torch.float64, torch.float32, torch.bfloat16, torch.float16} or len(devices) > 1:
        raise ValueError(
            "upcycle takes a UNet that is wholly in one place, before offloading, quantization or layerwise casting, "
            f"but got {len(hooked)} hooked modules and parameters of {sorted(map(str, dtypes))} on {sorted(devices)}."
        )


def _check_same_keys(upcycled: MTUUNet2DConditionModel, state: dict[str, Tensor]) -> None:
    own = {k for k in upcycled.state_dict() if ".ff.router." not in k and k != "task_embedding.weight"}
    different = own.symmetric_difference(state)
    if different:
        raise ValueError(
            f"Unload or fuse adapters before upcycling: {len(different)} parameters are not those of a stock UNet, "
            f"for example {sorted(different)[0]!r}."
        )


@torch.no_grad()
def _new_state(
    upcycled: MTUUNet2DConditionModel, state: dict[str, Tensor], config: ExpertConfig, *, preserve: bool, seed: int
) -> dict[str, Tensor]:
    """The tensors of an upcycled model that the stock one lacks, or has in another shape or with other values."""
    generator = torch.Generator().manual_seed(seed)
    like = state["conv_in.weight"]
    if like.is_meta:
        own = upcycled.state_dict()
        return {k: v.to(like.dtype) for k, v in own.items() if k not in state or v.shape != state[k].shape}
    num_tasks, new = len(upcycled.tasks), {}
    embedding = torch.empty(num_tasks, config.router_width).normal_(generator=generator)
    new["task_embedding.weight"] = embedding.to(like)
    conv = like.new_zeros(num_tasks, like.shape[0], upcycled.conv_in.in_channels, *like.shape[2:])
    conv[:, :, : like.shape[1]] = like
    new["conv_in.weight"] = conv
    new["conv_in.bias"] = state["conv_in.bias"].repeat(num_tasks, 1)
    for name, block in upcycled.routed_blocks_by_name().items():
        for key in ("weight", "bias"):
            shape = getattr(block.norm3, key).shape
            new[f"{name}.norm3.{key}"] = state[f"{name}.norm3.{key}"].expand(shape).clone()
        for key, tensor in initial_router_state_dict(config, embedding, generator).items():
            new[f"{name}.ff.router.{key}"] = tensor.to(like)
        new.update(_resized_experts(name, state, config, preserve=preserve))
    return new


def _resized_experts(name: str, state: dict[str, Tensor], config: ExpertConfig, *, preserve: bool) -> dict[str, Tensor]:
    """The FFN tensors of block `name`; an empty dictionary if the experts simply partition the stock units."""
    in_weight, in_bias, out_weight = (f"{name}.ff.net.{key}" for key in ("0.proj.weight", "0.proj.bias", "2.weight"))
    stock_hidden_width = state[out_weight].shape[1]
    units, scale = config.stock_unit_indices(stock_hidden_width), None
    if preserve:
        scale = config.output_column_scales(stock_hidden_width)
    if units is None and scale is None:
        return {}
    units = torch.arange(stock_hidden_width) if units is None else units
    units = units.to(state[out_weight].device)
    rows = torch.cat([units, units + stock_hidden_width])
    columns = state[out_weight][:, units]
    if scale is not None:
        columns = (columns.float() * scale.to(columns.device).float()).to(columns.dtype)
    return {in_weight: state[in_weight][rows], in_bias: state[in_bias][rows], out_weight: columns}


def _warn_of_wasted_experts(upcycled: MTUUNet2DConditionModel) -> None:
    config, num_tasks = upcycled.expert_config, len(upcycled.tasks)
    if config.num_experts == 1 or (config.has_dense_routing and not config.experts_hold_whole_ffn):
        return
    if num_tasks * config.num_active_experts < config.num_experts or upcycled.conv_in.weight.is_meta:
        return  # The model is made for more tasks than it has yet, or it has no values.
    weights = upcycled.router_weights()
    idle = int((weights == 0).all(dim=1).any(dim=1).sum())
    if idle:
        warnings.warn(
            f"In {idle} of {len(weights)} layers some expert is used by no task, and will get no gradient; another "
            "seed may spread them better.",
            UserWarning,
            stacklevel=3,
        )
    alike = int((count_experts_with_proportional_weights(weights) > 0).sum()) if config.experts_hold_whole_ffn else 0
    if alike:
        warnings.warn(
            f"In {alike} of {len(weights)} layers some experts start alike with weights in proportion to each other's "
            f"(tasks: {num_tasks}), so that optimizers such as Adam move them alike; expected more tasks, fewer "
            "experts, or expert_ratio < 1.",
            UserWarning,
            stacklevel=3,
        )
