"""The rows of `results/unet_*.csv`, and the ratios that whole UNets are held to."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.report import Target
from benchmarks.sweeps import DENSE, Setting


class Workload(NamedTuple):
    """What all rows of a group share: one denoising step of a model, for `B` pictures of `size` pixels an edge."""

    model: str
    size: int
    B: int
    dtype: str

    # No annotation, so no field: a step is what sampling asks of a UNet, and what the targets are stated for.
    direction = "forward"

    def __str__(self) -> str:
        return f"{self.model} {self.size}x{self.size} B={self.B} {self.dtype}"


class Row(NamedTuple):
    """One measurement.

    Attributes:
        group: rows with the same group were measured interleaved, and may be compared.
        device: kind of it.
        setting: that of the experts; its default for the original.
        peak_bytes: the most that a step holds at once, the weights not counted.
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
    peak_bytes: int
    source: dict[str, str]

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        E, K, tasks = self.setting
        cells = {"group": self.group, "contender": self.contender, "device": self.device, **self.workload._asdict()}
        cells |= {"E": E, "K": "dense" if K is None else K, "tasks": tasks, "graph": int(self.graph)}
        cells |= {name: f"{getattr(self, name):.0f}" for name in ("median_us", "p20_us", "p80_us")}
        cells |= {"rounds": self.rounds, "peak_bytes": self.peak_bytes}
        return {name: str(value) for name, value in cells.items()} | self.source


COLUMNS = ("group", "contender", "device", *Workload._fields, "E", "K", "tasks", "graph")
COLUMNS += ("median_us", "p20_us", "p80_us", "rounds", "peak_bytes")


def _published(workload: Workload) -> bool:
    return (workload.model, workload.size, workload.dtype) == ("sd15", 512, "bf16")


TARGETS: dict[str, tuple[Target, ...]] = {
    "cpu": (
        Target(
            "whole SD 1.5 UNet at 512x512, bf16, four mixed tasks / the original, eager",
            0.97,
            to="stock-eager",
            setting={"E": 4, "K": DENSE, "tasks": 4},
            where=_published,
        ),
    ),
}
