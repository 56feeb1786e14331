"""Denoising steps of whole UNets beside that of the original: what the picture and the tables of `unet_*.csv` show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.rows import Row
from benchmarks.harness.sweeps import heeded
from benchmarks.harness.workloads import DENSE, Setting

ORIGINAL = "stock"
# In the order they are shown; suffixes of a family's names stand for how it is run.
FAMILIES = ("stock", "stock-recipe", "mtu-eager", "mtu-cpp", "mtu-triton", "mtu-cpp-folded", "mtu-triton-folded")
FAMILIES += ("four-unets", "swapped-unets", "lora-hotswap", "lora-per-sample")
_USUAL_EXPERTS = {"sdxl": 1, "tiny-xl": 1}
_MANY_TASKS = 4


class Scene(NamedTuple):
    """What steps share that are shown side by side."""

    model: str
    size: int
    branches: int
    dtype: str

    def __str__(self) -> str:
        name = {"sd15": "SD 1.5", "sdxl": "SDXL"}.get(self.model, self.model)
        guidance = f", {self.branches} branches of guidance" * (self.branches > 1)
        return f"{name}, {self.size} × {self.size}, {self.dtype}{guidance}"


class Step(NamedTuple):
    """A row, and the one of the original, run eagerly, in its group; None where the group has none."""

    row: Row
    original: Row | None

    def relative(self, us: float) -> float | None:
        """A time over the original's median."""
        return us / self.original.median_us if self.original else None


def family(contender: str) -> str:
    """The contender's name without how it is run."""
    return contender.partition("@")[0].partition("+")[0]


def label(row: Row) -> str:
    """The contender, and what is unusual in its setting: by default all experts are active, and samples mix tasks."""
    E, K, tasks = row.setting
    text = row.contender
    if heeded(row.contender, Setting(2)).E == 2:
        experts = f"{E} experts" if E > 1 else "1 expert"
        text += f", {experts}" * (K is DENSE and _USUAL_EXPERTS.get(row.workload.model, 4) != E)
        text += "" if K is DENSE else f", top-{K} of {E}"
    mixes = heeded(row.contender, Setting(1, DENSE, 2)).tasks == 2
    return text + ", one task" * (mixes and tasks == 1 and row.workload.B > 1)


def _order(row: Row) -> tuple:
    name = family(row.contender)
    place = FAMILIES.index(name) if name in FAMILIES else len(FAMILIES)
    E, K, tasks = row.setting
    return place, "@" in row.contender, row.contender, K or 0, E, -min(tasks, row.workload.B)


def scenes(rows: Sequence[Row]) -> dict[Scene, dict[str, dict[int, Step]]]:
    """The last measurement of each contender: by scene, label and batch; contenders in the order they are shown."""
    originals = {(row.group, row.workload): row for row in rows if row.contender == ORIGINAL}
    found: dict[Scene, dict[str, dict[int, Step]]] = {}
    for row in sorted(rows, key=_order):
        workload = row.workload
        scene = Scene(workload.model, workload.size, workload.branches, workload.dtype)
        labels = found.setdefault(scene, {})
        labels.setdefault(label(row), {})[workload.B] = Step(row, originals.get((row.group, row.workload)))
    return dict(sorted(found.items()))


def usual(labels: dict[str, dict[int, Step]]) -> dict[str, dict[int, Step]]:
    """Those contenders of a scene with nothing unusual in their setting, nor in what they are asked to do."""
    return {name: steps for name, steps in labels.items() if "," not in name and "@" not in name}


def deployed(labels: dict[str, dict[int, Step]]) -> tuple[int, dict[str, Step]]:
    """The batch of four samples, one of each task, or else the largest one; and its steps."""
    batches = {B for steps in labels.values() for B in steps}
    B = _MANY_TASKS if _MANY_TASKS in batches else max(batches)
    return B, {name: steps[B] for name, steps in labels.items() if B in steps}


# What is unusual, and what it is divided by: the same contender with nothing unusual.
UNUSUAL = {
    ", one task": "one task / mixed tasks",
    "@each": "samples one after another / at once",
    "@routers": "routers kept / dropped",
    ", top-": "top-k / dense",
}


def unusual(labels: dict[str, dict[int, Step]]) -> dict[str, dict[int, tuple[Step, Step]]]:
    """Steps with one thing unusual, each with its contender's usual step of the same group: by name and batch."""
    found: dict[str, dict[int, tuple[Step, Step]]] = {}
    for name, steps in labels.items():
        marks = [mark for mark in UNUSUAL if mark in name]
        plain = labels.get(name.partition(marks[0])[0], {}) if len(marks) == 1 else {}
        for B, step in steps.items():
            if B in plain and plain[B].row.group == step.row.group:
                found.setdefault(name, {})[B] = (step, plain[B])
    return found
