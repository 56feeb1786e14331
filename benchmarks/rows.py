"""The rows of `results/moe_ffn_*.csv`: written as they are measured, read back by the report and the plot."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.sweeps import Setting, Workload


class AnyRow(Protocol):
    """What writing, printing and comparing ask of a row, whatever was measured."""

    group: str
    contender: str
    device: str
    workload: Any
    setting: Setting
    graph: bool
    median_us: float
    p20_us: float
    p80_us: float
    source: dict[str, str]

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        ...


class Row(NamedTuple):
    """One measurement.

    Attributes:
        group: rows with the same group were measured interleaved, and may be compared.
        device: kind of it, "cuda" or "cpu".
        host_us: None on a CPU.
        saved_bytes: None for the forward pass, and for the bare products.
        source: where it comes from, as `benchmarks.provenance` says it.
    """

    group: str
    contender: str
    device: str
    workload: Workload
    setting: Setting
    graph: bool
    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    host_us: float | None
    peak_bytes: int
    saved_bytes: int | None
    source: dict[str, str]

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        D, L, B, dtype, direction = self.workload
        E, K, tasks = self.setting
        cells = {"group": self.group, "contender": self.contender, "device": self.device, "D": D, "L": L, "B": B}
        cells |= {"E": E, "K": "dense" if K is None else K, "tasks": tasks, "dtype": dtype, "pass": direction}
        cells |= {"graph": int(self.graph)}
        cells |= {name: f"{getattr(self, name):.2f}" for name in ("median_us", "p20_us", "p80_us")}
        cells |= {"rounds": self.rounds, "host_us": "" if self.host_us is None else f"{self.host_us:.2f}"}
        cells |= {"peak_bytes": self.peak_bytes, "saved_bytes": "" if self.saved_bytes is None else self.saved_bytes}
        return {name: str(value) for name, value in cells.items()} | self.source


COLUMNS = ("group", "contender", "device", "D", "L", "B", "E", "K", "tasks", "dtype", "pass", "graph")
COLUMNS += ("median_us", "p20_us", "p80_us", "rounds", "host_us", "peak_bytes", "saved_bytes")


def append_row(path: Path, row: AnyRow) -> None:
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
    """All rows of a CSV file.

    Raises:
        ValueError: there is no such file, or a column is missing.
    """
    if not path.exists():
        raise ValueError(f"There is no {path}: run `python -m benchmarks.moe_ffn` to measure, got no file.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got none named {', '.join(missing)}.")
        return [_row(cells) for cells in reader]


def _row(cells: dict[str, str]) -> Row:
    numbers = {name: int(cells[name]) for name in ("D", "L", "B", "E", "tasks", "rounds", "peak_bytes")}
    times = [float(cells[name]) for name in ("median_us", "p20_us", "p80_us")]
    return Row(
        cells["group"],
        cells["contender"],
        cells["device"],
        Workload(numbers["D"], numbers["L"], numbers["B"], cells["dtype"], cells["pass"]),
        Setting(numbers["E"], None if cells["K"] == "dense" else int(cells["K"]), numbers["tasks"]),
        cells["graph"] == "1",
        *times,
        numbers["rounds"],
        float(cells["host_us"]) if cells["host_us"] else None,
        numbers["peak_bytes"],
        int(cells["saved_bytes"]) if cells["saved_bytes"] else None,
        {name: text for name, text in cells.items() if name not in COLUMNS},
    )
