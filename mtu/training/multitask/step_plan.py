"""Which example each position of a step's batch holds: arithmetic on numbers alone, with no state.

Tasks take turns by their shares, and each task visits its rows epoch by epoch, in a new order each time. The plan of a
step depends on its number alone. So a training can start at any step, and split the batch as it likes.
"""

import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

__all__ = ["PlannedExample", "StepPlan"]

_RECENT_STEPS = 4


class PlannedExample(NamedTuple):
    """The example at one position of a batch.

    Args:
        task: number of its task in the plan.
        row: row of the task's data set.
        epoch: how often the task has visited all its rows before.
        rank: number of the example among those of its task in this step.
        count: how many examples of its task the step has.
    """

    task: int
    row: int
    epoch: int
    rank: int
    count: int


class StepPlan:
    """The order in which a training visits the rows of several tasks.

    Positions are numbered through all steps: step s holds the positions from s · batch_size. Task i with share w_i
    takes its k-th turn at the time (k + ½) / w_i, and the turns are numbered in the order of their times. Hence each
    stretch of positions holds the tasks in proportion to their shares, up to rounding, and a batch that is smaller than
    the number of tasks rotates through the tasks.

    Args:
        rows: number of rows of each task.
        shares: share of each task by the same names.
        batch_size: number of positions of a step.
        seed: determines the order of rows in each epoch.

    Example:
        >>> plan = StepPlan({"edit": 100, "remove": 50}, {"edit": 3, "remove": 1}, batch_size=4, seed=0)
        >>> [example.task for example in plan.examples(0)]
        [0, 0, 1, 0]
    """

    def __init__(self, rows: Mapping[str, int], shares: Mapping[str, float], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self._rows = tuple(rows.values())
        self._seed = seed
        self._recent: dict[int, tuple[PlannedExample, ...]] = {}
        # The shares as they are written, 0.1 and 0.3, have a ratio of exactly 3.
        exact = [Fraction(str(shares[name])) for name in rows]
        scale = math.lcm(*(share.denominator for share in exact))
        self._weights = [int(share * scale) for share in exact]
        # Turn k of task i comes at (2k + 1) / 2w_i. These factors turn that into integers, which compare exactly.
        common = math.lcm(*self._weights)
        self._intervals = [common // weight for weight in self._weights]

    def examples(self, step: int) -> tuple[PlannedExample, ...]:
        """The examples of a step, in the order of their positions."""
        planned = self._recent.get(step)
        if planned is None:
            planned = self._plan(step)
            # Each part of a step asks, and so does the optimizer. Worker processes are few steps ahead.
            self._recent = dict([*self._recent.items(), (step, planned)][-_RECENT_STEPS:])
        return planned

    def _plan(self, step: int) -> tuple[PlannedExample, ...]:
        turns = self._turns_before(step * self.batch_size)
        first = list(turns)
        order = [self._take_turn_(turns) for _ in range(self.batch_size)]
        counts = [after - before for after, before in zip(turns, first, strict=True)]
        ranks = [0] * len(counts)
        planned = []
        for task in order:
            epoch, visit = divmod(first[task] + ranks[task], self._rows[task])
            row = int(_row_order(self._seed, task, epoch, self._rows[task])[visit])
            planned.append(PlannedExample(task, row, epoch, ranks[task], counts[task]))
            ranks[task] += 1
        return tuple(planned)

    def _turns_before(self, position: int) -> list[int]:
        """How many turns each task has taken before a position."""
        tasks, total = len(self._weights), sum(self._weights)
        # At the time τ, ⌊w_i τ + ½⌋ turns of task i are over. This τ is just early enough for none too many, and the
        # few that are left are counted one by one. Times and turns before 0 go on backwards by the same formula.
        turns = [(2 * weight * (position - tasks) + total) // (2 * total) for weight in self._weights]
        for _ in range(position - sum(turns)):
            self._take_turn_(turns)
        return turns

    def _take_turn_(self, turns: list[int]) -> int:
        """Count the next turn, and return its task. Of turns at the same time, that of the first task is first."""
        task = min(range(len(turns)), key=lambda i: (2 * turns[i] + 1) * self._intervals[i])
        turns[task] += 1
        return task


@functools.lru_cache(maxsize=32)
def _row_order(seed: int, task: int, epoch: int, rows: int) -> np.ndarray:
    """The order of a task's rows in an epoch. A step needs those of one or two epochs, again and again."""
    return np.random.default_rng([seed, 1, task, epoch]).permutation(rows)
