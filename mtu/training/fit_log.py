"""The log of a training: its mean losses, as entries in memory and as lines of `log.jsonl`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mtu.storage import write_text

__all__ = ["LogEntry", "LossLog"]


class LogEntry(NamedTuple):
    """One entry of the log of a training.

    Attributes:
        step: number of steps made so far.
        loss: mean loss of the steps since the previous entry.
        learning_rate: learning rate of the last step.
        seconds: training time so far.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float


class LossLog:
    """Collects the losses of a training, and logs their mean from time to time.

    Args:
        directory: the folder of `log.jsonl`; None: no file is written.
        last_step: the last step whose entries of an earlier run are kept. Later entries are dropped, and so are lines
            that an interruption has cut off.
        unlogged_losses: losses of an earlier run that belong to the next entry.

    Attributes:
        entries: all entries so far.
        smoothed_loss: exponential moving average of the losses, for the progress bar; None before the first.
        unlogged_losses: losses since the last entry.
    """

    def __init__(self, directory: Path | None, last_step: int, unlogged_losses: Iterable[float] = ()) -> None:
        self.path = None if directory is None else directory / "log.jsonl"
        self.entries: list[LogEntry] = []
        self.smoothed_loss: float | None = None
        self.unlogged_losses = list(unlogged_losses)
        if self.path is None:
            return
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                entry = LogEntry(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            if entry.step <= last_step:
                self.entries.append(entry)
        write_text(self.path, "".join(json.dumps(entry._asdict()) + "\n" for entry in self.entries))

    def add_loss(self, loss: float) -> None:
        """Add the loss of one step."""
        self.unlogged_losses.append(loss)
        self.smoothed_loss = loss if self.smoothed_loss is None else 0.98 * self.smoothed_loss + 0.02 * loss

    def write_entry(self, step: int, learning_rate: float, seconds: float) -> None:
        """Write an entry with the mean of the losses since the previous entry.

        Args:
            step: number of steps made so far.
            learning_rate: learning rate of the last step.
            seconds: training time so far.
        """
        entry = LogEntry(step, sum(self.unlogged_losses) / len(self.unlogged_losses), learning_rate, seconds)
        self.entries.append(entry)
        self.unlogged_losses.clear()
        if self.path is not None:
            with self.path.open("a") as log:
                log.write(json.dumps(entry._asdict()) + "\n")
