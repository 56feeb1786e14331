"""`python -m benchmarks.models.unet`: one denoising step of a whole UNet, upcycled beside the original and its peers.

Contenders run interleaved in one process. A batch of several tasks has another mix of them at every call; compiled
contenders are timed where compiling anew is an error, so a row of theirs says that switching tasks recompiles nothing.
Peers that hold one task at a time run those of a batch in turn. The upcycled UNets hold tables in the place of their
routers, as deployed ones do, unless a name ends in @routers. Writes a CSV row for each contender and setting, and
prints the ratios that have targets.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.compiler.config

from benchmarks.harness.arguments import parse_choices, parse_count, parse_counts, parse_top_k
from benchmarks.harness.commands import add_common_options, choose_device, make_parser, parse, start
from benchmarks.harness.recording import Log, deadline, measured, record
from benchmarks.harness.report import report
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import MIN_ROUNDS, WARM_ROUNDS, Call
from benchmarks.harness.workloads import DENSE, Entry, Setting, Workload
from benchmarks.models import step_kernels
from benchmarks.models.step_kernels import are_counted, kernels_of
from benchmarks.models.unet_catalogue import CONTENDERS, default_contenders
from benchmarks.models.unet_measure import GroupMeasurement, MeasurementPlan
from benchmarks.models.unet_models import (
    LATENT_FACTOR,
    MODELS,
    TASKS,
    Family,
    ReferenceOutputs,
    check_setting,
    compute_reference_outputs,
    default_experts,
    default_size,
)
from benchmarks.models.unet_targets import TABLE, TARGETS, TESTED

# Seconds for each contender, by device; on a CPU the rounds take long enough.
_SECONDS = {"cuda": 1.0, "cpu": 0.0}
_POLL_SECONDS = 0.05


def run(
    workloads: Sequence[Workload],
    device: torch.device,
    plan: MeasurementPlan,
    output: Path,
    source: dict[str, str],
    until: float = math.inf,
) -> tuple[list[Row], int]:
    """Measures the contenders in one workload after the other, and appends rows to the file.

    Args:
        workloads: of one model in one dtype.
        device: where.
        plan: what is measured.
        output: the CSV file.
        source: provenance of the rows.
        until: time by `time.monotonic` after which no workload is begun.

    Returns:
        The rows, and how many of them are missing because a contender was wrong or broke.
    """
    # Graphs have rounds of their own.
    kinds = {CONTENDERS[name].graphs for name in plan.names}
    rounds = len(workloads) * len(kinds) * (WARM_ROUNDS + plan.runs)
    log = Log(sum(len(plan.entries(workload)) for workload in workloads) + rounds, unit="step")
    family = Family(workloads[0].model, workloads[0].dtype, device)
    reference = functools.cache(functools.partial(_reference_outputs, family))

    def rows_of(group: str, workload: Workload) -> Iterator[Row]:
        place = {"group": group, "device": device.type, "workload": workload, "source": source}
        with _caches_of_the_compiler(plan.cold):
            for entry, columns in GroupMeasurement(family, workload, plan, log, reference).columns():
                yield Row(contender=entry.contender, setting=entry.setting, **place, **columns)
        # Compiled code is of this group's sizes, and so are the blocks of memory that its contenders leave.
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return record(workloads, rows_of, log, TABLE, output, until), log.failures


def _reference_outputs(family: Family, workload: Workload, setting: Setting) -> ReferenceOutputs:
    made = compute_reference_outputs(family, workload, setting)
    if family.device.type == "cuda":
        # The wide copy of the UNet, 20 GB of SDXL, is not kept from what runs beside.
        torch.cuda.empty_cache()
    return made


@contextmanager
def _caches_of_the_compiler(cold: bool) -> Iterator[None]:
    """Where cold, torch uses nothing again that it compiled before; Triton still knows kernels of the same text."""
    with torch.compiler.config.patch(force_disable_caches=cold), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)
        yield


def _wait_for(file: Path) -> None:
    """Says that all is prepared, and waits for the parent, which shares the device out; without it there is no turn."""
    parent = os.getppid()
    file.with_name(f"{file.name}.ready").touch()
    while not file.exists():
        if os.getppid() != parent:
            sys.exit(f"Whoever was to make {file} is gone.")
        time.sleep(_POLL_SECONDS)


def _record_kernels(
    path: Path, device: torch.device, source: dict[str, str], workload: Workload, entry: Entry, step: Call
) -> None:
    place = {"device": device.type, "workload": workload, "source": source}
    kernels = kernels_of(step, device)
    for kernel in kernels:
        row = Row(contender=entry.contender, setting=entry.setting, **place, **kernel._asdict())
        step_kernels.TABLE.append(path, row)
    total = sum(kernel.total_us for kernel in kernels)
    count = sum(kernel.count for kernel in kernels)
    print(f"{workload} {entry.setting} {entry.contender}: {count} kernels, {total:.0f} µs, profiled")


def _contenders(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(CONTENDERS), "contender")


def _size(text: str) -> int:
    if not text.isdecimal() or not int(text) or int(text) % LATENT_FACTOR:
        raise argparse.ArgumentTypeError(f"expected a positive multiple of {LATENT_FACTOR} pixels, got {text!r}.")
    return int(text)


def _up_to(most: int) -> Callable[[str], tuple[int, ...]]:
    def counts(text: str) -> tuple[int, ...]:
        parsed = parse_counts(text)
        if max(parsed) > most:
            raise argparse.ArgumentTypeError(f"expected whole numbers up to {most}, got {text!r}.")
        return parsed

    return counts


def _parser() -> argparse.ArgumentParser:
    description = "One denoising step of a whole UNet with random weights: upcycled, the original, other peers."
    parser = make_parser(TABLE.module, description, CONTENDERS)
    add_common_options(parser, "unet_DEVICE.csv")
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), help="(default: sd15)")
    add("--batches", type=parse_counts, help=f"pictures of a step (default: 1,2,4,8; {TASKS} on a CPU)")
    add("--branches", type=_up_to(3), default=(1,), help="rows of a picture: guidance doubles, triples (default: 1)")
    add("--size", type=_size, help="edge of the pictures in pixels (default: 512; 1024 for sdxl)")
    add("--experts", type=parse_counts, help="(default: 4; 1 for sdxl)")
    add("--top-k", type=parse_top_k, default=(DENSE,), help="active experts, or dense (default: dense)")
    add("--tasks", type=_up_to(TASKS), default=(1, TASKS), help=f"in a batch (default: 1,{TASKS})")
    add("--contenders", type=_contenders, help="names, or all (default: on a CPU what is not compiled, on CUDA most)")
    # A percentile needs two times.
    at_least_two = functools.partial(parse_count, least=2)
    add("--runs", type=at_least_two, help=f"least timed steps of each contender (default: {MIN_ROUNDS})")
    add("--seconds", type=float, help="for each contender (default: 1; 0 on a CPU)")
    add("--warm-caches", action="store_true", help="let the compiler reuse what it compiled before: no warmup_s then")
    add("--minutes", type=float, help="no group is begun after these (default: all are)")
    add("--wait-for", type=Path, metavar="FILE", help="build and compile, make FILE.ready, and time when FILE is there")
    add(
        "--resume",
        action="store_true",
        help="leave out groups whose rows, and kernels, of this commit are in the files",
    )
    add("--kernels", type=Path, metavar="CSV", help="add the kernels of a step of each contender, by the profiler")
    add("--quick", action="store_true", help="a smoke test: a tiny model, two runs")
    add("--report", type=Path, metavar="CSV", help="measure nothing: print the ratios of these rows")
    add("--tested", help="contender that the ratios are of, without +graphs (default: by device)")
    return parser


def _fill_in(options: argparse.Namespace) -> None:
    """The defaults that depend on other options.

    Raises:
        ValueError: there is no such device.
    """
    options.device = choose_device(options.device).type
    small = options.quick or options.device == "cpu"
    options.model = options.model or ("tiny" if options.quick else "sd15")
    defaults = {
        "size": default_size(options.model),
        "batches": (TASKS,) if small else (1, 2, 4, 8),
        "experts": (default_experts(options.model),),
        "contenders": default_contenders(options.device),
        "runs": 2 if options.quick else MIN_ROUNDS,
        "seconds": 0.0 if options.quick else _SECONDS[options.device],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    parser = _parser()
    argv, options = parse(parser, argv)
    until = deadline(options.minutes)
    try:
        if options.report is not None:
            print("\n".join(report(TABLE.read(options.report), TARGETS, TESTED, options.tested)))
            return 0
        _fill_in(options)
        if options.wait_for is not None and len(options.batches) * len(options.branches) > 1:
            raise ValueError(f"--wait-for is for one batch of one number of branches, got {argv}.")
        if options.wait_for is not None and not options.wait_for.parent.is_dir():
            raise ValueError(f"--wait-for must be in a folder that is there, got {options.wait_for}.")
        layouts = [Setting(E, K) for E in options.experts for K in options.top_k]
        for layout in layouts:
            check_setting(options.model, layout)
        device, output, source = start(TABLE, options, argv, "unet_{device}.csv")
        if options.kernels is not None:
            step_kernels.TABLE.check(options.kernels, source)
    except ValueError as error:
        parser.error(str(error))
    settings = tuple(layout._replace(tasks=tasks) for layout in layouts for tasks in options.tasks)
    plan = MeasurementPlan(options.contenders, settings, options.runs, options.seconds, not options.warm_caches)
    if options.kernels is not None:
        plan = plan._replace(after_timing=functools.partial(_record_kernels, options.kernels, device, source))
    if options.wait_for is not None:
        plan = plan._replace(before_timing=functools.partial(_wait_for, options.wait_for))
    workloads = [
        Workload(model=options.model, size=options.size, B=B, branches=branches, dtype=options.dtype)
        for branches in options.branches
        for B in options.batches
    ]
    if options.resume and output.exists():
        done = measured(TABLE.read(output), source)

        def complete(workload: Workload) -> bool:
            entries = plan.entries(workload)
            # A run may have been cut off after its rows.
            counted = options.kernels is None or are_counted(options.kernels, workload, entries, source)
            return counted and all((workload, entry) in done for entry in entries)

        workloads = [workload for workload in workloads if not complete(workload)]
        if not workloads:
            print(f"All rows are in {output} already")
            return 0
    rows, failures = run(workloads, device, plan, output, source, until)
    print(f"{len(rows)} rows added to {output}")
    print("\n".join(report(rows, TARGETS, TESTED, options.tested)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
