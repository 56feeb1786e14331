"""The steps of `python -m benchmarks.gpu_run`, in the order of what they are worth, and how long they may take."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# The file by which a step that holds on is told to go on.
GO = "go"
_TINY = {"sd15": "tiny", "sdxl": "tiny-xl"}


class Place(NamedTuple):
    """Where and how the steps run.

    Attributes:
        folder: of the step, for what it writes.
        commit: for the rows.
        quick: on the tiny model.
        cuda: whether there is a CUDA device.
        minutes: that the step may take.
    """

    folder: Path
    commit: str
    quick: bool
    cuda: bool
    minutes: float

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"


class Step(NamedTuple):
    """One command of a run.

    Attributes:
        name: also of its folder.
        yields: what is known after it.
        arguments: place → arguments of the interpreter.
        seconds: budget, after which it is ended.
        least: seconds under which it is not worth starting.
        alone: whether nothing else may use the device meanwhile; those that need not be run beside each other.
        timed: of a step that compiles beside others and holds on when it is ready, the seconds that it then gets alone.
        decides: whether all others are pointless if it fails.
        stop: signal that asks the command to end.
    """

    name: str
    yields: str
    arguments: Callable[[Place], list[str]]
    seconds: float
    least: float
    alone: bool = True
    timed: float = 0.0
    decides: bool = False
    stop: signal.Signals = signal.SIGTERM

    def command(self, place: Place) -> list[str]:
        return [sys.executable, *self.arguments(place)]


def _module(name: str, *arguments: str) -> list[str]:
    return ["-m", f"benchmarks.{name}", *arguments]


def _smoke(place: Place) -> list[str]:
    return _module("gpu_smoke", *["--quick"] * place.quick)


def _tune(place: Place) -> list[str]:
    arguments = ["--products", "expert_in,expert_sum", "--routing", "dense", "--batches", "2,8"]
    arguments += ["--shapes", "64x64"] if place.quick else []
    arguments += ["--minutes", f"{place.minutes:.2f}", "--table", str(place.folder / "tile_table.py")]
    return _module("tune", *arguments, "--commit", place.commit)


def _ffn(*arguments: str) -> Callable[[Place], list[str]]:
    def of(place: Place) -> list[str]:
        sizes = ["--quick", "--seconds", "0"] if place.quick else []
        # Triton's interpreter computes bfloat16 wrongly.
        sizes += [] if place.cuda else ["--dtype", "fp16"]
        output = place.folder / f"moe_ffn_{place.device}.csv"
        common = ["--minutes", f"{place.minutes:.2f}", "--output", str(output), "--commit", place.commit]
        return _module("moe_ffn", *arguments, *sizes, *common)

    return of


def _unet(model: str, *arguments: str, wait: bool = False) -> Callable[[Place], list[str]]:
    def of(place: Place) -> list[str]:
        sizes = ["--model", _TINY[model], "--quick"] if place.quick else ["--model", model]
        output = place.folder / f"unet_{place.device}.csv"
        common = ["--warm-caches", "--output", str(output), "--commit", place.commit]
        common += ["--wait-for", str(place.folder / GO)] if wait else ["--minutes", f"{place.minutes:.2f}"]
        return _module("unet", *sizes, *arguments, *common)

    return of


def _compiled_unet(model: str, batch: int) -> Step:
    return Step(
        f"unet-{model}-b{batch}",
        f"a step of {model}, {batch} pictures, compiled, in CUDA graphs: stock, upcycled with one task and with four",
        _unet(model, "--batches", str(batch), "--contenders", "stock+graphs,mtu-triton+graphs", wait=True),
        seconds=130,
        least=60,
        alone=False,
        timed=20,
    )


STEPS: tuple[Step, ...] = (
    Step("smoke", "facts of the machine; two shapes against the reference", _smoke, 40, 10, decides=True),
    Step("tune", "tiles of the two products of dense inference", _tune, 50, 25),
    Step(
        "ffn",
        "the feed-forward at six shapes and four batches, beside the bare products and the original",
        _ffn("--batch", "1,2,4,8", "--contenders", "products,eager,mtu-triton"),
        45,
        15,
    ),
    _compiled_unet("sd15", 4),
)

# What is run when the first step fails.
DIAGNOSIS = Step(
    "diagnosis",
    "one test of the kernels with its traceback",
    lambda place: [
        *("-m", "pytest", "-x", "-W", "default", "-m", "gpu", "--tb=long", "-p", "no:cacheprovider"),
        *("tests/mtu_kernels/test_triton_gpu.py", "-k", "test_shapes_of_stable_diffusion and norm and bfloat16"),
    ],
    60,
    10,
    stop=signal.SIGINT,
)
