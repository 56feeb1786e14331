"""The ratios that measurements are held to, taken from measured rows; and those of the feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.rows import Row
from benchmarks.harness.sweeps import heeded
from benchmarks.harness.workloads import DENSE, Entry, Workload

_TESTED = "{tested}"


class Pair(NamedTuple):
    """A row, and the row of its group that it is compared with."""

    row: Row
    ratio: float


class Target(NamedTuple):
    """A ratio of two rows of one group, and what it may be at most.

    Attributes:
        what: the line's name.
        at_most: the target; ``None``: the ratio is said for information.
        of: contender whose rows are looked at; "{tested}" stands for the one under test.
        to: contender that they are divided by, in the same workload and setting.
        setting: fields of `Setting` that the rows must have.
        to_setting: fields in which the divisor's setting differs.
        direction: the pass.
        quantity: the column.
        to_quantity: that of the divisor; ``None``: the same.
        where: which workloads count.
        dtype: the compute dtype that it is stated for; ``None``: any.
        mean: whether the geometric mean is held to the target, or else the largest ratio.
    """

    what: str
    at_most: float | None
    of: str = _TESTED
    to: str = _TESTED
    setting: dict[str, Any] = {"K": DENSE, "tasks": 1}  # noqa: RUF012 (read only)
    to_setting: dict[str, Any] = {}  # noqa: RUF012
    direction: str = "forward"
    quantity: str = "median_us"
    to_quantity: str | None = None
    where: Callable[[Any], bool] = lambda workload: True
    dtype: str | None = None
    mean: bool = False


def _large(workload: Workload) -> bool:
    return workload.D <= 640 and workload.L >= 1024


def _shape(D: int, L: int) -> Callable[[Workload], bool]:
    return lambda workload: (workload.D, workload.L) == (D, L)


_TRAINING = {"direction": "forward+backward", "to": "eager"}
_TOP_2 = {"setting": {"E": 8, "K": 2}, "to_setting": {"K": DENSE}}
TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target("forward / two bare products, B >= 2", 1.10, to="products", where=lambda w: w.B >= 2, mean=True),
        Target("forward / two bare products, any shape", 1.15, to="products"),
        Target("forward / eager", 0.82, to="eager", mean=True),
        Target("forward / eager at 320x4096", 0.65, to="eager", where=_shape(320, 4096)),
        Target("forward / compile-folded", 0.92, to="compile-folded", mean=True),
        Target("forward / compile-folded-max", 0.92, to="compile-folded-max", mean=True),
        Target("forward / compile-folded-max, any shape", 1.02, to="compile-folded-max"),
        Target("top-2 of 8 / dense of 8, D <= 640 and L >= 1024", 0.30, **_TOP_2, where=_large),
        Target("top-2 of 8 / dense of 8, other shapes", 0.45, **_TOP_2, where=lambda w: not _large(w)),
        Target("four mixed tasks / one task", 1.03, setting={"tasks": 4}, to_setting={"tasks": 1}),
        Target("64 tasks / 4 tasks", 1.03, setting={"tasks": 64}, to_setting={"tasks": 4}),
        Target("forward + backward / eager", 0.75, **_TRAINING, mean=True),
        Target("bytes saved for backward / eager", 0.60, **_TRAINING, quantity="saved_bytes"),
        Target("peak memory of forward + backward / eager", 0.95, **_TRAINING, quantity="peak_bytes"),
        Target("the same with recompute", 0.60, f"{_TESTED}-recompute", **_TRAINING, quantity="peak_bytes"),
    ),
    "cpu": (
        Target("forward / eager at 320x8192", 0.42, to="eager", where=_shape(320, 8192), dtype="bf16"),
        Target("forward / eager at 640x2048", 0.70, to="eager", where=_shape(640, 2048), dtype="bf16"),
        Target("forward / eager at 1280x512", 0.88, to="eager", where=_shape(1280, 512), dtype="bf16"),
        Target("forward / eager at 1280x128", 0.92, to="eager", where=_shape(1280, 128), dtype="bf16"),
        Target("forward / two bare products at 320x8192", 1.10, to="products", where=_shape(320, 8192), dtype="bf16"),
        Target("forward / two bare products at 640x2048", 1.05, to="products", where=_shape(640, 2048), dtype="bf16"),
        Target("forward / two bare products at 1280x512", 1.00, to="products", where=_shape(1280, 512), dtype="bf16"),
        Target("forward / two bare products at 1280x128", 1.05, to="products", where=_shape(1280, 128), dtype="bf16"),
        Target("forward / eager", 0.90, to="eager", dtype="fp32", mean=True),
        Target("forward / compile-folded", 0.90, to="compile-folded", mean=True),
        Target("top-2 of 8 / dense of 8", 0.35, **_TOP_2),
        Target("peak memory of forward / eager", 0.50, to="eager", quantity="peak_bytes"),
        Target("forward + backward / eager", 1.00, **_TRAINING, mean=True),
    ),
}
# The contender under test, unless another one is named.
TESTED = {"cuda": "mtu-triton", "cpu": "mtu-cpp"}


def report(
    rows: Sequence[Row], tested: str | None = None, targets: Mapping[str, Sequence[Target]] = TARGETS
) -> list[str]:
    """Lines "what: measured (target)" for each device and dtype among the rows.

    Args:
        rows: as read from a CSV file. Of a pair that was measured more than once the last counts.
        tested: the contender under test; that of the device by default.
        targets: by device; those of the feed-forward by default.
    """
    lines = []
    for device, dtype in sorted({(row.device, row.workload.dtype) for row in rows}):
        chosen = [row for row in rows if (row.device, row.workload.dtype) == (device, dtype)]
        name = tested or TESTED[device]
        lines.append(f"{name}, {dtype}, {', '.join(sorted({place(row) for row in chosen}))}")
        lines += ["  " + _line(target, chosen, name) for target in targets[device] if target.dtype in (None, dtype)]
    return lines


def place(row: Row) -> str:
    """Where a row was measured: processor and commit."""
    return f"{row.source.get('processor', row.device)} at commit {row.source.get('commit', 'unknown')}"


def _line(target: Target, rows: Sequence[Row], tested: str) -> str:
    pairs = pairs_of(target, rows, tested)
    limit = "no target" if target.at_most is None else f"at most {target.at_most:.2f}"
    if not pairs:
        return f"{target.what}: not measured ({limit})"
    if target.mean:
        value, note = geometric_mean([pair.ratio for pair in pairs]), f"geometric mean of {len(pairs)}"
    else:
        worst = max(pairs, key=lambda pair: pair.ratio)
        value, note = worst.ratio, f"largest of {len(pairs)}, at {worst.row.workload} {worst.row.setting}"
    verdict = "" if target.at_most is None or value <= target.at_most else ", missed"
    return f"{target.what}: {value:.3f} ({limit}{verdict}; {note})"


def pairs_of(target: Target, rows: Sequence[Row], tested: str) -> list[Pair]:
    """What a target is taken from: for each workload and setting the last pair of rows in one group."""
    of, to = (name.format(tested=tested) for name in (target.of, target.to))
    pairs = {}
    for row, divisor in comparisons(rows, of, to, target.to_setting):
        wanted = row.workload.direction == target.direction and target.where(row.workload)
        if wanted and all(getattr(row.setting, name) == value for name, value in target.setting.items()):
            value, unit = getattr(row, target.quantity), getattr(divisor, target.to_quantity or target.quantity)
            if value is not None and unit:
                pairs[row.workload, row.setting] = Pair(row, value / unit)
    return list(pairs.values())


def comparisons(
    rows: Sequence[Row], of: str, to: str, to_setting: dict[str, Any] | None = None
) -> Iterator[tuple[Row, Row]]:
    """Rows of the contender `of`, each with the row of `to` in its group that has its setting but for `to_setting`."""
    measured = {(row.group, row.workload, Entry(row.contender, row.setting)): row for row in rows}
    for row in rows:
        if row.contender == of:
            setting = heeded(to, row.setting._replace(**(to_setting or {})))
            divisor = measured.get((row.group, row.workload, Entry(to, setting)))
            if divisor is not None:
                yield row, divisor


def geometric_mean(values: Sequence[float]) -> float:
    """``exp(mean(log v))``"""
    return math.exp(math.fsum(map(math.log, values)) / len(values))
