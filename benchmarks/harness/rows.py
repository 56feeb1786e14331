"""Rows of the result files. Benchmarks write them; reports, tables and plots read them back."""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.workloads import Setting, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. Figures that its benchmark does not take are NaN or 0; None: they do not apply.

    Attributes:
        group: rows with the same group were measured interleaved, and may be compared.
        part: the part of the workload that the figures are of, such as a task or a kernel; "" for all of it.
        graph: whether a CUDA graph was replayed.
        median_us: of the timed rounds, with the 20th and the 80th percentile.
        host_us: time that the host takes to issue a call; None on a CPU.
        peak_bytes: the most bytes held at once beyond those held before, the weights not counted; of a UNet in a
            CUDA graph the most that was held while the graph was prepared, which its memory is kept for.
        saved_bytes: that the forward pass keeps for the backward pass.
        weight_bytes: of all parameters and buffers that the contender keeps on the device, each storage once.
        warmup_s: of compiling and capturing.
        switch_us: median time of the work between two steps where the tasks of the batch change.
        images_per_s: at the median; of a UNet alone, at the paper's number of steps.
        psnr_db: of images against the exact ones, the mean over images.
        allowed_db: the least that it may be.
        error_db: standard error of the difference of the two; 0 where the least is a constant.
        pooled_db: PSNR of the mean squared error over all images. One image may make most of it, so nothing is
            compared with it.
        count: number of runs of a kernel.
        total_us: time of all runs of a kernel.
        matrix: edge of the square matrices whose product was the fastest, at `flops_per_s`.
        array_bytes: of each array that was read or written, at `bytes_per_s`.
        source: provenance, as `benchmarks.harness.provenance` has it.
    """

    group: str = ""
    contender: str = ""
    device: str = ""
    workload: Workload = Workload()  # noqa: RUF009 (a tuple)
    setting: Setting = Setting()  # noqa: RUF009
    part: str = ""
    graph: bool = False
    median_us: float = math.nan
    p20_us: float = math.nan
    p80_us: float = math.nan
    rounds: int = 0
    host_us: float | None = None
    peak_bytes: int = 0
    saved_bytes: int | None = None
    weight_bytes: int = 0
    warmup_s: float | None = None
    switch_us: float | None = None
    images_per_s: float = math.nan
    psnr_db: float = math.nan
    allowed_db: float = math.nan
    error_db: float = math.nan
    pooled_db: float = math.nan
    count: int = 0
    total_us: float = math.nan
    matrix: int = 0
    flops_per_s: float = math.nan
    array_bytes: int = 0
    bytes_per_s: float = math.nan
    source: Mapping[str, str]


TIMES = ("median_us", "p20_us", "p80_us")
# How figures are written; other fields are written as they are.
_INTEGERS = ("D", "L", "B", "size", "branches", "steps", "E", "tasks", "rounds")
_INTEGERS += ("peak_bytes", "saved_bytes", "weight_bytes", "count", "matrix", "array_bytes")
_FORMS = {
    **dict.fromkeys(_INTEGERS, "d"),
    **dict.fromkeys(("host_us", "psnr_db", "allowed_db", "error_db", "pooled_db", "total_us"), ".2f"),
    **dict.fromkeys(("warmup_s", "switch_us"), ".1f"),
    **dict.fromkeys(("images_per_s", "flops_per_s", "bytes_per_s"), ".4g"),
}


class CsvTable(NamedTuple):
    """The rows that a benchmark writes into a CSV file.

    Attributes:
        module: that measures them.
        columns: in order, without those of the provenance.
        time_format: format of the median and the percentiles.
        field_of_column: column → field of `Row`, `Workload` or `Setting`, where the two have different names.
    """

    module: str
    columns: tuple[str, ...]
    time_format: str = ".2f"
    field_of_column: Mapping[str, str] = {}

    def cells_of_row(self, row: Row) -> dict[str, str]:
        """A row as text, by column."""
        values = row.workload._asdict() | row.setting._asdict() | vars(row)
        fields = {column: self.field_of_column.get(column, column) for column in self.columns}
        return {column: self._text(field, values[field]) for column, field in fields.items()} | dict(row.source)

    def _text(self, field: str, value: Any) -> str:
        if field == "K":
            return "dense" if value is None else str(value)
        if value is None:
            return ""
        return str(int(value)) if field == "graph" else format(value, self._form(field))

    def _form(self, field: str) -> str:
        return self.time_format if field in TIMES else _FORMS.get(field, "")

    def row_from_cells(self, cells: dict[str, str]) -> Row:
        """The inverse of `cells_of_row`."""
        fields = {column: self.field_of_column.get(column, column) for column in self.columns}
        values = {field: self._value(field, cells[column]) for column, field in fields.items()}
        workload, setting = (
            kind(**{name: values.pop(name) for name in kind._fields if name in values}) for kind in (Workload, Setting)
        )
        source = {name: text for name, text in cells.items() if name not in self.columns}
        return Row(workload=workload, setting=setting, source=source, **values)

    def _value(self, field: str, text: str) -> Any:
        if field == "K":
            return None if text == "dense" else int(text)
        form = self._form(field)
        if form:
            return (int if form == "d" else float)(text) if text else None
        return text == "1" if field == "graph" else text

    def append_row(self, path: Path, row: Row) -> None:
        """Adds a row to a CSV file; errors as for `append_cells`."""
        append_cells(path, self.cells_of_row(row))

    def check_columns(self, path: Path, source: Mapping[str, str]) -> None:
        """Raises ValueError if a file is there and has other columns."""
        check_header(path, [*self.columns, *source])

    def read_rows(self, path: Path) -> list[Row]:
        """All rows of a CSV file. Raises ValueError where there is no such file, or a column is missing."""
        return [self.row_from_cells(cells) for cells in read_cells(path, self.columns, self.module)]


def append_cells(path: Path, cells: Mapping[str, str]) -> None:
    """Adds a line to a CSV file, whose first line is preceded by the header. The file is closed after each line.

    Raises:
        ValueError: the file has other columns.
    """
    check_header(path, list(cells))
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(cells)
        writer.writerow(cells.values())


def write_cells(
    path: Path, rows: Sequence[Mapping[str, Any]], source: Mapping[str, str], kept: Sequence[Mapping[str, str]] = ()
) -> None:
    """Writes a CSV file anew: rows with their source, and kept rows as they are; cells that they lack are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *source], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **source} for row in rows)
        writer.writerows(kept)


def check_header(path: Path, columns: list[str]) -> None:
    """Raises ValueError if a file is there and has other columns."""
    if path.exists():
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            expected, got = ", ".join(columns), ", ".join(found)
            raise ValueError(f"{path} must have the columns {expected} to be added to, got {got}.")


def read_cells(path: Path, columns: Sequence[str], module: str) -> list[dict[str, str]]:
    """The rows of a CSV file as text, by column.

    Raises:
        ValueError: there is no such file, and `module` would measure its rows; or a column is missing.
    """
    if not path.exists():
        raise ValueError(f"There is no {path}: run `python -m {module}` to measure, got no file.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} must have the columns {', '.join(columns)}, got none named {', '.join(missing)}.")
        return list(reader)
