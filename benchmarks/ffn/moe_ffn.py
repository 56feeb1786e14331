"""`python -m benchmarks.ffn.moe_ffn`: times and memory of the routed feed-forward beside its peers.

Writes a CSV row as soon as its group is measured, and prints the ratios that have targets. It needs
torch and tqdm; neither this package nor diffusers has to be installed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config

from benchmarks.ffn.correctness import check
from benchmarks.ffn.inputs import Inputs, draw_shared, number_of_sets, route
from benchmarks.ffn.peers import CONTENDERS, FFN, bind, default_contenders, make
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.sweeps import DEFAULT_SWEEPS, PASSES, QUICK, Sweep
from benchmarks.ffn.targets import TARGETS, TESTED
from benchmarks.harness.arguments import SHAPE_SETS, parse_choices, parse_counts, parse_shapes, parse_top_k
from benchmarks.harness.commands import add_common_options, make_parser, parse, start
from benchmarks.harness.memory import peak_bytes, saved_bytes
from benchmarks.harness.recording import Log, deadline, measured, record
from benchmarks.harness.report import report
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import Call, host_us, time_interleaved, warm_up
from benchmarks.harness.workloads import Entry, Group
from mtu_kernels import check_backend

_SECONDS = 0.1


class Prepared(NamedTuple):
    """An entry that passed its check and is ready to be timed."""

    entry: Entry
    function: FFN | None
    sets: list[Inputs]
    calls: list[Call]
    capturable: bool


def measure(group: Group, device: torch.device, seconds: float, log: Log) -> Iterator[tuple[Entry, dict]]:
    """Yields the entries that could be measured, with their columns: timed interleaved, then memory one by one."""
    # Code compiled for other shapes would count against the limit of recompilations, and then run uncompiled.
    torch.compiler.reset()
    # Two backward passes over one forward pass: buffers must not be given away after the first one.
    donated = torch._functorch.config.patch(donated_buffer=group.workload.direction != "backward")
    # Captures need a stream of their own, and gradients of a forward pass run on the stream that it ran on.
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with donated, stream:
        first = draw_shared(group.workload, device, 0)
        count = number_of_sets(first, group.workload)
        shared = [first, *(draw_shared(group.workload, device, seed) for seed in range(1, count))]
        ready = []
        for entry in group.entries:
            with log.attempt(entry, group.workload):
                sets = [route(tensors, entry.setting, seed) for seed, tensors in enumerate(shared)]
                ready.append(_prepare(entry, sets, group.workload.direction, device))
        if not ready:
            return
        capturable = [prepared.capturable for prepared in ready]
        timings = time_interleaved([prepared.calls for prepared in ready], capturable, device, seconds)
        for prepared, timing in zip(ready, timings, strict=True):
            yield prepared.entry, timing._asdict() | _memory_and_host(prepared, device)


def _prepare(entry: Entry, sets: Sequence[Inputs], direction: str, device: torch.device) -> Prepared:
    contender = CONTENDERS[entry.contender]
    implementation = contender.implementation
    if implementation.backend is not None:
        check_backend(implementation.backend)
    function = make(contender)
    prepared = [implementation.prepare(inputs) for inputs in sets]
    if function is not None:
        check(function, prepared[0], implementation.residual)
    calls = bind(function, prepared, direction)
    warm_up(calls, device)
    capturable = not (implementation.waits_for_top_k and entry.setting.K is not None)
    return Prepared(entry, function, prepared, calls, capturable)


def _memory_and_host(prepared: Prepared, device: torch.device) -> dict[str, float | int | None]:
    call, function, inputs = prepared.calls[0], prepared.function, prepared.sets[0]
    saved = None
    if function is not None and inputs.leaves:
        saved = saved_bytes(lambda: function(*inputs.arguments), inputs.named.values())
    return {"host_us": host_us(call, device), "peak_bytes": peak_bytes(call, device), "saved_bytes": saved}


def run(
    groups: Sequence[Group],
    device: torch.device,
    seconds: float,
    output: Path,
    source: dict[str, str],
    until: float = math.inf,
) -> tuple[list[Row], int]:
    """Measures groups one after the other and appends their rows to the CSV file as soon as they are there.

    None is begun after the time `until`, by `time.monotonic`.

    Returns:
        The rows, and how many of them are missing because a contender was wrong or broke.
    """
    log = Log(sum(len(group.entries) for group in groups), unit="row")

    def rows_of(name: str, group: Group) -> Iterator[Row]:
        place = {"group": name, "device": device.type, "workload": group.workload, "source": source}
        for entry, columns in measure(group, device, seconds, log):
            yield Row(contender=entry.contender, setting=entry.setting, **place, **columns)
        if device.type == "cuda":
            # A group's blocks fit the next one badly.
            torch.cuda.empty_cache()

    return record(groups, rows_of, log, TABLE, output, until), log.failures


def _contenders(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(CONTENDERS), "contender")


def _passes(text: str) -> tuple[str, ...]:
    return parse_choices(text, PASSES, "pass")


def _parser() -> argparse.ArgumentParser:
    description = "Times and memory of the routed feed-forward beside its peers, and the ratios that have targets."
    parser = make_parser(TABLE.module, description, CONTENDERS)
    what = parser.add_argument_group(
        "what to measure", "Without any of these: a default sweep. With some: all combinations of what they list."
    )
    what.add_argument(
        "--shapes", type=parse_shapes, help="DxL, or sets: sd15, sdxl, cpu (default: sd15,sdxl; cpu on a CPU)"
    )
    what.add_argument("--batch", type=parse_counts, dest="batches", help="samples (default: 8; 1 on a CPU)")
    what.add_argument("--experts", type=parse_counts, help="(default: 4)")
    what.add_argument("--top-k", type=parse_top_k, help="active experts, or dense (default: dense)")
    what.add_argument("--tasks", type=parse_counts, help="distinct tasks in the batch (default: 1)")
    what.add_argument("--pass", type=_passes, dest="passes", help=f"{', '.join(PASSES)}, or all (default: forward)")
    what.add_argument("--contenders", type=_contenders, help="names, or all (default: all but those with -max or @)")
    what.add_argument("--quick", action="store_true", help="a smoke test: tiny defaults for all of the above")
    add_common_options(parser, "moe_ffn_DEVICE.csv")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help=f"for each row (default: {_SECONDS})")
    parser.add_argument("--minutes", type=float, help="no group is begun after these (default: all are)")
    parser.add_argument(
        "--resume", action="store_true", help="leave out groups with all rows of this commit in the file"
    )
    parser.add_argument("--report", type=Path, metavar="CSV", help="measure nothing: print the ratios of these rows")
    parser.add_argument("--tested", type=_contenders, help="contender that the ratios are of (default: by device)")
    return parser


def sweeps_of(options: argparse.Namespace, device: str) -> tuple[Sweep, ...]:
    """The default sweep of the device, or one of all combinations of the options that were given."""
    names = ("shapes", "batches", "experts", "top_k", "tasks", "passes", "contenders")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.quick:
        return (QUICK._replace(**given),)
    if not given:
        return DEFAULT_SWEEPS[device]
    usual = Sweep(default_contenders())
    if device == "cpu":
        usual = usual._replace(shapes=SHAPE_SETS["cpu"], batches=(1,))
    return (usual._replace(**given),)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    parser = _parser()
    argv, options = parse(parser, argv)
    until = deadline(options.minutes)
    tested = options.tested[0] if options.tested else None
    try:
        if options.report is not None:
            print("\n".join(report(TABLE.read(options.report), TARGETS, TESTED, tested)))
            return 0
        device, output, source = start(TABLE, options, argv, "moe_ffn_{device}.csv")
    except ValueError as error:
        parser.error(str(error))
    groups = [group for sweep in sweeps_of(options, device.type) for group in sweep.groups(options.dtype)]
    if not groups:
        parser.error("There is nothing to measure: --top-k must be at most --experts, --tasks 1 for --batch 1.")
    if options.resume and output.exists():
        done = measured(TABLE.read(output), source)
        groups = [group for group in groups if not all((group.workload, entry) in done for entry in group.entries)]
    rows, failures = run(groups, device, options.seconds, output, source, until)
    print(f"{len(rows)} rows added to {output}")
    print("\n".join(report(rows, TARGETS, TESTED, tested)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
