"""The UNets that are measured, the original and those made from it; their inputs; and their reference outputs."""

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import mtu
from benchmarks.harness.correctness import check_close
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.workloads import Setting, Workload
from mtu.example_inputs import make_example_inputs
from mtu.inspection import BUILT_IN_UNET_CONFIGS
from mtu.tasks import SD_TASKS, SDXL_TASKS, TaskSpec

# For smoke tests: two levels of the published models, on a few channels.
_TINY = {"norm_num_groups": 8, "cross_attention_dim": 32, "layers_per_block": 1, "block_out_channels": (32, 64)}
_TINY_SD = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TINY_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}
# Arguments of the original's class. Weights are random, since their values make no difference to time.
MODELS: dict[str, dict[str, Any]] = {
    "sd15": BUILT_IN_UNET_CONFIGS["sd15"],
    "sdxl": BUILT_IN_UNET_CONFIGS["sdxl"],
    "tiny": BUILT_IN_UNET_CONFIGS["sd15"] | _TINY | _TINY_SD,
    "tiny-xl": BUILT_IN_UNET_CONFIGS["sdxl"] | _TINY | _TINY_XL,
}
_SMOKE_TESTS = ("tiny", "tiny-xl")
# Pixels per latent.
LATENT_FACTOR = 8
TASKS = len(SD_TASKS)
_TIMESTEP = 500
# Distance of two pictures' seeds; guidance has fewer branches.
_MOST_BRANCHES = 8

Unet = TypeVar("Unet", bound=UNet2DConditionModel)


def task_specs_of(model: str) -> tuple[TaskSpec, ...]:
    """The paper's tasks as they are sampled on this model."""
    return SDXL_TASKS if MODELS[model].get("addition_embed_type") == "text_time" else SD_TASKS


def default_num_experts(model: str) -> int:
    """E of the paper's best layout."""
    return 1 if task_specs_of(model) is SDXL_TASKS else 4


def picture_edge(model: str) -> int:
    """Edge of the pictures that the model was made for, in pixels; 64 for the tiny models."""
    return 64 if model in _SMOKE_TESTS else LATENT_FACTOR * MODELS[model]["sample_size"]


@functools.cache
def _without_weights(model: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**MODELS[model])


def check_setting(model: str, setting: Setting) -> None:
    """Raises ValueError if a model cannot be upcycled to these experts, without making weights."""
    with torch.device("meta"):
        original = UNet2DConditionModel(**MODELS[model])
    mtu.upcycle(original, num_experts=setting.E, top_k=setting.K, init="paper", backend="eager")


