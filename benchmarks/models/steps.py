"""Denoising steps of whole UNets beside that of the original, for the picture and the tables of `unet_*.csv`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import DENSE
from benchmarks.models.unet_catalogue import ONE_BY_ONE, ORIGINAL, ROUTERS, find_contender, sibling_name

# In the order they are shown.
FAMILIES = ("stock", "stock-recipe", "mtu-eager", "mtu-cpp", "mtu-triton", "mtu-cpp-folded", "mtu-triton-folded")
FAMILIES += ("four-unets", "swapped-unets", "lora-hotswap", "lora-per-sample")
_USUAL_EXPERTS = {"sdxl": 1, "tiny-xl": 1}
_MANY_TASKS = 4


class ModelSetup(NamedTuple):
    """The model and the inputs that steps share which are shown side by side."""

    model: str
    size: int
    branches: int
    dtype: str

    def __str__(self) -> str:
        name = {"sd15": "SD 1.5", "sdxl": "SDXL"}.get(self.model, self.model)
        guidance = f", {self.branches} branches of guidance" * (self.branches > 1)
        return f"{name}, {self.size} × {self.size}, {self.dtype}{guidance}"


class Case(NamedTuple):
    """A contender with its differences from the usual setting, in which all experts are active and samples mix tasks.

    Attributes:
        contender: its name.
        experts: E of dense routing, where it is not the model's usual one.
        top_k: K and E of top-k routing.
        one_task: whether all of several samples are of one task.
    """

    contender: str
    experts: int | None = None
    top_k: tuple[int, int] | None = None
    one_task: bool = False

    @property
    def family(self) -> str:
        return find_contender(self.contender).family

    @property
    def variant(self) -> str:
        return find_contender(self.contender).variant

    @property
    def is_usual(self) -> bool:
        """Whether the setting is the usual one, and the contender no variant."""
        return self == Case(self.contender) and not self.variant

    def __str__(self) -> str:
        """The name, with the differences from the usual setting."""
        text = self.contender
        if self.experts is not None:
            text += f", {self.experts} experts" if self.experts > 1 else ", 1 expert"
        if self.top_k is not None:
            text += ", top-{} of {}".format(*self.top_k)
        return text + ", one task" * self.one_task


class MeasuredStep(NamedTuple):
    """A row, and the one of the original, run eagerly, in its group; None where the group has none."""

    measured: Row
    original_row: Row | None

    def relative_to_original(self, us: float) -> float:
        """A time over the original's median; NaN where the group has no original."""
        return us / self.original_row.median_us if self.original_row else math.nan


Steps = dict[Case, dict[int, MeasuredStep]]


def case_of(row: Row) -> Case:
    """The contender of a row with its differences from the usual setting."""
    (E, K, tasks), contender = row.setting, find_contender(row.contender)
    experts, top_k = None, None
    if "E" in contender.depends_on:
        if K is not DENSE:
            top_k = (K, E)
        elif _USUAL_EXPERTS.get(row.workload.model, 4) != E:
            experts = E
    return Case(row.contender, experts, top_k, "tasks" in contender.depends_on and tasks == 1 and row.workload.B > 1)


def _order(row: Row) -> tuple:
    contender = find_contender(row.contender)
    place = FAMILIES.index(contender.family) if contender.family in FAMILIES else len(FAMILIES)
    E, K, tasks = row.setting
    return place, bool(contender.variant), row.contender, K or 0, E, -min(tasks, row.workload.B)


def steps_by_setup(rows: Sequence[Row]) -> dict[ModelSetup, Steps]:
    """The last measurement of each contender: by setup, case and batch; contenders in the order they are shown."""
    originals = {(row.group, row.workload): row for row in rows if row.contender == ORIGINAL}
    found: dict[ModelSetup, Steps] = {}
    for row in sorted(rows, key=_order):
        workload = row.workload
        setup = ModelSetup(workload.model, workload.size, workload.branches, workload.dtype)
        step = MeasuredStep(row, originals.get((row.group, workload)))
        found.setdefault(setup, {}).setdefault(case_of(row), {})[workload.B] = step
    return dict(sorted(found.items()))


def usual_cases(cases: Steps) -> Steps:
    """The usual cases."""
    return {case: steps for case, steps in cases.items() if case.is_usual}


def deployed_batch_and_steps(cases: Steps) -> tuple[int, dict[Case, MeasuredStep]]:
    """The batch of four samples, one of each task, or else the largest one; and its steps."""
    batches = {B for steps in cases.values() for B in steps}
    B = _MANY_TASKS if _MANY_TASKS in batches else max(batches)
    return B, {case: steps[B] for case, steps in cases.items() if B in steps}


_VARIANTS = {ONE_BY_ONE: "samples one after another / at once", ROUTERS: "routers kept / dropped"}


def _usual_counterparts(case: Case) -> dict[str, Case]:
    """The case without each of its differences, by the name of the ratio of the two."""
    found = {}
    if case.one_task:
        found["one task / mixed tasks"] = case._replace(one_task=False)
    if case.variant:
        run = find_contender(case.contender).run_mode
        found[_VARIANTS[case.variant]] = case._replace(contender=sibling_name(case.contender, run=run and run.name))
    if case.top_k is not None:
        found["top-k / dense"] = case._replace(top_k=None)
    return found


class Comparison(NamedTuple):
    """Steps with one difference, by batch, each with the usual step of its contender in the same group."""

    ratio_name: str
    pairs_by_batch: dict[int, tuple[MeasuredStep, MeasuredStep]]


def compare_with_usual(cases: Steps) -> dict[Case, Comparison]:
    """Steps with one difference beside the usual ones; cases with several differences are left out."""
    found = {}
    for case, steps in cases.items():
        counterparts = _usual_counterparts(case)
        if len(counterparts) != 1:
            continue
        ((ratio, counterpart),) = counterparts.items()
        both = ((B, step, cases.get(counterpart, {}).get(B)) for B, step in steps.items())
        pairs = {B: (own, other) for B, own, other in both if other and other.measured.group == own.measured.group}
        if pairs:
            found[case] = Comparison(ratio, pairs)
    return found
