"""`python -m benchmarks.gpu.smoke`: facts about this machine, and a check of the routed feed-forward on it.

Output and gradients of every input are checked at two shapes with dense routing, against the float64 reference as for
all contenders of the benchmarks. The outputs decide. Facts are printed first, so that a crash does not lose them.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.ffn.correctness import assert_matches_reference
from benchmarks.ffn.inputs import EPS, draw_routed_inputs, draw_shared_inputs
from benchmarks.harness.arguments import parse_shapes
from benchmarks.harness.commands import add_commit_option, make_parser, parse_arguments
from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.provenance import collect_provenance
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels import check_backend, moe_ffn

_SHAPES = ((320, 4096), (1280, 256))


def machine_facts(commit: str | None) -> Iterator[str]:
    """Lines about the machine, for people."""
    yield from (f"{name}: {value}" for name, value in collect_provenance("", commit=commit).items() if value)
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
    """Raises RuntimeError if measurements on CUDA would fail here for other reasons than the kernels."""
    if not torch.cuda.is_available():
        raise RuntimeError("A CUDA device is needed, and torch finds none.")
    if _compiler() is None:
        raise RuntimeError(
            "Triton needs a C compiler for the launchers of its kernels, and finds neither gcc nor clang."
        )


def check_shapes(shapes: Sequence[tuple[int, int]], batch: int, dtype: str, device: torch.device) -> None:
    """Checks outputs, and then gradients, against the reference.

    Wrong outputs raise WrongResult, and a backend that does not run here RuntimeError. Errors of gradients are printed
    and not raised, since all measurements of inference are possible without them.
    """
    check_backend("triton")
    function = functools.partial(moe_ffn, eps=EPS, backend="triton")

    def check_shape(D: int, L: int, direction: str) -> None:
        workload = Workload(D, L, batch, dtype, direction)
        assert_matches_reference(
            function, draw_routed_inputs(draw_shared_inputs(workload, device, 0), Setting(4, None, batch), 0)
        )
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
    parser = make_parser(
        "benchmarks.gpu.smoke", "Facts about this machine, and a check of the routed feed-forward on it."
    )
    shapes_help = "DxL, or sets (default: 320x4096,1280x256)"
    parser.add_argument("--shapes", type=parse_shapes, default=_SHAPES, help=shapes_help)
    parser.add_argument("--quick", action="store_true", help="one tiny shape, also on a CPU in Triton's interpreter")
    add_commit_option(parser)
    _, options = parse_arguments(parser, argv)
    print("\n".join(machine_facts(options.commit)), flush=True)
    try:
        if options.quick:
            # The interpreter computes bfloat16 wrongly.
            cuda = torch.cuda.is_available()
            check_shapes(((32, 16),), 2, "bf16" if cuda else "fp16", torch.device("cuda" if cuda else "cpu"))
        else:
            check_machine()
            check_shapes(options.shapes, 2, "bf16", torch.device("cuda"))
    except (WrongResult, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
