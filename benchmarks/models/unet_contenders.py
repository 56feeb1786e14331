"""The contenders: the original and the upcycled UNet, eager, compiled and in CUDA graphs; and their peers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mtu
from benchmarks.harness.workloads import Setting
from benchmarks.models.unet_models import Batch, Family, take
from benchmarks.models.unet_peers import four_unets, lora_hotswap, lora_per_sample, swapped_unets
from benchmarks.models.unet_subjects import Division, Part, Subject, at_once, call, each_picture, stock_inputs

Build = Callable[[Family, Setting], Subject]


class Run(NamedTuple):
    """How the UNets of a contender are run.

    Attributes:
        about: in words.
        mode: that of `mtu.compile`, in torch.compile's words where there are any.
        graphs: whether CUDA graphs are replayed.
    """

    about: str
    mode: str
    graphs: bool


RUNS = {
    "channels-last": Run("with channels-last weights", "eager", graphs=False),
    "captured": Run("uncompiled, in CUDA graphs", "cudagraphs", graphs=True),
    "compile": Run("compiled", "default", graphs=False),
    "graphs": Run("compiled, in CUDA graphs", "reduce-overhead", graphs=True),
    "max": Run("compiled and tuned, in CUDA graphs", "max-autotune", graphs=True),
}
# By a user of torch, who has no other graphs than those of compiled code.
_COMPILED = ("compile", "graphs", "max")


class Contender(NamedTuple):
    """One way to run a step.

    Attributes:
        about: what it is, in a line.
        make: family of UNets, setting of the experts → what is run.
        run: None: as it is.
        by_user: compiled as a user of torch would, not by `mtu.compile`.
    """

    about: str
    make: Build
    run: Run | None = None
    by_user: bool = False

    @property
    def compiles(self) -> bool:
        return self.run is not None and self.run.mode != "eager"

    @property
    def graphs(self) -> bool:
        return self.run is not None and self.run.graphs

    def build(self, family: Family, setting: Setting) -> Subject:
        """The contender with its UNets made to run as they should; nothing is compiled before the first call.

        Raises:
            ValueError: CUDA graphs elsewhere than on a CUDA device.
            RuntimeError: something is not part of this installation.
        """
        if self.graphs and family.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, got the device {str(family.device)!r}.")
        subject = self.make(family, setting)
        for unet in subject.unets if self.run is not None else ():
            if self.by_user:
                # Of one size each: dynamic shapes, which a second one would bring, are slower.
                unet.compile(mode=self.run.mode, fullgraph=True, dynamic=False)
            else:
                mtu.compile(unet, self.run.mode)
        # The next replay of a user's graph overwrites the outputs of this one.
        return subject._replace(parts=_cloned(subject.parts)) if self.graphs and self.by_user else subject


def _cloned(parts: Callable[[Batch], list[Part]]) -> Callable[[Batch], list[Part]]:
    def clone(predict: Callable[..., Tensor], **inputs: object) -> Tensor:
        return predict(**inputs).clone()

    return lambda batch: [part._replace(predict=functools.partial(clone, part.predict)) for part in parts(batch)]


def _stock(family: Family, setting: Setting) -> Subject:
    unet = family.original()

    def parts(batch: Batch) -> list[Part]:
        return [Part(functools.partial(call, unet), stock_inputs(unet, batch, rows), rows) for rows in at_once(batch)]

    return Subject((unet,), parts)


def _stock_recipe(family: Family, setting: Setting) -> Subject:
    """What diffusers' guide to faster inference asks for before compiling: channels-last, projections fused."""
    unet = family.original()
    unet.to(memory_format=torch.channels_last)
    unet.fuse_qkv_projections()

    def parts(batch: Batch) -> list[Part]:
        (rows,) = at_once(batch)
        inputs = stock_inputs(unet, batch, rows)
        inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
        return [Part(functools.partial(call, unet), inputs, rows)]

    return Subject((unet,), parts)


