"""`python -m benchmarks.gpu.smoke`: what this machine is, and whether the routed feed-forward computes rightly on it.

Two shapes, dense, output and gradients of every input, each checked against the float64 reference as all contenders of
the benchmarks are. The outputs decide. Facts are printed first, so that they are there whatever comes after them.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.ffn.correctness import check
from benchmarks.ffn.inputs import EPS, draw_shared, route
from benchmarks.harness.arguments import parse_shapes
from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.provenance import provenance
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels import check_backend, moe_ffn

_SHAPES = ((320, 4096), (1280, 256))


class UnfitMachine(Exception):
    """A machine that nothing can be measured on: one sentence."""


def facts(commit: str | None) -> Iterator[str]:
    """Lines about the machine, for people."""
    yield from (f"{name}: {value}" for name, value in provenance("", commit=commit).items() if value)
    yield f"cores: {os.cpu_count()}"
    yield f"C compiler: {_compiler() or 'absent'}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        yield str(properties)
        free, total = torch.cuda.mem_get_info()
        yield f"memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if shutil.which("nvidia-smi"):
        yield subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout


def check_machine() -> None:
    """Raises Unfit if measurements on CUDA would fail here for reasons that are not the kernels'."""
    if not torch.cuda.is_available():
        raise UnfitMachine("A CUDA device is needed, and torch finds none.")
    if _compiler() is None:
        raise UnfitMachine(
            "Triton needs a C compiler for the launchers of its kernels, and finds neither gcc nor clang."
        )


def check_shapes(shapes: Sequence[tuple[int, int]], batch: int, dtype: str, device: torch.device) -> None:
    """Checks outputs, and then gradients, against the reference.

    Gradients that are wrong are said and not raised: all that is measured of inference is worth having without them.

    Raises:
        WrongResult: outputs are not as exact as a user's code.
        RuntimeError: the backend does not run here.
    """
    check_backend("triton")
    function = functools.partial(moe_ffn, eps=EPS, backend="triton")

    def check_shape(D: int, L: int, direction: str) -> None:
        workload = Workload(D, L, batch, dtype, direction)
        check(function, route(draw_shared(workload, device, 0), Setting(4, None, batch), 0))
        print(f"{workload}: right", flush=True)

    for D, L in shapes:
        check_shape(D, L, "forward")
    for D, L in shapes:
        try:
            check_shape(D, L, "forward+backward")
        except (WrongResult, RuntimeError) as error:
            print(f"FAILED, gradients at {D}x{L}: {' '.join(str(error).split())}", flush=True)


def _compiler() -> str | None:
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 where results are wrong or nothing runs, after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "--shapes", type=parse_shapes, default=_SHAPES, help="DxL, or sets (default: 320x4096,1280x256)"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny shape, also on a CPU in Triton's interpreter")
    parser.add_argument("--commit", help="in a copy of the tree without its git directory")
    options = parser.parse_args(argv)
    print("\n".join(facts(options.commit)), flush=True)
    try:
        if options.quick:
            # The interpreter computes bfloat16 wrongly.
            cuda = torch.cuda.is_available()
            check_shapes(((32, 16),), 2, "bf16" if cuda else "fp16", torch.device("cuda" if cuda else "cpu"))
        else:
            check_machine()
            check_shapes(options.shapes, 2, "bf16", torch.device("cuda"))
    except (UnfitMachine, WrongResult, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
