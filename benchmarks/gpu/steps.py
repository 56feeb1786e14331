"""The steps of `python -m benchmarks.gpu_run`, in the order of what they are worth, and how long they may take.

Budgets are for an H100 with 16 cores. They are limits, not predictions: if every step needs what it may, nine minutes
end in the first stage that compiles. What is then left, and the icons, are for a second call.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# The file by which a step that holds on is told to go on; it makes another one, `.ready`, when it is prepared.
GO = "go"
# What the tiles are tuned for is used from then on.
TUNE, TABLE = "tune", "tile_table.py"
_TINY = {"sd15": "tiny", "sdxl": "tiny-xl"}
# Beside UNets that compile, which come first.
_TEST_WORKERS, _NICE = 4, ("nice", "-n", "15")
# Left out are tests that say nothing of this library's kernels, want most of the memory, or compile for a minute; and
# those of the kernel in Gluon, which no GPU has run yet: if it hangs, nothing else shall.
_TESTS = "not eager-cuda and not 32_bits and not unets and not reduce-overhead and not persistent"
# Named, so that what only other tests import may be missing. The kernels at real shapes go first.
TEST_FILES = (
    "tests/mtu_kernels/test_triton_gpu.py",
    "tests/mtu_kernels",
    "tests/mtu/test_triton.py",
    "tests/mtu/runtime",
    "tests/mtu/recipes/test_device.py",
    "tests/mtu/pipelines/test_compiled_pipeline.py",
    "tests/benchmarks/test_gpu.py",
    "tests/benchmarks/kernels/test_tune.py",
    "tests/benchmarks/ffn/test_machine.py",
)
# After the training: pictures of four tasks, and the model is saved.
_ICONS_PICTURES_SECONDS = 120


class StepContext(NamedTuple):
    """Where and how a step runs.

    Attributes:
        folder: of the step, for what it writes.
        commit: for the rows.
        quick: on the tiny model.
        cuda: whether there is a CUDA device.
        seconds: after which the step must have stopped by itself.
    """

    folder: Path
    commit: str
    quick: bool
    cuda: bool
    seconds: float

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    @property
    def minutes(self) -> tuple[str, str]:
        return "--minutes", f"{self.seconds / 60:.2f}"


class Step(NamedTuple):
    """One command of a run.

    Attributes:
        name: also of its folder.
        yields: what is known after it.
        command: place → program and arguments.
        seconds: budget, after which it is ended.
        least: seconds under which it is not worth starting.
        alone: whether nothing else may use the device meanwhile; those that need not be run beside each other.
        timed: of a step that compiles beside others and holds on when it is ready, the seconds that it then gets alone.
        decides: whether all others are pointless if it fails.
        fills: whether it takes whatever time is left, so that it comes after all others, those that failed too.
        stop: signal that asks the command to end.
    """

    name: str
    yields: str
    command: Callable[[StepContext], list[str]]
    seconds: float
    least: float
    alone: bool = True
    timed: float = 0.0
    decides: bool = False
    fills: bool = False
    stop: signal.Signals = signal.SIGTERM


# A step may be cut: where feed-forwards are most of the time goes first.
_SHAPES = "sdxl,sd15"


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _smoke(place: StepContext) -> list[str]:
    return _python("benchmarks.gpu.smoke", *["--quick"] * place.quick, "--commit", place.commit)


def _tune(place: StepContext) -> list[str]:
    arguments = ["--products", "expert_in,expert_sum", "--routing", "dense", "--batches", "2,8", *place.minutes]
    arguments += ["--shapes", "64x64" if place.quick else _SHAPES]
    return _python(
        "benchmarks.kernels.tune", *arguments, "--table", str(place.folder / TABLE), "--commit", place.commit
    )


def _persistent(place: StepContext) -> list[str]:
    # Not the name that is collected: a kernel that runs for the first time is looked at before it is shipped.
    table = str(place.folder / "with_persistent.py")
    arguments = ["--persistent", "--batches", "2,8", *place.minutes, *["--shapes", "64x64"] * place.quick]
    return _python("benchmarks.kernels.tune", *arguments, "--table", table, "--commit", place.commit)


def _ffn(contenders: str, batches: str, *sweep: str) -> Callable[[StepContext], list[str]]:
    def command(place: StepContext) -> list[str]:
        sizes = ["--quick", "--seconds", "0"] if place.quick else ["--shapes", _SHAPES, "--batch", batches]
        # Triton's interpreter and compilers for CPUs take their time.
        names = contenders if place.cuda else "products,eager,mtu-eager"
        arguments = [
            *sizes,
            *sweep,
            "--device",
            place.device,
            "--contenders",
            names,
            *place.minutes,
            "--resume",
            "--commit",
            place.commit,
        ]
        return _python(
            "benchmarks.ffn.moe_ffn", *arguments, "--output", str(place.folder / f"moe_ffn_{place.device}.csv")
        )

    return command


def _machine(place: StepContext) -> list[str]:
    arguments = ["--output", str(place.folder / "machine.csv"), "--commit", place.commit, *["--quick"] * place.quick]
    return _python("benchmarks.ffn.machine", "--device", place.device, *arguments)


def _unet(model: str, batches: str, run: str, wait: bool = False) -> Callable[[StepContext], list[str]]:
    def command(place: StepContext) -> list[str]:
        sizes = ["--model", _TINY[model], "--quick", "--tasks", "4"] if place.quick else ["--model", model]
        # Eager ones are what ratios are of, and have rounds of their own.
        contenders = f"stock,stock+{run},mtu-triton+{run}" if place.cuda else "stock,mtu-eager"
        arguments = [
            *sizes,
            "--batches",
            batches.split(",")[0] if place.quick else batches,
            "--contenders",
            contenders,
            "--device",
            place.device,
        ]
        arguments += ["--warm-caches", "--resume", "--output", str(place.folder / f"unet_{place.device}.csv")]
        arguments += ["--kernels", str(place.folder / f"step_kernels_{place.device}.csv"), "--commit", place.commit]
        arguments += ["--wait-for", str(place.folder / GO)] if wait else place.minutes
        return _python("benchmarks.models.unet", *arguments)

    return command


def _compiled_unet(model: str, batch: int, seconds: float, timed: float) -> Step:
    # What is ready costs the others no time, so a budget is that of two UNets compiled without anything in a cache.
    yields = f"a step of {model}, {batch} pictures, compiled, in CUDA graphs, stock and upcycled; its kernels"
    return Step(
        f"unet-{model}-b{batch}",
        yields,
        _unet(model, str(batch), "graphs", wait=True),
        seconds,
        least=60,
        alone=False,
        timed=timed,
    )


def _tests(place: StepContext) -> list[str]:
    options = ["-m", "gpu", "-k", _TESTS, "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
    options += ["--continue-on-collection-errors"]
    if place.quick:
        return [*_NICE, *_python("pytest", *options, TEST_FILES[0], "--collect-only", "-q")]
    return [*_NICE, *_python("pytest", *options, "-v", "-n", str(_TEST_WORKERS), *TEST_FILES)]


def _profile(place: StepContext) -> list[str]:
    command = _python("benchmarks.kernels.product_profile", "--product", "expert_in", *["--quick"] * place.quick)
    if place.cuda and shutil.which("ncu"):
        # The clocks are left as they are found.
        # Where the counters are not for everyone, times alone are better than nothing.
        ncu = "ncu --set full --clock-control none --profile-from-start off"
        return ["/bin/sh", "-c", f'{ncu} "$@" || "$@"', "sh", *command]
    return command


def _icons(place: StepContext) -> list[str]:
    minutes = (place.seconds - _ICONS_PICTURES_SECONDS) / 60
    arguments = ["--device", place.device, "--output", str(place.folder / "output")]
    if place.quick:
        return _python("mtu.recipes.icons", "demo", "--help")
    return _python("mtu.recipes.icons", "demo", *arguments, "--minutes", f"{minutes:.2f}", "--steps", "1000000")


_DENSE = ("--top-k", "dense", "--pass")
_MEASURED = "products,eager,mtu-triton"
STEPS: tuple[Step, ...] = (
    Step("smoke", "facts of the machine; two shapes against the reference", _smoke, 40, 10, decides=True),
    Step(TUNE, "tiles of the two products of dense inference", _tune, 60, 30),
    Step(
        "ffn",
        "the feed-forward at six shapes and four batches, beside the bare products and the original",
        _ffn(_MEASURED, "2,8,4,1", *_DENSE, "forward"),
        45,
        25,
    ),
    Step("machine", "the two roofs: rates of products and of memory", _machine, 30, 15),
    # Seconds each: whatever becomes of compiling, there are times of whole UNets.
    Step(
        "captured-sdxl",
        "a step of sdxl, uncompiled, in CUDA graphs; its kernels",
        _unet("sdxl", "4", "captured"),
        45,
        25,
    ),
    Step("captured-sd15", "the same of sd15, at two batches", _unet("sd15", "4,8", "captured"), 40, 25),
    _compiled_unet("sdxl", 4, seconds=300, timed=25),
    _compiled_unet("sd15", 4, seconds=220, timed=20),
    Step(
        "tests",
        "the kernels' tests, PyTorch's own backend, whole UNets and 32-bit sizes excepted",
        _tests,
        150,
        30,
        alone=False,
        stop=signal.SIGINT,
    ),
    Step(
        "ffn-compiled",
        "the feed-forward beside the compiled folded original",
        _ffn(f"{_MEASURED},compile-folded", "2,8", *_DENSE, "forward"),
        75,
        30,
    ),
    Step("profile", "what holds the first product back, by ncu where it is installed", _profile, 60, 15),
    _compiled_unet("sd15", 8, seconds=220, timed=20),
    _compiled_unet("sd15", 2, seconds=220, timed=20),
    Step(
        "training",
        "forward and backward passes",
        _ffn(_MEASURED, "8,2", *_DENSE, "forward+backward"),
        40,
        25,
    ),
    Step(
        "top-2",
        "top-2 of 8 experts beside all 8",
        _ffn("products,mtu-triton", "8", "--experts", "8", "--top-k", "dense,2", "--pass", "forward"),
        30,
        25,
    ),
    Step(
        "persistent",
        "the first product by the kernel in Gluon: whether it is right, and its times",
        _persistent,
        40,
        25,
    ),
    Step("icons", "the icon model of four tasks, trained as long as time is left", _icons, 1e4, 300, fills=True),
)


def _diagnosis(place: StepContext) -> list[str]:
    test = "test_shapes_of_stable_diffusion and norm and bfloat16 and 320"
    options = ["-x", "-W", "default", "-m", "gpu", "--tb=long", "-p", "no:cacheprovider", "-k", test]
    return _python("pytest", *options, "tests/mtu_kernels/test_triton_gpu.py")


# What is run when the step that decides fails.
DIAGNOSIS = Step("diagnosis", "one test of the kernels with its traceback", _diagnosis, 60, 10, stop=signal.SIGINT)