def _upcycled(backend: str, division: Division = at_once, routers: bool = False) -> Build:
    def make(family: Family, setting: Setting) -> Subject:
        return _routed(family.upcycled(setting, backend, routers), division)

    return make


def _folded(backend: str) -> Build:
    def make(family: Family, setting: Setting) -> Subject:
        # Of one task, so there is nothing to switch to.
        return _routed(family.folded(backend), at_once)._replace(switch=None)

    return make


def _routed(unet: mtu.MTUUNet2DConditionModel, division: Division) -> Subject:
    names = [spec.name for spec in unet.tasks]

    def part(batch: Batch, rows: tuple[int, ...]) -> Part:
        # The tasks of a batch change between steps, not within: this is what `switch` takes.
        task_ids = unet.task_ids([names[batch.tasks[row]] for row in rows])
        inputs = take(batch, rows, unet.conv_in.in_channels) | {"task_ids": task_ids}
        return Part(functools.partial(call, unet), inputs, rows)

    return Subject(
        (unet,),
        lambda batch: [part(batch, rows) for rows in division(batch)],
        switch=functools.partial(unet.task_ids, names),
    )


def _runs(name: str, contender: Contender, *runs: str) -> dict[str, Contender]:
    """A contender as it is, and as it is run in other ways."""
    ways = {name: contender}
    for key in runs:
        run = RUNS[key]
        ways[f"{name}+{key}"] = contender._replace(about=f"{contender.about}, {run.about}", run=run)
    return ways


def _suffixed(suffix: str, contenders: dict[str, Contender]) -> dict[str, Contender]:
    return {f"{name}@{suffix}": contender for name, contender in contenders.items()}


def _of_backend(name: str) -> dict[str, Contender]:
    about = f"upcycled, on the backend {name!r}"
    each = Contender(f"{about}, pictures one after another", _upcycled(name, each_picture))
    routers = Contender(f"{about}, with its routers", _upcycled(name, routers=True))
    return {
        **_runs(f"mtu-{name}", Contender(about, _upcycled(name)), *RUNS),
        **_suffixed("each", _runs(f"mtu-{name}", each, "graphs")),
        **_suffixed("routers", _runs(f"mtu-{name}", routers, "compile", "graphs")),
    }


_RECIPE = Contender("the original by diffusers' recipe", _stock_recipe, by_user=True)
_HOTSWAP = Contender("adapters of rank 16 swapped between tasks", lora_hotswap, by_user=True)
_FOLDED = "one task folded into plain layers, on the backend"
CONTENDERS: dict[str, Contender] = {
    **_runs("stock", Contender("the original UNet of diffusers", _stock), *RUNS),
    **_runs("stock-recipe", _RECIPE, *_COMPILED),
    **_of_backend("eager"),
    **_of_backend("cpp"),
    **_runs("mtu-cpp-folded", Contender(f"{_FOLDED} 'cpp'", _folded("cpp")), "compile", "graphs"),
    **_of_backend("triton"),
    **_runs("mtu-triton-folded", Contender(f"{_FOLDED} 'triton'", _folded("triton")), "compile", "graphs"),
    **_runs("four-unets", Contender("a UNet for each task, all resident", four_unets), "compile", "graphs"),
    **_runs("swapped-unets", Contender("one resident UNet, weights swapped in", swapped_unets), "compile", "graphs"),
    **_runs("lora-hotswap", _HOTSWAP, "compile", "graphs"),
    "lora-per-sample": Contender("adapters of rank 16 mixed in a batch", lora_per_sample),
}


def default_contenders(device: str) -> tuple[str, ...]:
    """What is measured when nothing is named: on a CPU, where compiling takes minutes, what runs without."""
    if device == "cpu":
        return ("stock", "stock+channels-last", "mtu-eager", "mtu-cpp", "mtu-cpp+channels-last")
    # Tuning takes minutes for each size.
    return tuple(name for name in CONTENDERS if "cpp" not in name and "+max" not in name)
