"""`python -m benchmarks.models.unet`: one denoising step of a whole UNet, upcycled beside the original and its peers.

Contenders run interleaved in one process. A batch of several tasks has another mix of them at every call. Compiled
contenders are timed where compiling anew is an error, so a row of theirs says that switching tasks recompiles nothing.
Peers that hold one task at a time run those of a batch in turn. The upcycled UNets hold tables in the place of their
routers, as deployed ones do, but for the variants with routers. Writes a CSV row for each contender and setting, and
prints the ratios that have targets.
"""

import argparse
import functools
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.compiler.config

from benchmarks.harness.arguments import names_parser, parse_counts, parse_rounds, parse_top_k
from benchmarks.harness.commands import (
    CommandContext,
    add_common_options,
    add_run_options,
    choose_device,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.recording import Figures, Log, deadline_after, is_group_measured, record_groups
from benchmarks.harness.report import report_lines
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import MIN_ROUNDS, WARM_ROUNDS, Call
from benchmarks.harness.workloads import DENSE, Entry, Group, Setting, Workload
from benchmarks.models import step_kernels
from benchmarks.models.unet_catalogue import CONTENDERS, default_contender_names
from benchmarks.models.unet_measure import GroupMeasurement, MeasurementPlan, make_group
from benchmarks.models.unet_models import (
    LATENT_FACTOR,
    MODELS,
    TASKS,
    ReferenceOutputs,
    UNetFamily,
    check_setting,
    compute_reference_outputs,
    default_num_experts,
    picture_edge,
)
from benchmarks.models.unet_targets import TABLE, TARGETS, TESTED

# Seconds for each contender, by device; on a CPU the rounds take long enough.
_SECONDS = {"cuda": 1.0, "cpu": 0.0}
_POLL_SECONDS = 0.05


def measure_groups(
    context: CommandContext, groups: Sequence[Group], plan: MeasurementPlan, until: float
) -> tuple[list[Row], int]:
    """Measures groups of one model in one dtype, as `record_groups` does."""
    first = groups[0].workload
    family = UNetFamily(first.model, first.dtype, context.device)
    reference = functools.cache(functools.partial(_reference_outputs, family))

    def measure(group: Group, log: Log) -> Figures:
        with _compiler_caches(plan.compiles_without_caches):
            yield from GroupMeasurement(group, log, family, plan, reference).measure()
        # Compiled code is of this group's sizes.
        torch.compiler.reset()
        gc.collect()

    # Graphs have rounds of their own.
    kinds = {CONTENDERS[entry.contender].uses_cuda_graphs for group in groups for entry in group.entries}
    rounds = len(groups) * len(kinds) * (WARM_ROUNDS + plan.runs)
    return record_groups(context, groups, measure, unit="step", rounds=rounds, until=until)


def _reference_outputs(family: UNetFamily, workload: Workload, setting: Setting) -> ReferenceOutputs:
    outputs = compute_reference_outputs(family, workload, setting)
    if family.device.type == "cuda":
        # Contenders need the memory of the wide copy of the UNet, which is 20 GB for SDXL.
        torch.cuda.empty_cache()
    return outputs


@contextmanager
def _compiler_caches(cold: bool) -> Iterator[None]:
    """Where cold, torch reuses nothing that it compiled before; Triton still has kernels of the same text."""
    # Torch adds this function to its configuration modules when they are loaded.
    patch = torch.compiler.config.patch  # pyright: ignore[reportAttributeAccessIssue]
    with patch(force_disable_caches=cold), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)
        yield


def _wait_for(file: Path) -> None:
    """Makes FILE.ready, and waits until the parent, which shares the device out, makes FILE; ends if it is gone."""
    parent = os.getppid()
    file.with_name(f"{file.name}.ready").touch()
    while not file.exists():
        if os.getppid() != parent:
            sys.exit(f"The process that was to make {file} is gone.")
        time.sleep(_POLL_SECONDS)


def _record_kernels(context: CommandContext, workload: Workload, entry: Entry, step: Call) -> None:
    place = {"device": context.device.type, "workload": workload, "source": context.source}
    kernels = step_kernels.profile_kernels(step, context.device)
    for kernel in kernels:
        context.append_row(Row(contender=entry.contender, setting=entry.setting, **place, **kernel._asdict()))
    total = sum(kernel.total_us for kernel in kernels)
    count = sum(kernel.count for kernel in kernels)
    print(f"{workload} {entry.setting} {entry.contender}: {count} kernels, {total:.0f} µs, profiled")


