"""How the time of a feed-forward grows with tokens, batch, tasks and experts: lines through rows of `scaling_*.csv`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from benchmarks.ffn.peers import CONTENDERS
from benchmarks.ffn.targets import TESTED
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import DENSE, Entry, Setting

# Drawn beside the contender under test, where its group has them.
_BESIDE = ("eager", "products")
_LEAST_POINTS = 2


class VariedQuantity(NamedTuple):
    """What is varied in a panel.

    Attributes:
        name: of the panel.
        x: the quantity on its axis.
        fixed: what all rows of a panel share.
        wanted: which settings belong to it, at so many experts.
    """

    name: str
    x: Callable[[Row], int]
    fixed: Callable[[Row], Hashable]
    wanted: Callable[[Setting, int], bool]


def _plain(setting: Setting, experts: int) -> bool:
    return setting == Setting(experts)


def _one_task(setting: Setting, experts: int) -> bool:
    return setting.tasks == 1


VARIED_QUANTITIES = (
    VariedQuantity("tokens", lambda row: row.workload.L, lambda row: row.workload._replace(L=0), _plain),
    VariedQuantity("batch", lambda row: row.workload.B, lambda row: row.workload._replace(B=0), _plain),
    VariedQuantity("tasks", lambda row: row.setting.tasks, lambda row: (row.workload, row.setting.E), lambda *_: True),
    VariedQuantity("experts", lambda row: row.setting.E, lambda row: row.workload, _one_task),
)


class Line(NamedTuple):
    """One contender: its rows by what is varied. Without routing it has the same row everywhere."""

    contender: str
    K: int | None
    rows: dict[int, Row]


class Panel(NamedTuple):
    """Lines over one varied quantity, everything else the same.

    Attributes:
        name: "tokens", "batch", "tasks" or "experts".
        fixed: what is not varied, for readers.
        lines: the contender under test first.
    """

    name: str
    fixed: str
    lines: tuple[Line, ...]


def us_per_token(row: Row) -> float:
    """Median time over the tokens of all samples."""
    return row.median_us / tokens(row)


def tokens(row: Row) -> int:
    """Of all samples."""
    return row.workload.B * row.workload.L


def panels(rows: Sequence[Row], experts: int = 4) -> list[Panel]:
    """The panels that can be drawn: of each kind the one with the most points, if there are two at least.

    Args:
        rows: forward passes of one device in one dtype; others are left out.
        experts: E where it is not what is varied.
    """
    rows = [row for row in rows if row.workload.direction == "forward"]
    return [panel for kind in VARIED_QUANTITIES if (panel := _panel(kind, rows, experts))]


def _panel(kind: VariedQuantity, rows: Sequence[Row], experts: int) -> Panel | None:
    measured = {(row.group, row.workload, Entry(row.contender, row.setting)): row for row in rows}

    def paired_rows(row: Row) -> list[Row]:
        keys = ((row.group, row.workload, Entry(name, CONTENDERS[name].relevant(row.setting))) for name in _BESIDE)
        return [measured[key] for key in keys if key in measured]

    families: dict[Hashable, list[Row]] = {}
    for row in rows:
        if row.contender == TESTED[row.device] and kind.wanted(row.setting, experts):
            families.setdefault(kind.fixed(row), []).append(row)
    family = max(families.values(), key=lambda family: len({kind.x(row) for row in family}), default=[])
    groups = Counter(row.group for row in family)
    # Of what was measured twice: the row of the group that most others are from, with the most beside it, or the last.
    family.sort(key=lambda row: (groups[row.group], len(paired_rows(row))))
    best = {(row.setting.K, kind.x(row)): row for row in family}
    if len({x for _, x in best}) < _LEAST_POINTS:
        return None
    lines: dict[tuple[str, int | None], dict[int, Row]] = {}
    for (K, x), row in sorted(best.items(), key=lambda item: (item[0][0] or 0, item[0][1])):
        lines.setdefault((row.contender, K), {})[x] = row
        for other in paired_rows(row):
            lines.setdefault((other.contender, other.setting.K), {})[x] = other
    tested = next(iter(best.values()))
    ordered = sorted(lines, key=lambda key: (key[0] != tested.contender, key[0], key[1] or 0))
    return Panel(kind.name, _fixed(kind.name, tested), tuple(Line(*key, lines[key]) for key in ordered))


def _fixed(name: str, row: Row) -> str:
    D, L, B, dtype = row.workload[:4]
    tokens, samples = "" if name == "tokens" else f"{L} tokens", "" if name == "batch" else f"B = {B}"
    experts = "" if name == "experts" else f"{row.setting.E} experts"
    return ", ".join(part for part in (f"width {D}", tokens, samples, experts, dtype) if part)


def routing_name(K: int | None) -> str:
    """What the routing is called: "dense", or "top-K" of the experts."""
    return "dense" if K is DENSE else f"top-{K}"
