"""Tables of training: the memory of a step, its time beside the stock UNet's, a resume, and the waiting for data."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.rows import read_cells
from benchmarks.pages.markdown import (
    MISSING,
    format_duration,
    format_gigabytes,
    format_ratio,
    format_small_ratio,
    provenance_line,
    table_lines,
)
from benchmarks.training import data_time, memory, resume, step_ratio

_NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
_PARTS = ("weights", "gradients", "optimizer", "average", "activations")


def step_memory_table(results: Path) -> list[str]:
    """The memory of a training step by settings, and the smallest card that it fits on."""
    path = results / memory.FILE
    columns = ("model", "size", "B", "autocast", "frozen", "checkpointing", "optimizer", "processes", "sharded")
    rows = read_cells(path, (*columns, *(f"{part}_bytes" for part in _PARTS), "peak_bytes", "card_gib"), memory.MODULE)
    cells = []
    for row in rows:
        model = f"{_NAMES.get(row['model'], row['model'])}, {row['size']}²"
        counts = [int(row[f"{part}_bytes"]) for part in (*_PARTS, "peak")]
        sizes = [format_gigabytes(count) if count else MISSING for count in counts]
        card = f"{row['card_gib']} GB" if row["card_gib"] else MISSING
        cells.append([model, _settings(row), row["B"], *sizes, card])
    header = ["model", "settings", "examples", *_PARTS[:-1], "activations and others", "peak", "fits on"]
    return [*table_lines(header, cells, 2), "", provenance_line(rows, path.name)]


def _settings(row: Mapping[str, str]) -> str:
    words = [f"{row['autocast']} autocast" if row["autocast"] != "fp32" else "fp32"]
    words += ["checkpointing"] if row["checkpointing"] == "1" else []
    words += [f"frozen weights {row['frozen']}"] if row["frozen"] != "fp32" else []
    words += ["8-bit AdamW"] if row["optimizer"] == "adamw8bit" else []
    words += [] if int(row["average_bytes"]) else ["no average"]
    if row["processes"] != "1":
        words.append(f"{row['processes']} processes" + (", sharded" if row["sharded"] == "1" else ""))
    return ", ".join(words)


def step_ratio_table(results: Path, device: str) -> list[str]:
    """A step of the upcycled UNet over a step of each variant of the stock one."""
    path = results / step_ratio.FILE.format(device=device)
    rows = step_ratio.TABLE.read_rows(path)
    last = {(row.workload, row.contender): row for row in rows}
    cells = []
    for workload in dict.fromkeys(row.workload for row in rows):
        own = last.get((workload, step_ratio.UPCYCLED))
        if own is None:
            continue
        ratios = []
        for name in (step_ratio.STOCK, step_ratio.STOCK_WITH_NORMS):
            other = last.get((workload, name))
            comparable = other is not None and other.group == own.group
            ratios.append(format_ratio(own.median_us / other.median_us) if other and comparable else MISSING)
        model = f"{_NAMES.get(workload.model, workload.model)}, {workload.size}², {workload.dtype}"
        cells.append([model, str(workload.B), format_duration(own.median_us), *ratios])
    if not cells:
        raise ValueError(f"There are no steps of {step_ratio.UPCYCLED} in {path}.")
    header = ["model", "examples", "step, upcycled", "/ FFNs of the stock UNet", "/ … with norms and input convolution"]
    return [*table_lines(header, cells), "", provenance_line((row.source for row in rows), path.name)]


def resume_table(results: Path) -> list[str]:
    """The first step after a resume over the first step of all, of the last run."""
    path = results / resume.FILE
    rows = resume.TABLE.read_rows(path)
    if not rows:
        raise ValueError(f"There are no rows in {path}.")
    step = max(row.workload.steps for row in rows if row.group == rows[-1].group)
    by_contender: dict[str, list[str]] = {}
    for comparison in resume.compare(rows):
        line = by_contender.setdefault(comparison.contender, [f"`{comparison.contender}`"])
        line += [format_duration(comparison.first_us), format_duration(comparison.resumed_us)]
        line.append(format_ratio(comparison.ratio))
    header = ["first step ends"]
    header += [f"{part}: {what}" for part in resume.PARTS for what in ("at 0", f"at {step:,}", "ratio")]
    return [*table_lines(header, by_contender.values()), "", provenance_line([rows[-1].source], path.name)]


def data_time_table(results: Path) -> list[str]:
    """What a step waits for its batch, by training, cache and workers; the last run."""
    path = results / data_time.FILE
    rows = read_cells(path, data_time.COLUMNS, data_time.MODULE)
    rows = [row for row in rows if row["group"] == rows[-1]["group"]]
    if not rows:
        raise ValueError(f"There are no rows in {path}.")
    cells = [
        [
            f"`{row['training']}`",
            row["cache"],
            row["B"],
            row["workers"],
            format_duration(float(row["step_us"])),
            format_duration(float(row["data_us"])),
            format_small_ratio(float(row["ratio"])),
        ]
        for row in rows
    ]
    header = ["training", "cache", "examples", "workers", "step", "waits", "ratio"]
    return [*table_lines(header, cells, 2), "", provenance_line(rows[-1:], path.name)]
