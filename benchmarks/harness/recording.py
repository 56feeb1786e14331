"""Measures groups one after the other: each row goes into its file at once, and a line of it to people."""

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness.commands import CommandContext
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Entry, Group, Workload

Figures = Iterator[tuple[Entry, dict[str, Any]]]


def deadline_after(minutes: float | None) -> float:
    """The time by `time.monotonic` in so many minutes; infinite for None."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def new_run_name() -> str:
    """The name of a run, by its start. Rows of different runs were not interleaved, so their groups differ in it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")


def is_group_measured(group: Group, context: CommandContext) -> bool:
    """Whether the file, which may not be there yet, has rows of the same commit for all entries of a group."""
    if not context.output_file.exists():
        return False
    rows = context.table.read_rows(context.output_file)
    rows = [row for row in rows if row.source.get("commit") == context.source["commit"]]
    found = {Entry(row.contender, row.setting) for row in rows if row.workload == group.workload}
    return found.issuperset(group.entries)


class Log:
    """Writes one line for each row, refusal and failure, above the progress bar on stderr."""

    def __init__(self, total: int, unit: str) -> None:
        self.bar = tqdm(total=total, unit=unit, file=sys.stderr)
        self.failures = 0
        self._refused: set[str] = set()

    def write_row(self, row: Row) -> None:
        times = f"{row.median_us:10.1f} µs  ({row.p20_us:.1f} to {row.p80_us:.1f})"
        times += ", without a graph" if row.device == "cuda" and not row.graph else ""
        self.bar.write(f"{row.workload!s:40} {row.setting!s:22} {row.contender:22} {times}", file=sys.stdout)

    @contextmanager
    def report_errors(self, entry: Entry, workload: Workload) -> Iterator[None]:
        """Reports an error of one contender, so that the others are still measured.

        RuntimeError and ValueError say that a contender cannot run here; any other error is a failure.
        """
        try:
            yield
        except (RuntimeError, ValueError) as reason:
            # The compiler's errors name the cause in their second line.
            line = " ".join(str(reason).strip().splitlines()[:2])
            if f"{entry.contender} {line}" not in self._refused:
                self._refused.add(f"{entry.contender} {line}")
                self.bar.write(f"skipped {entry.contender} at {workload}: {line}", file=sys.stderr)
        except Exception as reason:
            self.failures += 1
            place = f"{entry.contender} at {workload} {entry.setting}"
            self.bar.write(f"FAILED, not timed: {place}: {type(reason).__name__}: {reason}", file=sys.stderr)
        self.bar.update()


def record_groups(
    context: CommandContext,
    groups: Sequence[Group],
    measure: Callable[[Group, Log], Figures],
    *,
    unit: str = "row",
    rounds: int = 0,
    until: float = math.inf,
) -> tuple[list[Row], int]:
    """Measures groups and appends their rows to the file.

    Args:
        context: device, file and provenance.
        groups: one after the other.
        measure: yields the entries of a group that could be measured, with their figures by field of `Row`.
        unit: of the progress bar.
        rounds: steps of the bar besides the entries.
        until: time by `time.monotonic` after which no group is begun.

    Returns:
        The rows, and how many contenders were wrong or broke.
    """
    start, rows = new_run_name(), []
    log = Log(sum(len(group.entries) for group in groups) + rounds, unit)
    with log.bar:
        for number, group in enumerate(groups):
            if time.monotonic() > until:
                log.bar.write(f"out of time: {len(groups) - number} of {len(groups)} groups are left", file=sys.stderr)
                break
            place = {"group": f"{start}-{number}", "device": context.device.type, "workload": group.workload}
            for (name, setting), figures in measure(group, log):
                row = Row(contender=name, setting=setting, source=context.source, **place, **figures)
                context.append_row(row)
                log.write_row(row)
                rows.append(row)
            if context.device.type == "cuda":
                # Blocks of memory of one group's sizes fit the next group badly.
                torch.cuda.empty_cache()
    print(f"{len(rows)} rows added to {context.output_file}")
    return rows, log.failures
