"""Rows of result files: written as they are measured, read back by reports and plots; and `results/moe_ffn_*.csv`."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

from benchmarks.harness.sweeps import Setting, Workload


class Number(NamedTuple):
    """How a column of numbers is written and read; an empty cell is None."""

    kind: type[int] | type[float]
    form: str

    def text(self, value: float | None) -> str:
        return "" if value is None else format(value, self.form)

    def value(self, text: str) -> float | None:
        return self.kind(text) if text else None


@dataclasses.dataclass(frozen=True)
class AnyRow:
    """One measurement, of whatever kind.

    Attributes:
        group: rows with the same group were measured interleaved, and may be compared.
        device: kind of it, "cuda" or "cpu".
        workload: what all rows of a group share.
        setting: that of the experts; its default for contenders without.
        graph: whether a CUDA graph was replayed.
        peak_bytes: the most that is held at once beyond what is held before.
        source: where it comes from, as `benchmarks.harness.provenance` says it.
    """

    group: str
    contender: str
    device: str
    workload: Any
    setting: Setting
    graph: bool
    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    peak_bytes: int
    source: dict[str, str]

    # Of each kind of row: all columns in order, provenance excepted; the numbers among them; the workload's class.
    columns: ClassVar[tuple[str, ...]]
    numbers: ClassVar[dict[str, Number]]
    workloads: ClassVar[type]
    # Columns that are not named as the workload's fields are.
    renamed: ClassVar[dict[str, str]] = {}

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        E, K, tasks = self.setting
        cells = {"group": self.group, "contender": self.contender, "device": self.device, "graph": str(int(self.graph))}
        cells |= {self.renamed.get(name, name): str(value) for name, value in self.workload._asdict().items()}
        cells |= {"E": str(E), "K": "dense" if K is None else str(K), "tasks": str(tasks)}
        cells |= {name: number.text(getattr(self, name)) for name, number in self.numbers.items()}
        return {name: cells[name] for name in self.columns} | self.source

    @classmethod
    def from_cells(cls, cells: dict[str, str]) -> Self:
        """The inverse of `cells`."""
        fields = {name: cells[cls.renamed.get(name, name)] for name in cls.workloads._fields}
        fields = {name: int(text) if text.isdecimal() else text for name, text in fields.items()}
        K = None if cells["K"] == "dense" else int(cells["K"])
        return cls(
            **{name: cells[name] for name in ("group", "contender", "device")},
            workload=cls.workloads(**fields),
            setting=Setting(int(cells["E"]), K, int(cells["tasks"])),
            graph=cells["graph"] == "1",
            **{name: number.value(cells[name]) for name, number in cls.numbers.items()},
            source={name: text for name, text in cells.items() if name not in cls.columns},
        )


AnyRowT = TypeVar("AnyRowT", bound=AnyRow)
COLUMNS = ("group", "contender", "device", "D", "L", "B", "E", "K", "tasks", "dtype", "pass", "graph")
COLUMNS += ("median_us", "p20_us", "p80_us", "rounds", "host_us", "peak_bytes", "saved_bytes")


@dataclasses.dataclass(frozen=True)
class Row(AnyRow):
    """One measurement of the feed-forward.

    Attributes:
        host_us: None on a CPU.
        saved_bytes: None for the forward pass, and for the bare products.
    """

    workload: Workload
    host_us: float | None
    saved_bytes: int | None

    columns = COLUMNS
    numbers: ClassVar = {
        **{name: Number(float, ".2f") for name in ("median_us", "p20_us", "p80_us", "host_us")},
        **{name: Number(int, "d") for name in ("rounds", "peak_bytes", "saved_bytes")},
    }
    workloads = Workload
    renamed: ClassVar = {"direction": "pass"}


class HasCells(Protocol):
    """A row of any file."""

    def cells(self) -> dict[str, str]: ...


def append_row(path: Path, row: HasCells) -> None:
    """Adds a row to a CSV file, which gets its header with the first one. The file is closed after each row.

    Raises:
        ValueError: the file has other columns.
    """
    cells = row.cells()
    check_header(path, list(cells))
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(cells)
        writer.writerow(cells.values())


def check_header(path: Path, columns: list[str]) -> None:
    """Raises ValueError if a file is there and has other columns."""
    if path.exists():
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            expected, got = ", ".join(columns), ", ".join(found)
            raise ValueError(f"{path} must have the columns {expected} to be added to, got {got}.")


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV file of the feed-forward.

    Raises:
        ValueError: there is no such file, or a column is missing.
    """
    return read_rows_as(Row, path, "benchmarks.ffn.moe_ffn")


def read_rows_as(kind: type[AnyRowT], path: Path, module: str) -> list[AnyRowT]:
    """All rows of a CSV file; arguments and errors as for `read_cells`."""
    return [kind.from_cells(cells) for cells in read_cells(path, kind.columns, module)]


def read_cells(path: Path, columns: Sequence[str], module: str) -> list[dict[str, str]]:
    """The rows of a CSV file as text, by column.

    Args:
        path: of the file.
        columns: that it must have.
        module: that measures them, for the error.

    Raises:
        ValueError: there is no such file, or a column is missing.
    """
    if not path.exists():
        raise ValueError(f"There is no {path}: run `python -m {module}` to measure, got no file.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} must have the columns {', '.join(columns)}, got none named {', '.join(missing)}.")
        return list(reader)
