"""Groups measured one after the other: each row into its file as soon as it is there, and a line for people."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness.rows import Row, Table
from benchmarks.harness.workloads import Entry


def deadline(minutes: float | None) -> float:
    """The time by `time.monotonic` in so many minutes; None: never."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def measured(rows: Iterable[Row], source: dict[str, str]) -> set[tuple[Any, Entry]]:
    """Workloads and entries of the rows that were measured of the same commit."""
    same = (row for row in rows if row.source.get("commit") == source["commit"])
    return {(row.workload, Entry(row.contender, row.setting)) for row in same}


class Log:
    """One line for each row, refusal and failure; above the progress bar, which is on stderr."""

    def __init__(self, total: int, unit: str) -> None:
        self.bar = tqdm(total=total, unit=unit, file=sys.stderr)
        self.failures = 0
        self._refused: set[str] = set()

    def row(self, row: Row) -> None:
        times = f"{row.median_us:10.1f} µs  ({row.p20_us:.1f} to {row.p80_us:.1f})"
        times += ", without a graph" if row.device == "cuda" and not row.graph else ""
        self.bar.write(f"{row.workload!s:40} {row.setting!s:22} {row.contender:22} {times}", file=sys.stdout)

    @contextmanager
    def attempt(self, entry: Entry, workload: Any) -> Iterator[None]:
        """What is done in here may fail: that is said, and the other contenders are measured all the same."""
        try:
            yield
        except (RuntimeError, ValueError) as reason:
            self._refuse(entry.contender, workload, reason)
        except Exception as reason:
            # Wrong results, and whatever else goes wrong in one contender.
            self.failures += 1
            place = f"{entry.contender} at {workload} {entry.setting}"
            self.bar.write(f"FAILED, not timed: {place}: {type(reason).__name__}: {reason}", file=sys.stderr)
        self.bar.update()

    def _refuse(self, contender: str, workload: Any, reason: Exception) -> None:
        """A contender that cannot run somewhere says so once for each reason."""
        # The compiler's errors name the cause in their second line.
        line = " ".join(str(reason).strip().splitlines()[:2])
        if f"{contender} {line}" not in self._refused:
            self._refused.add(f"{contender} {line}")
            self.bar.write(f"skipped {contender} at {workload}: {line}", file=sys.stderr)


def record(
    groups: Sequence[Any],
    measure: Callable[[str, Any], Iterator[Row]],
    log: Log,
    table: Table,
    output: Path,
    until: float = math.inf,
) -> list[Row]:
    """Measures groups and appends their rows to a CSV file.

    Args:
        groups: what `measure` takes, one after the other.
        measure: name of the group, group → its rows, as they are measured.
        log: whose bar is closed at the end.
        table: the kind of rows.
        output: the file.
        until: time by `time.monotonic` after which no group is begun.

    Returns:
        All rows.
    """
    # Rows of another run were not interleaved with these: groups are named apart by time.
    start = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    rows = []
    with log.bar:
        for number, group in enumerate(groups):
            if time.monotonic() > until:
                log.bar.write(f"out of time: {len(groups) - number} of {len(groups)} groups are left", file=sys.stderr)
                break
            for row in measure(f"{start}-{number}", group):
                table.append(output, row)
                log.row(row)
                rows.append(row)
    return rows
