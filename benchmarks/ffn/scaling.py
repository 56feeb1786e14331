"""`python -m benchmarks.ffn.scaling`: one feed-forward with more and more tokens, samples, tasks and experts.

Rows are those of `benchmarks.ffn.moe_ffn`, in a file of their own, since its pictures are of the models' shapes.
"""

import sys
from collections.abc import Sequence

from benchmarks.ffn.moe_ffn import measure_groups
from benchmarks.ffn.rows import SCALING_TABLE
from benchmarks.ffn.sweeps import Sweep
from benchmarks.ffn.targets import TESTED
from benchmarks.harness.commands import (
    add_common_options,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.workloads import DENSE

_SECONDS = {"cpu": 2.0, "cuda": 0.1}
_BESIDE = ("products", "eager")


def scaling_sweeps(device: str) -> tuple[Sweep, ...]:
    """One sweep for each quantity, and one over the shapes that the roofline lacks, on a kind of device."""
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


# A smoke test; its times mean nothing.
_QUICK = Sweep((*_BESIDE, "mtu-eager"), ((32, 16), (32, 32)), (1,))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    description = "One feed-forward with more and more tokens, samples, tasks and experts."
    parser = make_parser(SCALING_TABLE.module, description)
    add_common_options(parser, "scaling_DEVICE.csv")
    parser.add_argument("--seconds", type=float, help="for each row (default: 2 on a CPU, 0.1 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two tiny shapes")
    argv, options = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        context = start_command(SCALING_TABLE, options, argv, "scaling_{device}.csv")
    device = context.device.type
    groups = [
        group
        for sweep in ((_QUICK,) if options.quick else scaling_sweeps(device))
        for group in sweep.groups(options.dtype)
    ]
    _, failures = measure_groups(context, groups, _SECONDS[device] if options.seconds is None else options.seconds)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
