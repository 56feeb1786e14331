"""What a training minimises: the interface between the trainer, which knows no diffusion, and a loss.

The trainer splits the batch of a step into equal parts: one for each process and each accumulation step. A part depends
on its seed, step and index alone, so nothing about the order of the data has to be saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter

__all__ = ["BatchPart", "Objective", "PartialLoss"]


class BatchPart(NamedTuple):
    """One of the equal parts of a step's batch.

    Args:
        step: number of the step, from 0.
        index: number of the part, from 0.
        count: number of parts: processes times accumulation steps.
    """

    step: int
    index: int
    count: int


class PartialLoss(NamedTuple):
    """What one part of a batch adds to the loss of its step: the parts' losses sum to the step's loss.

    Args:
        loss: () the part's summand.
        terms: () detached summands of each term that the log shows, by name, such as the loss of each task. The parts'
            terms sum to the step's term.
        example_losses: (n,) detached, the loss of each example of the part before any weight; None: there are none.
            Where the loss is not finite, they tell which examples are at fault.
    """

    loss: Tensor
    terms: Mapping[str, Tensor] = {}
    example_losses: Tensor | None = None


class Objective(nn.Module):
    """A loss as a module: its parameters that require gradients are trained, and the others are constant.

    Subclasses hold the models as submodules, implement `load_batch` and `forward`, and override the other methods where
    they have something to say. `forward(batch)` takes what `load_batch` returned, on the device, and returns a
    `PartialLoss`.
    """

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that determine the loss of a step. A checkpoint is resumed only with the same settings."""
        return {}

    def prepare(self, accelerator: Accelerator) -> None:
        """Do what must be done once before the first step, such as filling a cache; all processes call it.

        The parameters are on the device of training by then. A single process may train on another device than that of
        the accelerator, because it trains where the objective was.

        Args:
            accelerator: tells the process and the main process.
        """

    def finish(self) -> None:
        """Undo what `prepare` changed for the time of the training.

        All processes call it once the training has ended, also by an error, perhaps one that came before `prepare`.
        """

    def check_part_count(self, count: int) -> None:
        """Raise a ValueError if the batch cannot be split into this many equal parts."""

    @property
    def load_batch(self) -> Callable[[BatchPart], Any]:
        """A function that loads a part of a batch as CPU tensors. Worker processes call it, so it must be picklable."""
        raise NotImplementedError

    def forward(self, batch: Any) -> PartialLoss:
        """Compute the loss of a part of a batch."""
        raise NotImplementedError

    def describe_examples(self, part: BatchPart) -> Sequence[str]:
        """Tell a user which examples a part consists of, in the order of `PartialLoss.example_losses`."""
        return []

    def row_parameters(self) -> Sequence[Parameter]:
        """The trained parameters (T, …) with one row per task: an optimizer step must not move a row of no example."""
        return []

    def trained_rows(self, step: int) -> Sequence[int]:
        """The rows of `row_parameters` that the examples of a step train."""
        return []

    def sharding_units(self) -> Sequence[nn.Module]:
        """The submodules that `fully_shard` gathers one at a time, from the first to the last."""
        return []
