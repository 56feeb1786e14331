"""`python -m benchmarks.ffn.moe_ffn`: times and memory of the routed feed-forward beside its peers.

Writes a CSV row as soon as its group is measured, and prints the ratios that have targets. It needs torch and tqdm;
neither this package nor diffusers has to be installed.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch._functorch.config

from benchmarks.ffn.correctness import assert_matches_reference
from benchmarks.ffn.inputs import Inputs, draw_routed_inputs, draw_shared_inputs, number_of_input_sets
from benchmarks.ffn.peers import CONTENDERS, FFN, default_contender_names, make_calls, make_function
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.sweeps import DEFAULT_SWEEPS, PASSES, QUICK, Sweep
from benchmarks.ffn.targets import TARGETS, TESTED
from benchmarks.harness.arguments import SHAPE_SETS, names_parser, parse_counts, parse_shapes, parse_top_k
from benchmarks.harness.commands import (
    CommandContext,
    add_common_options,
    add_run_options,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.memory import measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.recording import Figures, Log, deadline_after, is_group_measured, record_groups
from benchmarks.harness.report import report_lines
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import Call, capture_stream, measure_host_us, time_interleaved, warm_up
from benchmarks.harness.workloads import Entry, Group
from mtu_kernels import check_backend

_SECONDS = 0.1


class PreparedEntry(NamedTuple):
    """An entry that passed its check and is ready to be timed."""

    entry: Entry
    function: FFN | None
    input_sets: list[Inputs]
    calls: list[Call]
    is_capturable: bool


def measure_group(group: Group, log: Log, device: torch.device, seconds: float) -> Figures:
    """Yields the entries that could be measured, with their figures: times interleaved, then memory one by one."""
    # Code compiled for other shapes would count against the limit of recompilations, and then run uncompiled.
    torch.compiler.reset()
    # Two backward passes over one forward pass: buffers must not be given away after the first one.
    donated = torch._functorch.config.patch(donated_buffer=group.workload.direction != "backward")
    # The gradients of a forward pass run on the stream that it ran on.
    with donated, capture_stream(device):
        first = draw_shared_inputs(group.workload, device, 0)
        count = number_of_input_sets(first, group.workload)
        shared = [first, *(draw_shared_inputs(group.workload, device, seed) for seed in range(1, count))]
        ready = []
        for entry in group.entries:
            with log.report_errors(entry, group.workload):
                sets = [draw_routed_inputs(tensors, entry.setting, seed) for seed, tensors in enumerate(shared)]
                ready.append(_prepare(entry, sets, group.workload.direction, device))
        if not ready:
            return
        capturable = [prepared.is_capturable for prepared in ready]
        timings = time_interleaved([prepared.calls for prepared in ready], capturable, device, seconds)
        for prepared, timing in zip(ready, timings, strict=True):
            yield prepared.entry, timing._asdict() | _memory_and_host(prepared, device)


def _prepare(entry: Entry, sets: Sequence[Inputs], direction: str, device: torch.device) -> PreparedEntry:
    contender = CONTENDERS[entry.contender]
    implementation = contender.implementation
    if implementation.backend is not None:
        check_backend(implementation.backend)
    function = make_function(contender)
    prepared = [implementation.prepare_inputs(inputs) for inputs in sets]
    if function is not None:
        assert_matches_reference(function, prepared[0], implementation.adds_residual)
    calls = make_calls(function, prepared, direction)
    warm_up(calls, device)
    capturable = not (implementation.synchronizes_for_top_k and entry.setting.K is not None)
    return PreparedEntry(entry, function, prepared, calls, capturable)


def _memory_and_host(prepared: PreparedEntry, device: torch.device) -> dict[str, float | int | None]:
    call, function, inputs = prepared.calls[0], prepared.function, prepared.input_sets[0]
    saved = None
    if function is not None and inputs.leaf_tensors:
        saved = measure_saved_bytes(lambda: function(*inputs.moe_ffn_arguments), inputs.named_tensors.values())
    return {
        "host_us": measure_host_us(call, device),
        "peak_bytes": measure_peak_bytes(call, device),
        "saved_bytes": saved,
    }


def measure_groups(
    context: CommandContext, groups: Sequence[Group], seconds: float, until: float = math.inf
) -> tuple[list[Row], int]:
    """Measures groups as `record_groups` does, each contender for so many seconds."""
    return record_groups(
        context, groups, functools.partial(measure_group, device=context.device, seconds=seconds), until=until
    )


def _parser() -> argparse.ArgumentParser:
    description = "Times and memory of the routed feed-forward beside its peers, and the ratios that have targets."
    parser = make_parser(TABLE.module, description, CONTENDERS)
    sweep = parser.add_argument_group(
        "sweep", "Without these options a default sweep is measured; with some, all combinations of their values."
    )
    add, names = sweep.add_argument, names_parser(CONTENDERS, "contender")
    add("--shapes", type=parse_shapes, help="DxL, or sets: sd15, sdxl, cpu (default: sd15,sdxl; cpu on a CPU)")
    add("--batch", type=parse_counts, dest="batches", help="samples (default: 8; 1 on a CPU)")
    add("--experts", type=parse_counts, help="(default: 4)")
    add("--top-k", type=parse_top_k, help="active experts, or dense (default: dense)")
    add("--tasks", type=parse_counts, help="distinct tasks in the batch (default: 1)")
    passes = names_parser(PASSES, "pass")
    add("--pass", type=passes, dest="passes", help=f"{', '.join(PASSES)}, or all (default: forward)")
    add("--contenders", type=names, help="names, or all (default: all but those with -max or @)")
    add("--quick", action="store_true", help="a smoke test: tiny defaults for all of the above")
    add_common_options(parser, "moe_ffn_DEVICE.csv")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help=f"for each row (default: {_SECONDS})")
    add_run_options(parser)
    return parser


def sweeps_from_options(options: argparse.Namespace, device: str) -> tuple[Sweep, ...]:
    """The default sweeps of the device, or one of all combinations of the given options."""
    names = ("shapes", "batches", "experts", "top_k", "tasks", "passes", "contenders")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.quick:
        return (QUICK._replace(**given),)
    if not given:
        return DEFAULT_SWEEPS[device]
    usual = Sweep(default_contender_names())
    if device == "cpu":
        usual = usual._replace(shapes=SHAPE_SETS["cpu"], batches=(1,))
    return (usual._replace(**given),)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    parser = _parser()
    argv, options = parse_arguments(parser, argv)
    until = deadline_after(options.minutes)
    with exit_on_usage_errors(parser):
        if options.report is not None:
            print("\n".join(report_lines(TABLE.read_rows(options.report), TARGETS, TESTED)))
            return 0
        context = start_command(TABLE, options, argv, "moe_ffn_{device}.csv")
    groups = [
        group for sweep in sweeps_from_options(options, context.device.type) for group in sweep.groups(options.dtype)
    ]
    if not groups:
        parser.error("There is nothing to measure: --top-k must be at most --experts, --tasks 1 for --batch 1.")
    if options.resume:
        groups = [group for group in groups if not is_group_measured(group, context)]
    rows, failures = measure_groups(context, groups, options.seconds, until)
    print("\n".join(report_lines(rows, TARGETS, TESTED)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
