"""Builds the contenders: the original and the upcycled UNet, eager, compiled, in CUDA graphs; and their peers."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import mtu
from benchmarks.harness.contenders import Contender
from benchmarks.harness.workloads import Setting
from benchmarks.models.deployments import (
    Deployment,
    Division,
    UNetCall,
    make_stock_call,
    predict_noise,
    rows_at_once,
    rows_by_picture,
)
from benchmarks.models.unet_catalogue import ONE_BY_ONE, ROUTERS
from benchmarks.models.unet_models import Batch, UNetFamily, select_rows
from benchmarks.models.unet_peers import (
    build_four_unets,
    build_lora_hotswap,
    build_lora_per_sample,
    build_swapped_unets,
)

Builder = Callable[[UNetFamily, Setting, Contender], Deployment]


def build_deployment(contender: Contender, family: UNetFamily, setting: Setting) -> Deployment:
    """Builds a contender and sets how its UNets run; nothing is compiled before the first call.

    Raises:
        ValueError: CUDA graphs are asked for without a CUDA device.
        RuntimeError: a package or a backend is not installed.
    """
    if contender.uses_cuda_graphs and family.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, got the device {str(family.device)!r}.")
    unets = contender.implementation
    deployment = BUILDERS[unets.source](family, setting, contender)
    if contender.run_mode is not None:
        for unet in deployment.unets:
            if unets.by_user:
                # Each size is compiled by itself: a second one would bring dynamic shapes, which are slower.
                unet.compile(mode=contender.run_mode.compile_mode, fullgraph=True, dynamic=False)
            else:
                mtu.compile(unet, contender.run_mode.compile_mode)
    # The next replay of a user's graph overwrites the outputs of this one.
    return (
        deployment._replace(unet_calls_of=_cloned(deployment.unet_calls_of))
        if contender.uses_cuda_graphs and unets.by_user
        else deployment
    )


def _cloned(parts: Callable[[Batch], list[UNetCall]]) -> Callable[[Batch], list[UNetCall]]:
    def clone(predict: Callable[..., Tensor], **inputs: object) -> Tensor:
        return predict(**inputs).clone()

    return lambda batch: [part._replace(predict=functools.partial(clone, part.predict)) for part in parts(batch)]


def _stock(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    unet = family.new_original()
    return Deployment((unet,), lambda batch: [make_stock_call(unet, batch, rows) for rows in rows_at_once(batch)])


def _stock_recipe(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    """The steps of diffusers' guide to faster inference before compiling: channels-last, projections fused."""
    unet = family.new_original()
    # Neither torch nor diffusers declares this argument.
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    unet.fuse_qkv_projections()

    def parts(batch: Batch) -> list[UNetCall]:
        (rows,) = rows_at_once(batch)
        part = make_stock_call(unet, batch, rows)
        part.inputs["sample"] = part.inputs["sample"].to(memory_format=torch.channels_last)
        return [part]

    return Deployment((unet,), parts)


def _upcycled(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    unet = family.new_upcycled(setting, contender.implementation.backend, contender.variant == ROUTERS)
    return _routed(unet, rows_by_picture if contender.variant == ONE_BY_ONE else rows_at_once)


def _folded(family: UNetFamily, setting: Setting, contender: Contender) -> Deployment:
    # It has one task, so there is none to switch to.
    return _routed(family.new_folded(contender.implementation.backend), rows_at_once)._replace(switch_tasks=None)


def _routed(unet: mtu.MTUUNet2DConditionModel, division: Division) -> Deployment:
    names = [spec.name for spec in unet.tasks]

    def part(batch: Batch, rows: tuple[int, ...]) -> UNetCall:
        # The tasks of a batch change between steps, not within them: `switch` has this time.
        task_ids = unet.task_ids([names[batch.task_of_row[row]] for row in rows])
        inputs = select_rows(batch, rows, unet.conv_in.in_channels) | {"task_ids": task_ids}
        return UNetCall(functools.partial(predict_noise, unet), inputs, rows)

    return Deployment(
        (unet,),
        lambda batch: [part(batch, rows) for rows in division(batch)],
        switch_tasks=functools.partial(unet.task_ids, names),
    )


BUILDERS: dict[str, Builder] = {
    "original": _stock,
    "recipe": _stock_recipe,
    "upcycled": _upcycled,
    "folded": _folded,
    "four": build_four_unets,
    "swapped": build_swapped_unets,
    "hotswap": build_lora_hotswap,
    "per-sample": build_lora_per_sample,
}
