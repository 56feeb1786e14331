"""Builds the contenders: the original and the upcycled UNet, eager, compiled, in CUDA graphs; and their peers."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import mtu
from benchmarks.harness.contenders import Contender
from benchmarks.harness.workloads import Setting
from benchmarks.models.deployments import Deployment, Division, Part, at_once, call, each_picture, stock_part
from benchmarks.models.unet_catalogue import ONE_BY_ONE, ROUTERS
from benchmarks.models.unet_models import Batch, Family, select_rows
from benchmarks.models.unet_peers import four_unets, lora_hotswap, lora_per_sample, swapped_unets

Builder = Callable[[Family, Setting, Contender], Deployment]


def build(contender: Contender, family: Family, setting: Setting) -> Deployment:
    """Builds a contender and sets how its UNets run; nothing is compiled before the first call.

    Raises:
        ValueError: CUDA graphs are asked for without a CUDA device.
        RuntimeError: a package or a backend is not installed.
    """
    if contender.graphs and family.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, got the device {str(family.device)!r}.")
    unets = contender.implementation
    deployment = BUILDERS[unets.source](family, setting, contender)
    if contender.run is not None:
        for unet in deployment.unets:
            if unets.by_user:
                # Each size is compiled by itself: a second one would bring dynamic shapes, which are slower.
                unet.compile(mode=contender.run.mode, fullgraph=True, dynamic=False)
            else:
                mtu.compile(unet, contender.run.mode)
    # The next replay of a user's graph overwrites the outputs of this one.
    return deployment._replace(parts=_cloned(deployment.parts)) if contender.graphs and unets.by_user else deployment


def _cloned(parts: Callable[[Batch], list[Part]]) -> Callable[[Batch], list[Part]]:
    def clone(predict: Callable[..., Tensor], **inputs: object) -> Tensor:
        return predict(**inputs).clone()

    return lambda batch: [part._replace(predict=functools.partial(clone, part.predict)) for part in parts(batch)]


def _stock(family: Family, setting: Setting, contender: Contender) -> Deployment:
    unet = family.original()
    return Deployment((unet,), lambda batch: [stock_part(unet, batch, rows) for rows in at_once(batch)])


def _stock_recipe(family: Family, setting: Setting, contender: Contender) -> Deployment:
    """The steps of diffusers' guide to faster inference before compiling: channels-last, projections fused."""
    unet = family.original()
    # Neither torch nor diffusers declares this argument.
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    unet.fuse_qkv_projections()

    def parts(batch: Batch) -> list[Part]:
        (rows,) = at_once(batch)
        part = stock_part(unet, batch, rows)
        part.inputs["sample"] = part.inputs["sample"].to(memory_format=torch.channels_last)
        return [part]

    return Deployment((unet,), parts)


def _upcycled(family: Family, setting: Setting, contender: Contender) -> Deployment:
    unet = family.upcycled(setting, contender.implementation.backend, contender.variant == ROUTERS)
    return _routed(unet, each_picture if contender.variant == ONE_BY_ONE else at_once)


def _folded(family: Family, setting: Setting, contender: Contender) -> Deployment:
    # It has one task, so there is none to switch to.
    return _routed(family.folded(contender.implementation.backend), at_once)._replace(switch=None)


def _routed(unet: mtu.MTUUNet2DConditionModel, division: Division) -> Deployment:
    names = [spec.name for spec in unet.tasks]

    def part(batch: Batch, rows: tuple[int, ...]) -> Part:
        # The tasks of a batch change between steps, not within them: `switch` has this time.
        task_ids = unet.task_ids([names[batch.tasks[row]] for row in rows])
        inputs = select_rows(batch, rows, unet.conv_in.in_channels) | {"task_ids": task_ids}
        return Part(functools.partial(call, unet), inputs, rows)

    return Deployment(
        (unet,),
        lambda batch: [part(batch, rows) for rows in division(batch)],
        switch=functools.partial(unet.task_ids, names),
    )


BUILDERS: dict[str, Builder] = {
    "original": _stock,
    "recipe": _stock_recipe,
    "upcycled": _upcycled,
    "folded": _folded,
    "four": four_unets,
    "swapped": swapped_unets,
    "hotswap": lora_hotswap,
    "per-sample": lora_per_sample,
}
