"""The keys of a row: the workload, the routing of its samples, and the contender that computes it."""

from typing import NamedTuple

DENSE = None


class Workload(NamedTuple):
    """The work that all rows of a group share. Each benchmark sets the fields that it varies.

    Attributes:
        D: width of one feed-forward, which has H = 4·D hidden units.
        L: tokens of a sample.
        B: number of samples, or of pictures of a whole model.
        dtype: name of the compute dtype.
        direction: "forward", "backward" or "forward+backward".
        model: name of a whole model.
        size: edge of its pictures in pixels.
        branches: rows of the UNet's batch for each picture; guidance doubles or triples them.
        steps: denoising steps of whole images; 0 where the UNet runs once.
    """

    D: int = 0
    L: int = 0
    B: int = 1
    dtype: str = "bf16"
    direction: str = "forward"
    model: str = ""
    size: int = 0
    branches: int = 1
    steps: int = 0

    @property
    def needs_grad(self) -> bool:
        return self.direction != "forward"

    @property
    def rows(self) -> int:
        """Number of rows in the UNet's batch."""
        return self.B * self.branches

    def __str__(self) -> str:
        if not self.model:
            return f"{self.D}x{self.L} B={self.B} {self.dtype} {self.direction}"
        count = f"images={self.B} steps={self.steps}" if self.steps else f"B={self.B}"
        branches = f" branches={self.branches}" * (self.branches > 1)
        return f"{self.model} {self.size}x{self.size} {count}{branches} {self.dtype}"


class Setting(NamedTuple):
    """How the samples are routed: E experts, K of them active (None: dense), rows of `tasks` distinct tasks."""

    E: int = 1
    K: int | None = DENSE
    tasks: int = 1

    def __str__(self) -> str:
        return f"E={self.E} {'dense' if self.K is None else f'top-{self.K}'} tasks={self.tasks}"


class Entry(NamedTuple):
    """A contender in a setting: one row of the CSV."""

    contender: str
    setting: Setting


class Group(NamedTuple):
    """Entries that are measured interleaved, and so may be compared."""

    workload: Workload
    entries: tuple[Entry, ...]
