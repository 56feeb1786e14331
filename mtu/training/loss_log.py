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
        pending: losses of an earlier run that no entry holds yet.
    """

    def __init__(self, directory: Path | None, last_step: int, pending: Iterable[float] = ()) -> None:
        self.path = None if directory is None else directory / "log.jsonl"
        self.entries: list[LogEntry] = []
        self.smoothed: float | None = None
        self.pending = list(pending)
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

    def add(self, loss: float) -> None:
        """Take in the loss of one step."""
        self.pending.append(loss)
        self.smoothed = loss if self.smoothed is None else 0.98 * self.smoothed + 0.02 * loss

    def write(self, step: int, learning_rate: float, seconds: float) -> None:
        """Log the mean loss since the previous entry."""
        entry = LogEntry(step, sum(self.pending) / len(self.pending), learning_rate, seconds)
        self.entries.append(entry)
        self.pending.clear()
        if self.path is not None:
            with self.path.open("a") as log:
                log.write(json.dumps(entry._asdict()) + "\n")
