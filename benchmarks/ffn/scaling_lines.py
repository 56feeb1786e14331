"""Lines through rows of `scaling_*.csv`: the time of a feed-forward by tokens, batch, tasks and experts."""

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
    """A quantity that a panel varies.

    Attributes:
        name: of the panel.
        value_of_row: the quantity of a row, on the axis.
        fixed_values_of_row: all else, which the rows of a panel share.
        is_wanted: whether a setting belongs to the panel, at so many experts.
    """

    name: str
    value_of_row: Callable[[Row], int]
    fixed_values_of_row: Callable[[Row], Hashable]
    is_wanted: Callable[[Setting, int], bool]


def _plain(setting: Setting, experts: int) -> bool:
    return setting == Setting(experts)


VARIED_QUANTITIES = (
    VariedQuantity("tokens", lambda row: row.workload.L, lambda row: row.workload._replace(L=0), _plain),
    VariedQuantity("batch", lambda row: row.workload.B, lambda row: row.workload._replace(B=0), _plain),
    VariedQuantity("tasks", lambda row: row.setting.tasks, lambda row: (row.workload, row.setting.E), lambda *_: True),
    VariedQuantity(
        "experts", lambda row: row.setting.E, lambda row: row.workload, lambda setting, _: setting.tasks == 1
    ),
)


class Line(NamedTuple):
    """One contender: its rows by the varied quantity. Without routing it has the same row everywhere."""

    contender: str
    K: int | None
    row_by_value: dict[int, Row]


class Panel(NamedTuple):
    """Lines over one varied quantity, everything else the same.

    Attributes:
        name: "tokens", "batch", "tasks" or "experts".
        fixed_text: all other quantities, for readers.
        lines: the contender under test first.
    """

    name: str
    fixed_text: str
    lines: tuple[Line, ...]


def us_per_token(row: Row) -> float:
    """Median time over the tokens of all samples."""
    return row.median_us / count_tokens(row)


def count_tokens(row: Row) -> int:
    """Tokens of all samples."""
    return row.workload.B * row.workload.L


def make_panels(rows: Sequence[Row], experts: int = 4) -> list[Panel]:
    """For each quantity the panel with the most points, if it has two at least.

    Rows are of one device in one dtype; only forward passes count. E is `experts` where it is not varied.
    """
    rows = [row for row in rows if row.workload.direction == "forward"]
    return [panel for kind in VARIED_QUANTITIES if (panel := _panel(kind, rows, experts))]


def _panel(kind: VariedQuantity, rows: Sequence[Row], experts: int) -> Panel | None:
    measured = {(row.group, row.workload, Entry(row.contender, row.setting)): row for row in rows}

    def paired_rows(row: Row) -> list[Row]:
        keys = (
            (row.group, row.workload, Entry(name, CONTENDERS[name].relevant_setting(row.setting))) for name in _BESIDE
        )
        return [measured[key] for key in keys if key in measured]

    families: dict[Hashable, list[Row]] = {}
    for row in rows:
        if row.contender == TESTED[row.device] and kind.is_wanted(row.setting, experts):
            families.setdefault(kind.fixed_values_of_row(row), []).append(row)
    family = max(families.values(), key=lambda family: len({kind.value_of_row(row) for row in family}), default=[])
    groups = Counter(row.group for row in family)
    # Of several measurements: the one from the group of most other rows, or with more rows to pair, or the last one.
    family.sort(key=lambda row: (groups[row.group], len(paired_rows(row))))
    best = {(row.setting.K, kind.value_of_row(row)): row for row in family}
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
    """The name of a routing: "dense", or "top-K" of the experts."""
    return "dense" if K is DENSE else f"top-{K}"
