"""Other ways to serve several tasks: UNets of their own, resident or swapped in; adapters, one by one or mixed."""

import copy
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import is_peft_available
from torch import Tensor

from benchmarks.harness.contenders import Contender
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.workloads import Setting
from benchmarks.models.deployments import (
    Deployment,
    UNetCall,
    make_stock_call,
    predict_noise,
    rows_at_once,
    rows_by_task,
)
from benchmarks.models.unet_models import TASKS, Batch, UNetFamily, copy_unet_sharing_weights

_RANK = 16
_ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def build_four_unets(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    """A UNet for each task, all of them on the device; the pictures of a task go through its own together."""
    unets = tuple(copy_unet_sharing_weights(family.fine_tuned_unet(task)) for task in range(TASKS))

    def parts(batch: Batch) -> list[UNetCall]:
        return [make_stock_call(unets[batch.task_of_row[rows[0]]], batch, rows) for rows in rows_by_task(batch)]

    return Deployment(unets, parts, call_sizes_depend_on_tasks=True)


class _Slot:
    """Live tensors on the device, into which the values of one task at a time are copied.

    `sources` gives the values of a task, in the order of the live tensors.
    """

    def __init__(self, live: Sequence[Tensor], sources: Callable[[int], Sequence[Tensor]]) -> None:
        self._live, self._sources = live, sources
        self._task: int | None = None

    @torch.no_grad()
    def hold(self, task: int) -> None:
        """Copies the values of a task, unless they are there already."""
        if task != self._task:
            torch._foreach_copy_(self._live, self._sources(task), non_blocking=True)
            self._task = task

    def switch(self) -> None:
        """Copies the values of the next task."""
        self.hold(0 if self._task is None else (self._task + 1) % TASKS)

    def parts(self, unet: UNet2DConditionModel, batch: Batch) -> list[UNetCall]:
        """A call for each task of the batch, its values copied in before."""
        return [
            make_stock_call(unet, batch, rows)._replace(
                prepare_call=functools.partial(self.hold, batch.task_of_row[rows[0]])
            )
            for rows in rows_by_task(batch)
        ]


def build_swapped_unets(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    """One UNet on the device, into which the weights of the next task are copied: from pinned host memory to a GPU."""
    unet = copy.deepcopy(family.new_original())
    live = [parameter.requires_grad_(False) for parameter in unet.parameters()]

    # On first use: compiling lays the UNet's weights out anew, and copies from other strides are slow.
    @functools.cache
    def sources(task: int) -> list[Tensor]:
        if family.device.type == "cpu":
            return [parameter.detach() for parameter in family.fine_tuned_unet(task).parameters()]
        return [torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor) for tensor in live]

    slot = _Slot(live, sources)
    return Deployment(
        (unet,),
        functools.partial(slot.parts, unet),
        kept_tensors=lambda: [tensor for task in range(TASKS) for tensor in sources(task)],
        switch_tasks=slot.switch,
        call_sizes_depend_on_tasks=True,
    )


def build_lora_hotswap(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    """One adapter on the original: that of the next task is copied in place, as diffusers' hot-swapping does."""
    unet = family.new_original()
    unet.add_adapter(_adapter())
    live = _adapter_weights(unet, family)
    sources = [[tensor.detach().clone() for tensor in live] for _ in range(TASKS)]
    slot = _Slot(live, sources.__getitem__)

    def after_check() -> None:
        for task, tensors in enumerate(sources):
            _randomise_(tensors, seed=task)
        slot.switch()

    return Deployment(
        (unet,),
        functools.partial(slot.parts, unet),
        kept_tensors=lambda: [tensor for tensors in sources for tensor in tensors],
        switch_tasks=slot.switch,
        after_check=after_check,
        call_sizes_depend_on_tasks=True,
    )


def build_lora_per_sample(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    """Four adapters on the original; PEFT selects those of each sample."""
    peft, unet = _peft(), family.new_original()
    names = [f"task_{task}" for task in range(TASKS)]
    model = peft.get_peft_model(unet, _adapter(), adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, _adapter())
    model.eval()
    weights = _adapter_weights(unet, family)

    def parts(batch: Batch) -> list[UNetCall]:
        (rows,) = rows_at_once(batch)
        chosen = {"adapter_names": [names[task] for task in batch.task_of_row]}
        return [
            UNetCall(functools.partial(predict_noise, model), make_stock_call(unet, batch, rows).inputs | chosen, rows)
        ]

    return Deployment((unet,), parts, after_check=functools.partial(_randomise_, weights, seed=0))


def _peft() -> ModuleType:
    if not is_peft_available():
        raise RuntimeError("LoRA needs the package peft, which is not installed: pip install peft.")
    # An optional package, which two contenders need.
    import peft

    return peft


def _adapter() -> Any:
    return _peft().LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_ADAPTED)


def _adapter_weights(unet: UNet2DConditionModel, family: UNetFamily) -> list[Tensor]:
    """The adapters' parameters, cast to the dtype of the original's."""
    weights: list[Tensor] = [parameter for name, parameter in unet.named_parameters() if "lora_" in name]
    for parameter in weights:
        parameter.data = parameter.data.to(DTYPES[family.dtype])
    unet.requires_grad_(False).eval()
    return weights


@torch.no_grad()
def _randomise_(weights: Sequence[Tensor], seed: int) -> None:
    """Draws the weights of an adapter. It starts from zeros, whose products run faster than those of data."""
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for tensor in weights:
        tensor.normal_(0, _RANK**-1 * tensor.shape[1] ** -0.5, generator=generator)