@torch.no_grad()
def build_original(model: str, dtype: str, device: torch.device) -> UNet2DConditionModel:
    """The stock UNet with seeded random weights, in eval mode, drawn on their device and in their dtype.

    Norms are not 1 and 0, which would hide that a contender forgets them. Layers keep the variance of their inputs, so
    that each layer matters to the output.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[model])
    # Never in float32: while it is cast, SDXL would need four times the memory that it needs then.
    _cast(unet, DTYPES[dtype]).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for module in unet.modules():
        is_norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                bound = (3 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
        if is_norm:
            module.weight.add_(1)
    return unet


def copy_unet_sharing_weights(unet: Unet) -> Unet:
    """A copy of a UNet on the same memory. Changes of its modules and parameters leave the other one unchanged."""
    tensors: dict[int, Tensor] = {id(t): nn.Parameter(t.detach(), requires_grad=False) for t in unet.parameters()}
    tensors |= {id(t): t.detach() for t in unet.buffers()}
    return copy.deepcopy(unet, tensors)


class UNetFamily:
    """The original and the UNets made from it, each once: contenders share the weights that they do not change."""

    def __init__(self, model: str, dtype: str, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._upcycled: dict[Setting, mtu.MTUUNet2DConditionModel] = {}
        self._fine_tuned: dict[int, UNet2DConditionModel] = {}

    @functools.cached_property
    def _original(self) -> UNet2DConditionModel:
        return build_original(self.model, self.dtype, self.device)

    @functools.cached_property
    def _folded(self) -> mtu.MTUUNet2DConditionModel:
        task = task_specs_of(self.model)[0]
        exported = self.new_upcycled(Setting(default_num_experts(self.model)), "eager").export_task(task.name)
        return mtu.upcycle(exported, [task], num_experts=1, backend="eager").requires_grad_(False)

    def new_original(self) -> UNet2DConditionModel:
        """The stock UNet."""
        return copy_unet_sharing_weights(self._original)

    def new_upcycled(self, setting: Setting, backend: str, routers: bool = False) -> mtu.MTUUNet2DConditionModel:
        """The original upcycled to the paper's four tasks, in eval mode; routers are dropped, as for deployment.

        Raises:
            RuntimeError: the backend is not part of this installation.
        """
        setting = setting._replace(tasks=1)
        if setting not in self._upcycled:
            with warnings.catch_warnings():
                # Top-k routing does not preserve the original, and may leave experts without a task: neither matters.
                warnings.simplefilter("ignore", UserWarning)
                unet = mtu.upcycle(self.new_original(), num_experts=setting.E, top_k=setting.K, backend="eager")
            self._upcycled[setting] = unet.requires_grad_(False)
        return _deployed(copy_unet_sharing_weights(self._upcycled[setting]), backend, routers)

    def new_folded(self, backend: str) -> mtu.MTUUNet2DConditionModel:
        """One task of the upcycled UNet, folded into plain layers and upcycled again to one expert."""
        return _deployed(copy_unet_sharing_weights(self._folded), backend, routers=False)

    def fine_tuned_unet(self, task: int) -> UNet2DConditionModel:
        """A stock UNet of one task, with memory of its own; the same one at every call."""
        if task not in self._fine_tuned:
            self._fine_tuned[task] = copy.deepcopy(self._original)
        return self._fine_tuned[task]


def _deployed(unet: mtu.MTUUNet2DConditionModel, backend: str, routers: bool) -> mtu.MTUUNet2DConditionModel:
    unet.set_backend(backend)
    if not routers:
        unet.drop_routers_()
    return unet


class Batch(NamedTuple):
    """The inputs of a step.

    Attributes:
        inputs: arguments of the UNet, their rows in the order of pictures; `sample` with the channels of all tasks.
        task_of_row: the task of each row.
        branches: rows of each picture.
    """

    inputs: dict[str, Any]
    task_of_row: tuple[int, ...]
    branches: int


def draw_batch(workload: Workload, device: torch.device, tasks: int, first: int = 0) -> Batch:
    """A batch of random numbers; those of a picture's branch are the same in every batch of its size and dtype.

    Pictures take turns at so many `tasks`, from the task `first` on; as `first` increases, all of the model's occur.
    """
    specs, edge = task_specs_of(workload.model), workload.size // LATENT_FACTOR
    channels = 4 + max(spec.condition_channels for spec in specs)
    example = make_example_inputs(_without_weights(workload.model), height=edge, width=edge, channels=channels)
    example |= example.pop("added_cond_kwargs", {})
    drawn = [name for name in ("sample", "encoder_hidden_states", "text_embeds") if name in example]
    rows = []
    for picture in range(workload.B):
        for branch in range(workload.branches):
            generator = torch.Generator().manual_seed(picture * _MOST_BRANCHES + branch)
            rows.append({name: torch.randn(example[name].shape[1:], generator=generator) for name in drawn})
    inputs: dict[str, Any] = {
        name: torch.stack([row[name] for row in rows]).to(device, DTYPES[workload.dtype]) for name in drawn
    }
    if "text_embeds" in inputs:
        time_ids = torch.tensor([workload.size, workload.size, 0, 0, workload.size, workload.size])
        time_ids = time_ids.to(inputs["text_embeds"]).repeat(workload.rows, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": inputs.pop("text_embeds"), "time_ids": time_ids}
    inputs["timestep"] = torch.tensor(_TIMESTEP, device=device)
    of_pictures = [(first + picture % tasks) % len(specs) for picture in range(workload.B)]
    return Batch(inputs, tuple(task for task in of_pictures for _ in range(workload.branches)), workload.branches)


def select_rows(batch: Batch, rows: Sequence[int], channels: int) -> dict[str, Any]:
    """Arguments of a call for some rows, copied; `sample` has so many channels."""

    def taken(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: taken(tensor) for name, tensor in value.items()}
        return value if value.dim() == 0 else value[list(rows)]

    inputs = {name: taken(value) for name, value in batch.inputs.items()}
    return inputs | {"sample": inputs["sample"][:, :channels].contiguous()}


class ReferenceOutputs(NamedTuple):
    """Outputs for the first branch of the first few pictures, which a contender's are compared with.

    Attributes:
        dtype: of the contender.
        user_output: in that dtype, computed by the code whose error sets the tolerance.
        exact_output: by the same code and weights in a wider dtype.
    """

    dtype: torch.dtype
    user_output: Tensor
    exact_output: Tensor

    def check_output(self, output: Tensor, branches: int) -> None:
        """Asserts ``max|output − exact| <= 2 · max|user − exact| + ulp · max|exact|`` for an output of all rows.

        Raises:
            WrongResult: one sentence with the error and the tolerance.
        """
        compared = output[::branches][: len(self.exact_output)]
        user, exact = self.user_output[: len(compared)], self.exact_output[: len(compared)]
        # NaN in other rows counts, too.
        compared = torch.where(output.isfinite().all(), compared, torch.nan)
        check_close("the UNet's output", compared, user, exact, self.dtype, torch.finfo(self.dtype).eps)


@torch.no_grad()
def compute_reference_outputs(family: UNetFamily, workload: Workload, setting: Setting) -> ReferenceOutputs:
    """The outputs that UNets of this setting are checked against, at this size.

    With dense routing, a freshly upcycled UNet has the output of the original for each of its tasks, so the original is
    the reference. Top-k routing leaves hidden units out: there it is the upcycled UNet on the backend "reference".
    Pictures go one by one, so that a wide dtype needs little memory.
    """
    batch = draw_batch(workload._replace(B=TASKS, branches=1), family.device, setting.tasks)
    # It has tables in place of routers, which might choose other experts in a wider dtype.
    unet = family.new_original() if setting.K is None else family.new_upcycled(setting, "reference")
    user = _one_by_one(unet, batch)
    # Products of float32 may be rounded to TF32 on a GPU.
    wide = torch.float64 if workload.dtype == "fp32" or family.device.type == "cuda" else torch.float32
    return ReferenceOutputs(DTYPES[workload.dtype], user, _one_by_one(_cast(unet, wide), batch))


def _one_by_one(unet: UNet2DConditionModel, batch: Batch) -> Tensor:
    outputs = []
    for row, task in enumerate(batch.task_of_row):
        inputs = select_rows(batch, [row], unet.conv_in.in_channels)
        inputs |= {name: inputs[name].to(unet.dtype) for name in ("sample", "encoder_hidden_states")}
        if "added_cond_kwargs" in inputs:
            added = inputs["added_cond_kwargs"]
            inputs["added_cond_kwargs"] = {name: tensor.to(unet.dtype) for name, tensor in added.items()}
        if isinstance(unet, mtu.MTUUNet2DConditionModel):
            inputs["task_ids"] = torch.tensor([task], device=inputs["sample"].device)
        outputs.append(unet(**inputs, return_dict=False)[0])
    return torch.cat(outputs)


def _cast(unet: Unet, dtype: torch.dtype) -> Unet:
    # diffusers' own `.to` warns of modules to keep in float32 even where there are none.
    nn.Module.to(unet, dtype)
    return unet
