"""The losses of a training, as entries and as lines of a file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mtu.storage import write_text

__all__ = ["LogEntry", "LossLog"]


class LogEntry(NamedTuple):
    """Mean loss of the steps since the previous entry, with the rate and the seconds of training so far."""

    step: int
    loss: float
    learning_rate: float
    seconds: float


class LossLog:
    """The losses of a training: means over stretches of steps, also as lines of `log.jsonl`.

    Args:
        directory: where the file goes; None keeps none.
        last_step: entries of an earlier run up to this step are taken over. Lines beyond it, or cut off by an
            interruption, are dropped.
        unlogged_losses: losses of an earlier run that no entry holds yet.
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
        """Take in the loss of one step."""
        self.unlogged_losses.append(loss)
        self.smoothed_loss = loss if self.smoothed_loss is None else 0.98 * self.smoothed_loss + 0.02 * loss

    def write_entry(self, step: int, learning_rate: float, seconds: float) -> None:
        """Log the mean loss since the previous entry."""
        entry = LogEntry(step, sum(self.unlogged_losses) / len(self.unlogged_losses), learning_rate, seconds)
        self.entries.append(entry)
        self.unlogged_losses.clear()
        if self.path is not None:
            with self.path.open("a") as log:
                log.write(json.dumps(entry._asdict()) + "\n")
