"""The rows of `results/sameness_*.csv`: PSNR of images against exact ones, and what it is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.pipelines.pipeline_rows import Workload

# The path that the others are held to.
STOCK = "stock-eager"
# 8-bit pictures are off by 1/255 · 1/√12 from rounding alone.
_ALLOWED_FLOAT32_DB = 60.0
# An image without any error counts as one with this mean squared error.
_LEAST_ERROR = 1e-20
# Standard errors by which chance is believed to part two ways of equal rounding, in a table of some thirty rows.
_EVEN = 3

COLUMNS = ("path", "task", "dtype", "images", "psnr_db", "allowed_db", "error_db", "pooled_db")
COLUMNS += ("model", "device", "size", "steps")


class Row(NamedTuple):
    """One path and task.

    Attributes:
        path: name of the way that the images were made.
        task: its name; "all" for all of them together.
        device: kind of it.
        workload: dtype, steps and the like; its `images` are those of this row.
        psnr_db: of the images against the exact ones, the mean over images.
        allowed_db: the least that it may be.
        error_db: standard error of the difference of the two; 0 where what is allowed is a constant.
        pooled_db: PSNR of the mean squared error over all images. One image may make most of it, so nothing is held
            to it.
        source: where it comes from, as `benchmarks.harness.provenance` says it.
    """

    path: str
    task: str
    device: str
    workload: Workload
    psnr_db: float
    allowed_db: float
    error_db: float
    pooled_db: float
    source: dict[str, str]

    @property
    def verdict(self) -> str:
        """ "held"; "even" if what is missing is within three standard errors; "missed"."""
        missing = self.allowed_db - self.psnr_db
        # Not "missing > …", which NaN would pass.
        return "held" if missing <= 0 else "even" if missing <= _EVEN * self.error_db else "missed"

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        cells = {"path": self.path, "task": self.task, "device": self.device}
        cells |= {name: str(value) for name, value in self.workload._asdict().items()}
        cells |= {name: f"{getattr(self, name):.2f}" for name in ("psnr_db", "allowed_db", "error_db", "pooled_db")}
        return {name: cells[name] for name in COLUMNS} | self.source


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


def compare(
    errors: dict[str, Tensor], tasks: Sequence[str], workload: Workload, device: str, source: dict[str, str]
) -> list[Row]:
    """Rows of all paths, for each task and for all of them.

    Args:
        errors: of each sample, by path; that of the stock pipelines is among them.
        tasks: names; samples are of each of them in turn.
        workload: what was computed.
        device: kind of it.
        source: provenance.
    """
    rows = []
    for path, own in errors.items():
        for task in (*tasks, "all"):
            of = slice(None) if task == "all" else slice(tasks.index(task), None, len(tasks))
            values, allowed = psnr(own[of]), psnr(errors[STOCK][of])
            least, error = float(allowed.mean()), standard_error(values - allowed)
            if workload.dtype == "fp32":
                least, error = _ALLOWED_FLOAT32_DB, 0.0
            pooled = float(psnr(own[of].mean()))
            counted = workload._replace(images=len(values))
            rows.append(Row(path, task, device, counted, float(values.mean()), least, error, pooled, source))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """For people: a line for each row."""
    lines = [f"{'path':20} {'dtype':6} {'task':18} {'PSNR dB':>8} {'allowed':>8} {'error':>6} {'pooled':>8}"]
    for row in rows:
        numbers = f"{row.psnr_db:8.2f} {row.allowed_db:8.2f} {row.error_db:6.2f} {row.pooled_db:8.2f}"
        lines.append(f"{row.path:20} {row.workload.dtype:6} {row.task:18} {numbers}  {row.verdict}")
    return lines
