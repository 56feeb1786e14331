"""The ratios of measured rows, and the lines that say whether they meet their targets."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Setting


class Ratio(NamedTuple):
    """A figure of a row over one of another row in its group."""

    measured: Row
    value: float


Ratios = Callable[[Sequence[Row], str], list[Ratio]]


class Target(NamedTuple):
    """The most that a ratio of two figures may be.

    Attributes:
        description: name of the line.
        at_most: the target; None where the ratio is only reported.
        find_ratios: rows, name of the contender under test → ratios that are compared with the target.
        dtype: the compute dtype that the target is stated for; None for any.
        uses_mean: whether the geometric mean is compared, and not the largest ratio.
    """

    description: str
    at_most: float | None
    find_ratios: Ratios
    dtype: str | None = None
    uses_mean: bool = False

    def ratios_of_rows(self, rows: Sequence[Row], tested: str) -> list[Ratio]:
        """The ratios of the rows in the target's dtype."""
        return self.find_ratios([row for row in rows if self.dtype in (None, row.workload.dtype)], tested)

    def mean_or_largest(self, ratios: Sequence[Ratio]) -> float:
        """The mean or the largest ratio, which is compared with the target."""
        values = [ratio.value for ratio in ratios]
        return geometric_mean(values) if self.uses_mean else max(values)


def pair_rows(
    rows: Sequence[Row], of: str, to: str, setting: Callable[[Setting], Setting]
) -> Iterator[tuple[Row, Row]]:
    """Rows of the contender `of`, each with the row of `to` in its group.

    `setting` maps the setting of a row to that of the row that it is compared with.
    """
    measured = {(row.group, row.workload, row.contender, row.setting): row for row in rows}
    for row in rows:
        if row.contender == of:
            other = measured.get((row.group, row.workload, to, setting(row.setting)))
            if other is not None:
                yield row, other


def make_ratios(pairs: Iterable[tuple[Row, Row]], figure: str = "median_us", divisor: str | None = None) -> list[Ratio]:
    """A figure of each row over that of its partner, by default the same figure, where both are known.

    The last measurement of each workload and setting counts.
    """
    found = {}
    for row, other in pairs:
        value, unit = getattr(row, figure), getattr(other, divisor or figure)
        if value is not None and unit:
            found[row.workload, row.setting] = Ratio(row, value / unit)
    return list(found.values())


def report_lines(rows: Sequence[Row], targets: Mapping[str, Sequence[Target]], tested: Mapping[str, str]) -> list[str]:
    """Lines "what: measured (target)" for each device and dtype among the rows.

    `targets` and `tested`, the name of the contender under test, are by device.
    """
    lines = []
    for device, dtype in sorted({(row.device, row.workload.dtype) for row in rows}):
        here = [row for row in rows if (row.device, row.workload.dtype) == (device, dtype)]
        name = tested[device]
        lines.append(f"{name}, {dtype}, {', '.join(sorted({processor_and_commit(row) for row in here}))}")
        lines += [f"  {_line(target, here, name)}" for target in targets[device] if target.dtype in (None, dtype)]
    return lines


def processor_and_commit(row: Row) -> str:
    """The processor and the commit that a row was measured at."""
    return f"{row.source.get('processor', row.device)} at commit {row.source.get('commit', 'unknown')}"


def _line(target: Target, rows: Sequence[Row], tested: str) -> str:
    found = target.ratios_of_rows(rows, tested)
    limit = "no target" if target.at_most is None else f"at most {target.at_most:.2f}"
    if not found:
        return f"{target.description}: not measured ({limit})"
    value, note = target.mean_or_largest(found), f"geometric mean of {len(found)}"
    if not target.uses_mean:
        row = max(found, key=lambda ratio: ratio.value).measured
        note = f"largest of {len(found)}, at {row.workload} {row.setting}"
    verdict = "" if target.at_most is None or value <= target.at_most else ", missed"
    return f"{target.description}: {value:.3f} ({limit}{verdict}; {note})"


def geometric_mean(values: Sequence[float]) -> float:
    """``exp(mean(log v))``"""
    return math.exp(math.fsum(map(math.log, values)) / len(values))
