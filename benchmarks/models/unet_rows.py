"""The rows of `results/unet_*.csv`, and the ratios that whole UNets are held to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, NamedTuple

from benchmarks.harness.report import Target
from benchmarks.harness.rows import AnyRow, Number, read_rows_as
from benchmarks.harness.sweeps import DENSE


class Workload(NamedTuple):
    """What all rows of a group share: one denoising step of a model, for `B` pictures of `size` pixels an edge.

    Guidance has the UNet predict the noise of each picture more than once: `branches` times, so that its batch has
    B · branches rows.
    """

    model: str
    size: int
    B: int
    branches: int
    dtype: str

    # No annotation, so no field: a step is what sampling asks of a UNet, and what the targets are stated for.
    direction = "forward"

    @property
    def rows(self) -> int:
        return self.B * self.branches

    def __str__(self) -> str:
        branches = f" branches={self.branches}" * (self.branches > 1)
        return f"{self.model} {self.size}x{self.size} B={self.B}{branches} {self.dtype}"


COLUMNS = ("group", "contender", "device", *Workload._fields, "E", "K", "tasks", "graph")
COLUMNS += ("median_us", "p20_us", "p80_us", "rounds")
COLUMNS += ("peak_bytes", "weight_bytes", "warmup_s", "switch_us", "images_per_s")


@dataclasses.dataclass(frozen=True)
class Row(AnyRow):
    """One measurement of a step.

    Attributes:
        peak_bytes: the most that a step holds at once, the weights not counted; of a CUDA graph the most that was held
            while it was prepared, which its memory is kept for.
        weight_bytes: of all parameters and buffers that the contender keeps on the device, each storage once.
        warmup_s: of compiling and capturing; None where nothing is.
        switch_us: median of what must happen between two steps where the tasks of the batch change; None: nothing.
        images_per_s: at the paper's number of steps, the UNet alone.
    """

    workload: Workload
    weight_bytes: int
    warmup_s: float | None
    switch_us: float | None
    images_per_s: float

    columns = COLUMNS
    numbers: ClassVar = {
        **{name: Number(float, ".0f") for name in ("median_us", "p20_us", "p80_us")},
        **{name: Number(int, "d") for name in ("rounds", "peak_bytes", "weight_bytes")},
        **{name: Number(float, ".1f") for name in ("warmup_s", "switch_us")},
        "images_per_s": Number(float, ".4g"),
    }
    workloads = Workload


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV file of whole UNets.

    Raises:
        ValueError: there is no such file, or a column is missing.
    """
    return read_rows_as(Row, path, "benchmarks.models.unet")


def _sd15(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sd15", 512)


def _sdxl(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sdxl", 1024)


_MIXED = {"K": DENSE, "tasks": 4}
_SWITCH = {"setting": _MIXED, "quantity": "switch_us", "to_quantity": "median_us"}
_WEIGHTS = {"setting": _MIXED, "quantity": "weight_bytes", "where": lambda w: _sd15(w) or _sdxl(w)}
_BATCHED = {"setting": _MIXED, "where": lambda w: w.B == 4}
# Of the contenders, "graphs" stands for compiled code in a CUDA graph.
_GRAPHS = {"of": "{tested}+graphs", "dtype": "bf16"}
_EACH = "{tested}+graphs@each"
TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target(
            "SD 1.5 at 512x512, four mixed tasks, graphs / the original, graphs",
            **_GRAPHS,
            at_most=1.00,
            to="stock+graphs",
            setting={"E": 4, **_MIXED},
            where=_sd15,
        ),
        Target(
            "SDXL at 1024x1024, four mixed tasks, graphs / the original, graphs",
            **_GRAPHS,
            at_most=0.97,
            to="stock+graphs",
            setting={"E": 1, **_MIXED},
            where=_sdxl,
        ),
        Target(
            "SD 1.5 at 512x512, batch of 2, graphs / the original, eager",
            **_GRAPHS,
            at_most=0.55,
            to="stock",
            setting={"E": 4, "K": DENSE, "tasks": 2},
            where=lambda w: _sd15(w) and w.rows == 2,
        ),
        Target("switching tasks / a step", **_GRAPHS, at_most=0.01, to="{tested}+graphs", **_SWITCH),
        Target("weights of four tasks / the original's", **_GRAPHS, at_most=1.02, to="stock+graphs", **_WEIGHTS),
        Target("four tasks at once / one after another", **_GRAPHS, at_most=0.85, to=_EACH, **_BATCHED),
    ),
    "cpu": (
        Target(
            "SD 1.5 at 512x512, four mixed tasks / the original, eager",
            0.97,
            to="stock",
            setting={"E": 4, **_MIXED},
            where=_sd15,
            dtype="bf16",
        ),
        Target("switching tasks / a step", 0.01, **_SWITCH),
        Target("weights of four tasks / the original's", 1.02, to="stock", **_WEIGHTS),
        Target("four tasks at once / one after another", None, to="{tested}@each", **_BATCHED),
    ),
}
