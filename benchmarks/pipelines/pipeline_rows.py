"""The rows of `results/pipeline_*.csv`: whole images, from prompts to pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from benchmarks.harness.rows import AnyRow, Number


class Workload(NamedTuple):
    """What all rows of a group share: `images` of `size` pixels an edge, one of each of the model's tasks."""

    model: str
    size: int
    images: int
    steps: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} {self.size}x{self.size} images={self.images} steps={self.steps} {self.dtype}"


COLUMNS = ("group", "contender", "device", *Workload._fields, "E", "K", "tasks", "graph")
COLUMNS += ("median_us", "p20_us", "p80_us", "rounds", "warmup_s", "peak_bytes", "weight_bytes", "images_per_s")


@dataclasses.dataclass(frozen=True)
class Row(AnyRow):
    """One measurement: the time of all images together.

    Attributes:
        graph: whether CUDA graphs were replayed.
        peak_bytes: the most that the images hold at once, the weights not counted.
        weight_bytes: of the pipelines that the contender keeps, what they share counted once.
        warmup_s: what compiling and capturing took, with torch's caches on disk as they were; None: nothing of that.
        images_per_s: at the median.
    """

    workload: Workload
    weight_bytes: int
    warmup_s: float | None
    images_per_s: float

    columns = COLUMNS
    numbers: ClassVar = {
        **{name: Number(float, ".0f") for name in ("median_us", "p20_us", "p80_us")},
        **{name: Number(int, "d") for name in ("rounds", "peak_bytes", "weight_bytes")},
        "warmup_s": Number(float, ".1f"),
        "images_per_s": Number(float, ".4g"),
    }
    workloads = Workload


def comparison(rows: Sequence[Row]) -> list[str]:
    """For people: the time of each contender over that of the stock pipelines, run in the same way and eager."""
    medians, lines = {row.contender: row.median_us for row in rows}, []
    for row in rows:
        _, plus, way = row.contender.partition("+")
        stock = dict.fromkeys(("stock-each" + plus + way, "stock-each"))
        ratios = [
            f"{row.median_us / medians[name]:.3f} of {name}"
            for name in stock
            if name in medians and name != row.contender
        ]
        if ratios:
            lines.append(f"{row.contender}: {', '.join(ratios)}")
    return lines
