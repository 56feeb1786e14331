"""The rows of `results/image_psnr_*.csv`: PSNR of images against exact ones, and its targets."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness.rows import CsvTable, Row
from benchmarks.harness.workloads import Workload

# The path that the others are compared with.
STOCK = "stock-eager"
# 8-bit pictures are off by 1/255 · 1/√12 from rounding alone.
_ALLOWED_FLOAT32_DB = 60.0
# An image without any error counts as one with this mean squared error.
_LEAST_ERROR = 1e-20
# Chance parts two paths of equal rounding by so many standard errors, in a table of some thirty rows.
_EVEN = 3
# A part is a task's name, or this for all tasks together.
_ALL = "all"

# A contender is an execution path.
TABLE = CsvTable(
    "benchmarks.pipelines.image_psnr",
    (
        *("path", "task", "dtype", "images", "psnr_db", "allowed_db", "error_db", "pooled_db"),
        *("model", "device", "size", "steps"),
    ),
    field_of_column={"path": "contender", "task": "part", "images": "B"},
)


def verdict(row: Row) -> str:
    """Whether the PSNR is "met", "even" within three standard errors, or "missed"."""
    missing = row.allowed_db - row.psnr_db
    # Not "missing > …", which NaN would pass.
    return "met" if missing <= 0 else "even" if missing <= _EVEN * row.error_db else "missed"


def psnr(errors: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1] from their mean squared errors: (…) to (…)."""
    return -10 * torch.log10(errors.clamp_min(_LEAST_ERROR))


def standard_error(differences: Tensor) -> float:
    """Of the mean of differences (n,), each of one sample; infinite for a single one that is not zero."""
    if not differences.any():
        return 0.0
    return math.inf if len(differences) < 2 else float(differences.std()) / math.sqrt(len(differences))


def squared_errors(images: Tensor, exact: Tensor) -> Tensor:
    """Mean squared error of each image: (n, …) twice to (n,) float64."""
    return (images.double().cpu() - exact.double().cpu()).square().flatten(1).mean(1)


def make_psnr_rows(
    errors: dict[str, Tensor], tasks: Sequence[str], workload: Workload, device: str, source: dict[str, str]
) -> list[Row]:
    """Rows of all paths, for each task and for all of them.

    Args:
        errors: of each sample, by path; the stock pipelines are among the paths.
        tasks: names; samples are of each of them in turn.
        workload: that all paths computed.
        device: kind of it.
        source: provenance.
    """
    rows = []
    for path, own in errors.items():
        for task in (*tasks, _ALL):
            of = slice(None) if task == _ALL else slice(tasks.index(task), None, len(tasks))
            values, allowed = psnr(own[of]), psnr(errors[STOCK][of])
            least, error = float(allowed.mean()), standard_error(values - allowed)
            if workload.dtype == "fp32":
                least, error = _ALLOWED_FLOAT32_DB, 0.0
            pooled = float(psnr(own[of].mean()))
            figures = {"psnr_db": float(values.mean()), "allowed_db": least, "error_db": error, "pooled_db": pooled}
            place = {"device": device, "workload": workload._replace(B=len(values)), "source": source}
            rows.append(Row(contender=path, part=task, **place, **figures))
    return rows


def table_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each row, for people."""
    lines = [f"{'path':20} {'dtype':6} {'task':18} {'PSNR dB':>8} {'allowed':>8} {'error':>6} {'pooled':>8}"]
    for row in rows:
        numbers = f"{row.psnr_db:8.2f} {row.allowed_db:8.2f} {row.error_db:6.2f} {row.pooled_db:8.2f}"
        lines.append(f"{row.contender:20} {row.workload.dtype:6} {row.part:18} {numbers}  {verdict(row)}")
    return lines
