"""The roofline of the feed-forward: the work and the traffic of its two products, and rows under their roofs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.ffn.machine import Roofs, read_roofs
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.targets import TESTED
from benchmarks.harness.arguments import SHAPE_SETS
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Setting, Workload

# The shapes of the models, and those that the CPU targets are stated for.
SHAPES = tuple(dict.fromkeys(shape for shapes in SHAPE_SETS.values() for shape in shapes))
_STOCK = "eager"
_USUAL_BATCH = 8


class Cost(NamedTuple):
    """The least work of one forward pass.

    Attributes:
        flops: of the two products; a multiply-add counts as two.
        bytes: of x, y and the weights, each moved once. Hidden units need not leave the chip.
    """

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flops / self.bytes

    def attainable_flops_per_s(self, roofs: Row) -> float:
        """FLOP/s that the machine allows: ``min(rate of products, intensity · rate of memory)``."""
        return min(roofs.flops_per_s, self.intensity * roofs.bytes_per_s)

    def name_of_lower_roof(self, roofs: Row) -> str:
        """The lower one of the two roofs: "products" or "memory"."""
        return "products" if roofs.flops_per_s <= self.intensity * roofs.bytes_per_s else "memory"


class RooflinePoint(NamedTuple):
    """A measured row, its cost, and the row of its machine's roofs in its dtype."""

    measured: Row
    cost: Cost
    roofs: Row

    @property
    def flops_per_s(self) -> float:
        return self.cost.flops / (self.measured.median_us * 1e-6)

    @property
    def share_of_roof(self) -> float:
        """The reached part of the roof."""
        return self.flops_per_s / self.cost.attainable_flops_per_s(self.roofs)


def forward_cost(workload: Workload, setting: Setting) -> Cost:
    """FLOPs ``6·B·L·D·H`` and bytes ``2·B·L·D + 3·H·D + 2·H + D`` numbers, where H counts active hidden units only."""
    D, L, B, dtype = workload[:4]
    H = 4 * D * (setting.K or setting.E) // setting.E
    numbers = 2 * B * L * D + 3 * H * D + 2 * H + D
    return Cost(6 * B * L * D * H, numbers * DTYPES[dtype].itemsize)


def roofline_points(rows: Sequence[Row], roofs: Roofs, experts: int = 4) -> list[RooflinePoint]:
    """The forward passes with dense routing at the models' shapes, of the stock feed-forward and of the one under test.

    Rows are of one device; those without roofs are left out. Of each shape the last measurement counts, at the batch
    that most rows have. The contender under test has `experts` experts.
    """
    wanted = [row for row in rows if _wanted(row, experts) and (row.device, row.workload.dtype) in roofs]
    batches = [row.workload.B for row in wanted]
    batch = max(set(batches), key=lambda B: (batches.count(B), B == _USUAL_BATCH), default=0)
    last = {(row.contender, row.workload): row for row in wanted if batch == row.workload.B}
    ordered = sorted(last.values(), key=lambda row: (row.workload.dtype, row.workload.D, -row.workload.L))
    return [
        RooflinePoint(row, forward_cost(row.workload, row.setting), roofs[row.device, row.workload.dtype])
        for row in ordered
    ]


def _wanted(row: Row, experts: int) -> bool:
    workload = row.workload
    known = (workload.D, workload.L) in SHAPES and workload.direction == "forward"
    setting = {_STOCK: Setting(), TESTED[row.device]: Setting(experts)}.get(row.contender)
    return known and row.setting == setting


def read_roofline_points(results: Path, device: str) -> list[RooflinePoint]:
    """The points of a device, from its rows of `moe_ffn_*.csv` and `scaling_*.csv`. Raises ValueError for none."""
    roofs = read_roofs(results / "machine.csv")
    # Where both have a shape, the feed-forward's own file counts.
    files = [results / f"{name}_{device}.csv" for name in ("scaling", "moe_ffn")]
    found = roofline_points([row for file in files if file.exists() for row in TABLE.read_rows(file)], roofs)
    if not found:
        raise ValueError(f"There are no rows of {device} in {results} that have roofs in machine.csv.")
    return found
