"""What is measured: workloads, the settings of each contender in them, and the sweeps that are run by default."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.harness.workloads import DENSE, Entry, Group, Setting, Workload

# D×L: width and tokens of the transformer blocks.
SHAPE_SETS: dict[str, tuple[tuple[int, int], ...]] = {
    "sd15": ((320, 4096), (640, 1024), (1280, 256), (1280, 64)),
    "sdxl": ((640, 4096), (1280, 1024)),
    # Batches of SD 1.5 flattened to the token counts that the CPU targets are stated for.
    "cpu": ((320, 8192), (640, 2048), (1280, 512), (1280, 128)),
}
# Whole UNets that serve several tasks without experts.
_PEERS = ("four-unets", "swapped-unets", "lora-")
PASSES = ("forward", "backward", "forward+backward")


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Shapes of the command line: DxL and names of sets, separated by commas."""
    shapes: list[tuple[int, int]] = []
    for name in text.split(","):
        width, _, tokens = name.partition("x")
        if name in SHAPE_SETS:
            shapes += SHAPE_SETS[name]
        elif width.isdecimal() and tokens.isdecimal() and int(width) and int(tokens):
            shapes.append((int(width), int(tokens)))
        else:
            sets = ", ".join(SHAPE_SETS)
            raise argparse.ArgumentTypeError(f"unknown shape {name!r}: expected DxL as in 320x4096, or one of {sets}.")
    return tuple(shapes)


def parse_choices(text: str, known: Sequence[str], noun: str) -> tuple[str, ...]:
    """Names of the command line, separated by commas; "all" stands for all that are known."""
    names = tuple(known) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {noun} {name!r}: expected some of {', '.join(known)}.")
    return names


def parse_counts(text: str) -> tuple[int, ...]:
    """Positive whole numbers of the command line, separated by commas."""
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"expected positive whole numbers such as 1,8, got {text!r}.")
    return tuple(int(count) for count in counts)


def parse_count(text: str, least: int = 1) -> int:
    """A whole number of the command line."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}.")
    return int(text)


def parse_top_k(text: str) -> tuple[int | None, ...]:
    """Numbers of active experts of the command line, separated by commas; "dense" stands for all of them."""
    return tuple(DENSE if name == "dense" else parse_counts(name)[0] for name in text.split(","))


class Sweep(NamedTuple):
    """All combinations of what is listed. Settings that are no different (K > E, tasks in one sample) are left out."""

    contenders: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...] = SHAPE_SETS["sd15"] + SHAPE_SETS["sdxl"]
    batches: tuple[int, ...] = (8,)
    experts: tuple[int, ...] = (4,)
    top_k: tuple[int | None, ...] = (DENSE,)
    tasks: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ("forward",)

    def groups(self, dtype: str) -> Iterator[Group]:
        """The groups of the sweep, in each of them every entry once."""
        settings = [
            Setting(*values)
            for values in itertools.product(self.experts, self.top_k, self.tasks)
            if values[1] is None or values[1] <= values[0]
        ]
        for direction, (D, L), B in itertools.product(self.passes, self.shapes, self.batches):
            wanted = [setting for setting in settings if B > 1 or setting.tasks == 1]
            pairs = itertools.product(wanted, self.contenders)
            entries = dict.fromkeys(Entry(name, heeded(name, setting)) for setting, name in pairs)
            if entries:
                yield Group(Workload(D, L, B, dtype, direction), tuple(entries))


def heeded(contender: str, setting: Setting) -> Setting:
    """The part of a setting that makes a difference to a contender: the rest takes its default.

    It keeps a contender from being measured twice, and finds the row to compare with.
    """
    if contender == "eager" or contender.startswith("stock") or "-folded" in contender:
        return Setting()
    if contender.startswith(_PEERS):
        return Setting(tasks=setting.tasks)
    if contender == "products":
        return Setting() if setting.K is None else setting._replace(tasks=1)
    return setting


_CUDA = (
    # The op at every shape, beside the price of the original and the floor.
    Sweep(("products", "eager", "mtu-triton"), batches=(1, 2, 8, 32), experts=(1, 4)),
    # What top-k routing saves.
    Sweep(("products", "loop", "mtu-eager", "mtu-triton"), experts=(8,), top_k=(DENSE, 1, 2)),
    # What a mix of tasks costs.
    Sweep(("mtu-triton",), batches=(8, 32), tasks=(1, 4, 64)),
    Sweep(("mtu-triton",), experts=(8,), top_k=(2,), batches=(8, 32), tasks=(1, 4, 64)),
    # Training: time, memory.
    Sweep(
        ("products", "eager", "loop", "mtu-eager", "mtu-triton", "mtu-triton-recompute"), passes=("forward+backward",)
    ),
    Sweep(("products", "eager", "mtu-triton"), shapes=SHAPE_SETS["sd15"], passes=("backward",)),
    # Compilers last, in the order of their patience: each shape is compiled anew.
    Sweep(("products", "eager", "loop", "mtu-eager", "mtu-triton", "compile-routed", "compile-folded")),
    Sweep(
        ("products", "eager", "mtu-eager", "mtu-triton", "compile-routed", "compile-folded"),
        shapes=((320, 4096), (1280, 1024)),
        passes=("forward+backward",),
    ),
    Sweep(("products", "eager", "mtu-triton", "compile-folded-max"), shapes=(*SHAPE_SETS["sd15"][:3], (1280, 1024))),
    Sweep(("products", "mtu-triton", "compile-routed-max"), shapes=((320, 4096),)),
)
_CPU_FORWARD = ("products", "eager", "loop", "mtu-eager", "mtu-cpp", "compile-routed", "compile-folded")
_CPU = (
    Sweep(_CPU_FORWARD, shapes=SHAPE_SETS["cpu"], batches=(1,)),
    Sweep(("products", "mtu-eager", "mtu-cpp"), SHAPE_SETS["cpu"], (1,), experts=(8,), top_k=(DENSE, 2)),
    Sweep(("products", "eager", "mtu-eager", "mtu-cpp"), SHAPE_SETS["cpu"], (1,), passes=("forward+backward",)),
)
# What `python -m benchmarks.ffn.moe_ffn` measures when nothing is asked for, by device.
DEFAULT_SWEEPS: dict[str, tuple[Sweep, ...]] = {"cuda": _CUDA, "cpu": _CPU}
# A smoke test: every path of the harness, nothing to learn from.
QUICK = Sweep(
    ("products", "eager", "loop", "mtu-eager", "mtu-triton", "mtu-cpp"),
    shapes=((32, 16),),
    batches=(2,),
    top_k=(DENSE, 2),
    passes=PASSES,
)
