"""The steps of `python -m benchmarks.gpu_run`, the most valuable first, and the time that each may take.

Budgets are for an H100 with 16 cores. They are limits, not predictions: if every step needs all of its budget, nine
minutes end in the first stage that compiles. The other steps, and the icons, are for a second call.
"""

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.provenance import ROOT

# A step that is prepared makes the file `go.ready`, and goes on when the run makes the file `go`.
GO = "go"
# The steps after this one run with the tuned tiles.
TUNE, TABLE = "tune", "tile_table.py"
_TINY = {"sd15": "tiny", "sdxl": "tiny-xl"}
# The tests run beside UNets that compile, which have priority.
_TEST_WORKERS, _NICE = 4, ("nice", "-n", "15")
# Tests are left out that do not run this library's kernels, need most of the memory, or compile for a minute; and those
# of the kernel in Gluon, which no GPU has run yet: if it hangs, the other tests are lost.
_TESTS = "not eager-cuda and not 32_bits and not unets and not reduce-overhead and not persistent"
_KERNEL_TESTS, _REAL_SHAPES = "tests/mtu_kernels", "tests/mtu_kernels/test_triton_gpu.py"
# After the training, pictures of four tasks are made, and the model is saved.
_ICONS_PICTURES_SECONDS = 120


def find_test_paths() -> list[str]:
    """The tests of the kernels, those at real shapes first, and the other files that use the marker for GPUs.

    Files are named one by one, so that packages which only other tests import may be missing.
    """
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    names = [path.relative_to(ROOT).as_posix() for path in files if not path.is_relative_to(ROOT / _KERNEL_TESTS)]
    return [_REAL_SHAPES, _KERNEL_TESTS, *names]


class StepContext(NamedTuple):
    """The circumstances of a step.

    Attributes:
        folder: of the step, for its files.
        commit: for the rows.
        is_quick: whether it runs on the tiny model.
        has_cuda: whether there is a CUDA device.
        seconds: after which the step must have stopped by itself.
    """

    folder: Path
    commit: str
    is_quick: bool
    has_cuda: bool
    seconds: float

    @property
    def device(self) -> str:
        return "cuda" if self.has_cuda else "cpu"

    @property
    def minutes_arguments(self) -> tuple[str, str]:
        return "--minutes", f"{self.seconds / 60:.2f}"

    def path_in_folder(self, name: str) -> str:
        return str(self.folder / name)

    def benchmark_command(self, module: str, options: str = "", *others: str) -> list[str]:
        """The command of a benchmark; `options` are separated by spaces."""
        return [*_PYTHON, f"benchmarks.{module}", *options.split(), *others, "--commit", self.commit]


class Step(NamedTuple):
    """One command of a run.

    Attributes:
        name: also of its folder.
        results_in_words: its results, in words.
        make_command: context → program and arguments.
        budget_seconds: budget, after which it is ended.
        least_seconds: seconds under which it is not worth starting.
        runs_alone: whether nothing else may use the device meanwhile; steps that need not be alone run beside each
            other.
        seconds_alone: of a step that compiles beside others and waits when it is ready, the seconds that it then gets
            alone.
        decides_run: whether all others are pointless if it fails.
        fills_time: whether it takes all time that is left, so that it comes after all others, failed ones included.
        stop_signal: signal that asks the command to end.
    """

    name: str
    results_in_words: str
    make_command: Callable[[StepContext], list[str]]
    budget_seconds: float
    least_seconds: float
    runs_alone: bool = True
    seconds_alone: float = 0.0
    decides_run: bool = False
    fills_time: bool = False
    stop_signal: signal.Signals = signal.SIGTERM


_PYTHON = (sys.executable, "-m")
# A step may be cut: the model whose feed-forwards take most of its time goes first.
_SHAPES = "sdxl,sd15"


def _smoke(context: StepContext) -> list[str]:
    return context.benchmark_command("gpu.smoke", "--quick" * context.is_quick)


