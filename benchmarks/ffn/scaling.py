"""`python -m benchmarks.ffn.scaling`: one feed-forward with more and more tokens, samples, tasks and experts.

Rows are those of `benchmarks.ffn.moe_ffn`, in a file of their own: its pictures are of the models' shapes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.ffn.moe_ffn import run
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.sweeps import Sweep
from benchmarks.ffn.targets import TESTED
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.provenance import RESULTS, command_line, provenance
from benchmarks.harness.workloads import DENSE

_SECONDS = {"cpu": 2.0, "cuda": 0.1}
_BESIDE = ("products", "eager")


def sweeps(device: str) -> tuple[Sweep, ...]:
    """What is measured on a kind of device: one sweep for each quantity, and the shapes that the roofline lacks."""
    contenders, more = (*_BESIDE, TESTED[device]), device == "cuda"
    tokens = (256, 512, 1024, 2048, 4096, *((8192, 16384) if more else ()))
    samples = (1, 2, 4, 8, 16, *((32, 64) if more else ()))
    return (
        Sweep(contenders, tuple((640, L) for L in tokens), (1,)),
        Sweep(contenders, ((1280, 64),), samples),
        Sweep(contenders, ((640, 256),), (8,), (8,), (DENSE, 2), (1, 2, 4, 8)),
        Sweep(contenders, ((640, 1024),), (1,), (1, 2, 4, 8, 16), (DENSE, 1, 2)),
        Sweep(contenders, ((320, 4096), (1280, 1024), (1280, 256)), (1,)),
    )


# A smoke test, nothing to learn from.
_QUICK = Sweep((*_BESIDE, "mtu-eager"), ((32, 16), (32, 32)), (1,))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    argv = sys.argv[1:] if argv is None else argv
    # Or else the profiler, which counts memory on a CPU, writes two lines for each row. Read when it starts first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ffn.scaling",
        description="One feed-forward with more and more tokens, samples, tasks and experts.",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--seconds", type=float, help="for each row (default: 2 on a CPU, 0.1 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two tiny shapes")
    parser.add_argument("--output", type=Path, help="CSV to add rows to (default: results/scaling_DEVICE.csv)")
    parser.add_argument("--commit", help="for the provenance, in a copy of the tree without its git directory")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none.")
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    chosen = (_QUICK,) if options.quick else sweeps(kind)
    groups = [group for sweep in chosen for group in sweep.groups(options.dtype)]
    output = options.output or RESULTS / f"scaling_{kind}.csv"
    source = provenance(command_line("benchmarks.ffn.scaling", argv), torch.device(kind), options.commit)
    try:
        TABLE.check(output, source)
    except ValueError as error:
        parser.error(str(error))
    seconds = _SECONDS[kind] if options.seconds is None else options.seconds
    rows, failures = run(groups, torch.device(kind), seconds, output, source)
    print(f"{len(rows)} rows added to {output}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
