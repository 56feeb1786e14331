"""`python -m benchmarks.unet`: one denoising step of a whole UNet, upcycled beside the original.

The upcycled UNet gets a batch of four mixed tasks, its routing tables cached as they are when sampling. Contenders run
interleaved in one process. Writes a CSV row for each of them, and prints the ratios that they are held to.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from benchmarks.inputs import DTYPES
from benchmarks.memory import peak_bytes
from benchmarks.provenance import RESULTS, command_line, provenance
from benchmarks.recording import Log, record
from benchmarks.report import report
from benchmarks.rows import check_header
from benchmarks.sweeps import DENSE, Entry, Setting, heeded, parse_choices, parse_counts
from benchmarks.timing import MIN_ROUNDS, WARM_ROUNDS, time_interleaved
from benchmarks.unet_models import (
    CHECKED_SIZE,
    LATENT_FACTOR,
    MODELS,
    TASKS,
    build_original,
    build_upcycled,
    check_setting,
    draw_inputs,
    make_yardstick,
)
from benchmarks.unet_rows import COLUMNS, TARGETS, Row, Workload

# The paper's layout for SD 1.5, at the size of its pictures; and a smoke test with nothing to learn from.
_DEFAULTS = {"model": "sd15", "size": 512, "batches": (TASKS,), "runs": MIN_ROUNDS}
_QUICK = {"model": "tiny", "size": 64, "batches": (TASKS,), "runs": 2}


class Contender(NamedTuple):
    """One way to run a UNet: what it is, in a line, and the backend of the upcycled one. None: the original."""

    about: str
    backend: str | None

    def build(self, model: str, dtype: str, setting: Setting) -> UNet2DConditionModel:
        """The UNet, with weights of its own."""
        if self.backend is None:
            return build_original(model, dtype)
        return build_upcycled(model, dtype, setting, self.backend)


CONTENDERS = {
    "stock-eager": Contender("the original UNet of diffusers", None),
    **{f"mtu-{name}": Contender(f"upcycled, on the backend {name!r}", name) for name in ("eager", "cpp")},
}


def prepare(
    names: Sequence[str], model: str, dtype: str, setting: Setting, log: Log
) -> dict[str, UNet2DConditionModel]:
    """The UNets of the contenders that run here and compute what they should."""
    workload, unets = Workload(model, CHECKED_SIZE, TASKS, dtype), {}
    yardstick = functools.cache(functools.partial(make_yardstick, workload))
    for name in names:
        log.bar.set_description(f"check of {name}")
        routed = heeded(name, setting)
        with log.attempt(Entry(name, routed), workload):
            unet = CONTENDERS[name].build(model, dtype, setting)
            # All dense ones are held to the original, and share its outputs.
            yardstick(Setting() if routed.K is DENSE else routed).check(unet)
            unets[name] = unet
    return unets


def measure(
    unets: dict[str, UNet2DConditionModel], workload: Workload, tasks: int, runs: int, log: Log
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the contenders with their columns: steps timed interleaved, then memory one by one."""
    device = torch.device("cpu")
    log.bar.set_description(f"rounds of {workload}")
    steps = [torch.no_grad()(functools.partial(unet, **draw_inputs(unet, workload, tasks))) for unet in unets.values()]
    timings = time_interleaved([[step] for step in steps], [False] * len(steps), device, 0, runs, log.bar.update)
    for name, step, timing in zip(unets, steps, timings, strict=True):
        yield name, timing._asdict() | {"peak_bytes": peak_bytes(step, device)}


def run(
    names: Sequence[str],
    workloads: Sequence[Workload],
    setting: Setting,
    runs: int,
    output: Path,
    source: dict[str, str],
) -> tuple[list[Row], int]:
    """Builds and checks the contenders, measures them in one workload after the other, and appends rows to the file.

    Args:
        names: of contenders.
        workloads: of one model in one dtype.
        setting: experts of the upcycled UNets, and the most tasks in a batch.
        runs: rounds that are timed for each workload.
        output: the CSV file.
        source: provenance of the rows.

    Returns:
        The rows, and how many contenders are missing because they were wrong or broke.
    """
    model, _, _, dtype = workloads[0]
    log = Log(len(names) + len(workloads) * (WARM_ROUNDS + runs), unit="step")
    unets = prepare(names, model, dtype, setting, log)

    def rows_of(group: str, workload: Workload) -> Iterator[Row]:
        tasks = min(setting.tasks, workload.B)
        for name, columns in measure(unets, workload, tasks, runs, log):
            routed = heeded(name, setting._replace(tasks=tasks))
            yield Row(group, name, "cpu", workload, routed, **columns, source=source)

    return record(workloads if unets else (), rows_of, log, output), log.failures


def _contenders(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(CONTENDERS), "contender")


def _size(text: str) -> int:
    if not text.isdecimal() or not int(text) or int(text) % LATENT_FACTOR:
        raise argparse.ArgumentTypeError(f"expected a positive multiple of {LATENT_FACTOR} pixels, got {text!r}.")
    return int(text)


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}.")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:22} {contender.about}" for name, contender in CONTENDERS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unet",
        description="One denoising step of a whole UNet with random weights, upcycled beside the original.",
        epilog="contenders:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=tuple(MODELS), help="(default: sd15)")
    parser.add_argument("--device", choices=tuple(TARGETS), default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--batches", type=parse_counts, help=f"samples of a step (default: {TASKS}, one for each task)")
    parser.add_argument("--size", type=_size, help="edge of the pictures in pixels (default: 512)")
    parser.add_argument("--experts", type=_count, default=4, help="(default: 4)")
    parser.add_argument("--top-k", type=_count, default=DENSE, help="active experts (default: all, dense routing)")
    parser.add_argument(
        "--contenders", type=_contenders, default=tuple(CONTENDERS), help="names, separated by commas (default: all)"
    )
    # A percentile needs two times.
    at_least_two = functools.partial(_count, least=2)
    parser.add_argument("--runs", type=at_least_two, help=f"timed steps of each contender (default: {MIN_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model, two runs")
    parser.add_argument("--output", type=Path, help="CSV to add rows to (default: results/unet_DEVICE.csv)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    argv = sys.argv[1:] if argv is None else argv
    # Or else the profiler, which counts memory on a CPU, writes two lines for each row. Read when it starts first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    parser = _parser()
    options = parser.parse_args(argv)
    for name, value in (_QUICK if options.quick else _DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    output = options.output or RESULTS / f"unet_{options.device}.csv"
    source = provenance(command_line("benchmarks.unet", argv))
    setting = Setting(options.experts, options.top_k, TASKS)
    try:
        check_setting(options.model, setting)
        check_header(output, [*COLUMNS, *source])
    except ValueError as error:
        parser.error(str(error))
    workloads = [Workload(options.model, options.size, B, options.dtype) for B in options.batches]
    rows, failures = run(options.contenders, workloads, setting, options.runs, output, source)
    print(f"{len(rows)} rows added to {output}")
    print("\n".join(report(rows, targets=TARGETS)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
