"""Puts the results of `python -m benchmarks.gpu_run` into their places: the table of tiles, CSV files, plots, page."""

import csv
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.output import FACTS, RESULTS, RUN
from benchmarks.gpu.steps import TABLE
from benchmarks.harness.provenance import RESULTS as PLACE
from benchmarks.harness.rows import append_cells, check_header, read_cells
from benchmarks.kernels import tune
from benchmarks.kernels.tile_rows import merge_rows, read_rows, write_rows
from mtu_kernels.triton.tiles import TableRow


class Destinations(NamedTuple):
    """The places of the table of tiles and of the CSV files."""

    table_file: Path = tune.SHIPPED
    results_folder: Path = PLACE


def place_results(folder: Path, places: Destinations | None = None) -> list[str]:
    """Puts the output folder of a run into its places, by default the package's own. Returns a line for each place.

    Rows that are there already are left out. Raises ValueError where the folder holds no result of a run, or rows of
    other columns; nothing is changed then.
    """
    places = places or Destinations()
    tiles, files = _found(folder)
    for name, rows in files.items():
        check_header(places.results_folder / name, list(rows[0]))
    lines = []
    if tiles:
        old = read_rows(places.table_file)
        # The row of a tuned width is for all of its numbers of tokens, and replaces their rows.
        widths = {row.key for row in tiles if not row.key.tokens}
        stale = [row.key for row in old if row.key._replace(tokens=0) in widths]
        write_rows(places.table_file, merge_rows(old, tiles, measured=stale))
        lines.append(f"{len(tiles)} rows of tiles into {places.table_file}")
    for name, rows in files.items():
        path = places.results_folder / name
        known = [tuple(row.values()) for row in read_cells(path, (), tune.MODULE)] if path.exists() else []
        new = [row for row in rows if tuple(row.values()) not in known]
        for row in new:
            append_cells(path, row)
        lines.append(f"{len(new)} rows into {path}, {len(rows) - len(new)} were there")
    return lines


def _found(folder: Path) -> tuple[tuple[TableRow, ...], dict[str, list[dict[str, str]]]]:
    """Rows of tuned tiles, and the rows of all steps by the name of their CSV file."""
    refusal = f"--collect must be the output folder of a run, got {folder}"
    try:
        facts = json.loads((folder / FACTS).read_text())
        if facts["run"] != RUN:
            raise ValueError(f"{FACTS} is of {facts['run']!r}")
        if facts["quick"]:
            raise ValueError("the run was a smoke test of tiny models, whose times are no results")
        with zipfile.ZipFile(folder / RESULTS) as archive:
            if archive.testzip() is not None:
                raise ValueError(f"{RESULTS} is damaged")
            contents = {name: archive.read(name).decode() for name in archive.namelist()}
        return tuple(_tiles(contents)), _rows(contents)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, ImportError, zipfile.BadZipFile) as error:
        raise ValueError(f"{refusal}: {' '.join(str(error).split())}.") from None


def _tiles(contents: dict[str, str]) -> Iterator[TableRow]:
    for name, text in contents.items():
        if name.endswith(f"/{TABLE}"):
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch, TABLE)
                path.write_text(text)
                yield from (row for row in read_rows(path) if row.source.startswith(tune.MEASURED_ON))


def _rows(contents: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    files: dict[str, list[dict[str, str]]] = {}
    for path, text in contents.items():
        # Files in deeper folders are of the training.
        step, _, name = path.partition("/")
        if name.endswith(".csv") and "/" not in name:
            header, *lines = csv.reader(io.StringIO(text))
            rows = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
            files.setdefault(name, []).extend(rows)
            if any(row.keys() != files[name][0].keys() for row in rows):
                raise ValueError(f"the rows of {name} have other columns in the step {step}")
            if any("--quick" in row.get("command", "").split() for row in rows):
                raise ValueError(f"rows of {name} in the step {step} are of a smoke test, whose times are no results")
    return {name: rows for name, rows in files.items() if rows}


def place_results_and_redraw(folder: Path) -> int:
    """The option `--collect`: puts files into their places, then makes plots and the page anew."""
    # They need matplotlib, which a machine that measures may lack.
    from benchmarks.pages import page, plot

    print("\n".join(place_results(folder)))
    try:
        plot.main([])
    except SystemExit:
        print("Some pictures could not be drawn; the page is made with those that are there.", file=sys.stderr)
    return page.main([])