def _size(text: str) -> int:
    if not text.isdecimal() or not int(text) or int(text) % LATENT_FACTOR:
        raise argparse.ArgumentTypeError(f"expected a positive multiple of {LATENT_FACTOR} pixels, got {text!r}.")
    return int(text)


def _up_to(most: int) -> Callable[[str], tuple[int, ...]]:
    return functools.partial(parse_counts, most=most)


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
    names = names_parser(CONTENDERS, "contender")
    add("--contenders", type=names, help="names, or all (default: most; on a CPU some that are not compiled)")
    add("--runs", type=parse_rounds, help=f"least timed steps of each contender (default: {MIN_ROUNDS})")
    add("--seconds", type=float, help="for each contender (default: 1; 0 on a CPU)")
    add("--warm-caches", action="store_true", help="let the compiler reuse its caches; warmup_s is empty then")
    add("--wait-for", type=Path, metavar="FILE", help="build and compile, make FILE.ready, and time when FILE is there")
    add("--kernels", type=Path, metavar="CSV", help="add the kernels of a step of each contender, by the profiler")
    add("--quick", action="store_true", help="a smoke test: a tiny model, two runs")
    add_run_options(parser)
    return parser


def _fill_in(options: argparse.Namespace) -> None:
    """Sets the defaults that depend on other options. Raises ValueError if there is no such device."""
    options.device = choose_device(options.device).type
    small = options.quick or options.device == "cpu"
    options.model = options.model or ("tiny" if options.quick else "sd15")
    defaults = {
        "size": picture_edge(options.model),
        "batches": (TASKS,) if small else (1, 2, 4, 8),
        "experts": (default_num_experts(options.model),),
        "contenders": default_contender_names(options.device),
        "runs": 2 if options.quick else MIN_ROUNDS,
        "seconds": 0.0 if options.quick else _SECONDS[options.device],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _groups(options: argparse.Namespace) -> list[Group]:
    """One group for each number of branches and each batch. Raises ValueError if the options contradict each other."""
    if options.wait_for is not None and len(options.batches) * len(options.branches) > 1:
        given = f"--batches {options.batches} --branches {options.branches}"
        raise ValueError(f"--wait-for is for one batch of one number of branches, got {given}.")
    if options.wait_for is not None and not options.wait_for.parent.is_dir():
        raise ValueError(f"--wait-for must be in a folder that is there, got {options.wait_for}.")
    layouts = [Setting(E, K) for E in options.experts for K in options.top_k]
    for layout in layouts:
        check_setting(options.model, layout)
    settings = [layout._replace(tasks=tasks) for layout in layouts for tasks in options.tasks]
    shared = Workload(model=options.model, size=options.size, dtype=options.dtype)
    workloads = [shared._replace(B=B, branches=branches) for branches in options.branches for B in options.batches]
    return [make_group(workload, options.contenders, settings) for workload in workloads]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    parser = _parser()
    argv, options = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        if options.report is not None:
            print("\n".join(report_lines(TABLE.read_rows(options.report), TARGETS, TESTED)))
            return 0
        _fill_in(options)
        groups = _groups(options)
        context = start_command(TABLE, options, argv, "unet_{device}.csv")
        files = [context]
        if options.kernels is not None:
            files.append(context._replace(table=step_kernels.TABLE, output_file=options.kernels))
            step_kernels.TABLE.check_columns(options.kernels, context.source)
    until = deadline_after(options.minutes)
    plan = MeasurementPlan(options.runs, options.seconds, not options.warm_caches)
    if options.kernels is not None:
        plan = plan._replace(after_timing=functools.partial(_record_kernels, files[1]))
    if options.wait_for is not None:
        plan = plan._replace(before_timing=functools.partial(_wait_for, options.wait_for))
    if options.resume:
        # A run may have been cut off after its rows, before its kernels.
        groups = [group for group in groups if not all(is_group_measured(group, file) for file in files)]
        if not groups:
            print(f"All rows are in {context.output_file} already")
            return 0
    rows, failures = measure_groups(context, groups, plan, until)
    print("\n".join(report_lines(rows, TARGETS, TESTED)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