def _tune(context: StepContext) -> list[str]:
    shapes = "64x64" if context.is_quick else _SHAPES
    options = f"--products expert_in,expert_sum --routing dense --batches 2,8 --shapes {shapes} --table"
    return context.benchmark_command("kernels.tune", options, context.path_in_folder(TABLE), *context.minutes_arguments)


def _persistent(context: StepContext) -> list[str]:
    # Not the name that is collected: a kernel that runs for the first time is looked at before it is shipped.
    options = "--persistent --batches 2,8" + " --shapes 64x64" * context.is_quick + " --table"
    return context.benchmark_command(
        "kernels.tune", options, context.path_in_folder("with_persistent.py"), *context.minutes_arguments
    )


def _ffn(contenders: str, batches: str, *sweep: str) -> Callable[[StepContext], list[str]]:
    def command(context: StepContext) -> list[str]:
        sizes = "--quick --seconds 0" if context.is_quick else f"--shapes {_SHAPES} --batch {batches}"
        # Triton's interpreter and compilers for CPUs are slow.
        names = contenders if context.has_cuda else "products,eager,mtu-eager"
        options = f"{sizes} {' '.join(sweep)} --device {context.device} --contenders {names} --resume --output"
        output = context.path_in_folder(f"moe_ffn_{context.device}.csv")
        return context.benchmark_command("ffn.moe_ffn", options, output, *context.minutes_arguments)

    return command


def _machine(context: StepContext) -> list[str]:
    options = "--quick" * context.is_quick + f" --device {context.device} --output"
    return context.benchmark_command("ffn.machine", options, context.path_in_folder("machine.csv"))


def _unet(model: str, batches: str, run: str, wait: bool = False) -> Callable[[StepContext], list[str]]:
    def command(context: StepContext) -> list[str]:
        sizes = f"--model {model} --batches {batches}"
        if context.is_quick:
            sizes = f"--model {_TINY[model]} --quick --tasks 4 --batches {batches.split(',')[0]}"
        # Ratios are to the eager original, which has rounds of its own.
        contenders = f"stock,stock+{run},mtu-triton+{run}" if context.has_cuda else "stock,mtu-eager"
        options = f"{sizes} --contenders {contenders} --device {context.device} --warm-caches --resume"
        files = ["--output", context.path_in_folder(f"unet_{context.device}.csv")]
        files += ["--kernels", context.path_in_folder(f"step_kernels_{context.device}.csv")]
        end = ("--wait-for", context.path_in_folder(GO)) if wait else context.minutes_arguments
        return context.benchmark_command("models.unet", options, *files, *end)

    return command


def _compiled_unet(model: str, batch: int, seconds: float, timed: float) -> Step:
    # A step that is ready costs the others no time, so a budget is that of two UNets compiled with empty caches.
    yields = f"a step of {model}, {batch} pictures, compiled, in CUDA graphs, stock and upcycled; its kernels"
    command = _unet(model, str(batch), "graphs", wait=True)
    return Step(
        f"unet-{model}-b{batch}", yields, command, seconds, least_seconds=60, runs_alone=False, seconds_alone=timed
    )


def _tests(context: StepContext) -> list[str]:
    options = ["-m", "gpu", "-k", _TESTS, "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
    options += ["--continue-on-collection-errors"]
    files = [_REAL_SHAPES, "--collect-only", "-q"]
    if not context.is_quick:
        files = ["-v", "-n", str(_TEST_WORKERS), *find_test_paths()]
    return [*_NICE, *_PYTHON, "pytest", *options, *files]


def _profile(context: StepContext) -> list[str]:
    quick = ["--quick"] * context.is_quick
    command = [*_PYTHON, "benchmarks.kernels.product_profile", "--product", "expert_in", *quick]
    if context.has_cuda and shutil.which("ncu"):
        # The clocks are left as they are. Where not every user may read the counters, the command runs without ncu.
        ncu = "ncu --set full --clock-control none --profile-from-start off"
        return ["/bin/sh", "-c", f'{ncu} "$@" || "$@"', "sh", *command]
    return command


def _icons(context: StepContext) -> list[str]:
    command = [*_PYTHON, "mtu.recipes.icons", "demo"]
    if context.is_quick:
        return [*command, "--help"]
    minutes = f"{(context.seconds - _ICONS_PICTURES_SECONDS) / 60:.2f}"
    options = ["--device", context.device, "--output", context.path_in_folder("output")]
    return [*command, *options, "--minutes", minutes, "--steps", "1000000"]


_DENSE = "--top-k dense --pass"
_MEASURED = "products,eager,mtu-triton"
_FFN = _ffn(_MEASURED, "2,8,4,1", _DENSE, "forward")
_FFN_COMPILED = _ffn(f"{_MEASURED},compile-folded", "2,8", _DENSE, "forward")
_TRAINING = _ffn(_MEASURED, "8,2", _DENSE, "forward+backward")
_TOP_2 = _ffn("products,mtu-triton", "8", "--experts 8 --top-k dense,2 --pass forward")
_FFN_YIELDS = "the feed-forward at six shapes and four batches, beside the bare products and the original"
_TESTS_YIELD = "the kernels' tests, PyTorch's own backend, whole UNets and 32-bit sizes excepted"
_CAPTURED = "a step of sdxl, uncompiled, in CUDA graphs; its kernels"
_GLUON = "the first product by the kernel in Gluon: whether it is right, and its times"
STEPS: tuple[Step, ...] = (
    Step("smoke", "facts of the machine; two shapes against the reference", _smoke, 40, 10, decides_run=True),
    Step(TUNE, "tiles of the two products of dense inference", _tune, 60, 30),
    Step("ffn", _FFN_YIELDS, _FFN, 45, 25),
    Step("machine", "the two roofs: rates of products and of memory", _machine, 30, 15),
    # They take seconds each, so there are times of whole UNets even if compiling fails.
    Step("captured-sdxl", _CAPTURED, _unet("sdxl", "4", "captured"), 45, 25),
    Step("captured-sd15", "the same of sd15, at two batches", _unet("sd15", "4,8", "captured"), 40, 25),
    _compiled_unet("sdxl", 4, seconds=300, timed=25),
    _compiled_unet("sd15", 4, seconds=220, timed=20),
    Step("tests", _TESTS_YIELD, _tests, 150, 30, runs_alone=False, stop_signal=signal.SIGINT),
    Step("ffn-compiled", "the feed-forward beside the compiled folded original", _FFN_COMPILED, 75, 30),
    Step("profile", "the bottleneck of the first product, by ncu where it is installed", _profile, 60, 15),
    _compiled_unet("sd15", 8, seconds=220, timed=20),
    _compiled_unet("sd15", 2, seconds=220, timed=20),
    Step("training", "forward and backward passes", _TRAINING, 40, 25),
    Step("top-2", "top-2 of 8 experts beside all 8", _TOP_2, 30, 25),
    Step("persistent", _GLUON, _persistent, 40, 25),
    Step("icons", "the icon model of four tasks, trained as long as time is left", _icons, 1e4, 300, fills_time=True),
)


def _diagnosis(context: StepContext) -> list[str]:
    test = "test_shapes_of_stable_diffusion and norm and bfloat16 and 320"
    options = ["-x", "-W", "default", "-m", "gpu", "--tb=long", "-p", "no:cacheprovider", "-k", test]
    return [*_PYTHON, "pytest", *options, _REAL_SHAPES]


# This step runs when the one that decides fails.
DIAGNOSIS = Step(
    "diagnosis", "one test of the kernels with its traceback", _diagnosis, 60, 10, stop_signal=signal.SIGINT
)
