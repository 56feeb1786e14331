"""The log of a training: its mean losses, as entries in memory, as lines of `log.jsonl`, and for TensorBoard."""

import json
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import TensorBoardTracker
from accelerate.utils import is_tensorboard_available

from mtu.storage import write_text

__all__ = ["LogEntry", "LossLog", "check_tensorboard", "read_entries"]


class LogEntry(NamedTuple):
    """One entry of the log of a training.

    Args:
        step: number of steps made so far.
        loss: mean loss of the steps since the previous entry.
        learning_rate: learning rate of the last step.
        seconds: training time so far, also before interruptions.
        data_seconds: mean time that a step since the previous entry waited for its batch.
        terms: mean of each term of the loss, such as the loss of each task, over those steps since the previous entry
            that had the term.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: float
    data_seconds: float
    terms: dict[str, float]


class LossLog:
    """Collects the losses of a training, and logs their mean from time to time. `open` it before the first entry.

    Args:
        directory: the folder of `log.jsonl` and `tensorboard`; None: no entry of an earlier run is read.
        last_step: the last step whose entries of an earlier run are kept. Later entries are dropped, and so are lines
            that an interruption has cut off.
        writes: whether to write files, which only the main process does.
        tensorboard: whether to write files of TensorBoard, too.

    Attributes:
        entries: all entries so far.
        smoothed_loss: exponential moving average of the losses, for the progress bar; None before the first.
        sums: sums over the steps since the last entry, as JSON; a checkpoint saves and restores them.
    """

    def __init__(self, directory: Path | None, last_step: int, *, writes: bool, tensorboard: bool) -> None:
        self.path = None if directory is None else directory / "log.jsonl"
        self.entries = [] if self.path is None else read_entries(self.path, last_step)
        self.smoothed_loss: float | None = None
        self.sums = _no_sums()
        self._writes = writes and self.path is not None
        self._tracker: TensorBoardTracker | None = None
        self._last_step, self._tensorboard = last_step, tensorboard

    def open(self, accepted_changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the entries of the earlier run that are kept, and drop the others from the files.

        Args:
            accepted_changes: changes of the settings, each with its "step". They become lines after that step's entry.

        Raises:
            OSError: the log cannot be written.
        """
        if self.path is None or not self._writes:
            return
        lines = [(entry.step, _line(entry._asdict())) for entry in self.entries]
        lines += [(change["step"], _line(change)) for change in accepted_changes]
        write_text(self.path, "".join(line for _, line in sorted(lines, key=itemgetter(0))))
        if self._tensorboard:
            # Steps after the checkpoint are made again, so TensorBoard forgets their first values.
            self._tracker = TensorBoardTracker("tensorboard", self.path.parent, purge_step=self._last_step + 1)
            self._tracker.start()

    def add_step(self, loss: float, data_seconds: float, terms: Mapping[str, float]) -> None:
        """Add one step: its loss, the time that it waited for its batch, and its terms by name."""
        self.smoothed_loss = loss if self.smoothed_loss is None else 0.98 * self.smoothed_loss + 0.02 * loss
        self.sums["steps"] += 1
        self.sums["loss"] += loss
        self.sums["data_seconds"] += data_seconds
        for name, value in terms.items():
            total, count = self.sums["terms"].get(name, (0.0, 0))
            self.sums["terms"][name] = [total + value, count + 1]

    def write_entry(self, step: int, learning_rate: float, seconds: float) -> None:
        """Write an entry with the means over the steps since the previous entry.

        Args:
            step: number of steps made so far.
            learning_rate: learning rate of the last step.
            seconds: training time so far.

        Raises:
            OSError: the file cannot be written.
        """
        sums, count = self.sums, self.sums["steps"]
        terms = {name: total / times for name, (total, times) in sorted(sums["terms"].items())}
        entry = LogEntry(step, sums["loss"] / count, learning_rate, seconds, sums["data_seconds"] / count, terms)
        self.entries.append(entry)
        self.sums = _no_sums()
        if self.path is None or not self._writes:
            return
        try:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(_line(entry._asdict()))
        except OSError as error:
            raise OSError(f"The log {self.path} cannot be written ({error.strerror or error}).") from error
        if self._tracker is not None:
            values = {name: value for name, value in entry._asdict().items() if name not in ("step", "terms")}
            self._tracker.log({**values, **{f"loss/{name}": value for name, value in terms.items()}}, step=step)

    def close(self) -> None:
        """Close the files of TensorBoard."""
        if self._tracker is not None:
            self._tracker.finish()


def check_tensorboard(directory: Path | None) -> None:
    """Raise a ValueError if there is no folder for the files of TensorBoard, or if its library is not installed."""
    if directory is None:
        raise ValueError("The log for TensorBoard needs a directory, but got None.")
    if not is_tensorboard_available():
        raise ValueError("The log for TensorBoard needs the library tensorboard: install mtu with its extra train.")


def _no_sums() -> dict[str, Any]:
    return {"steps": 0, "loss": 0.0, "data_seconds": 0.0, "terms": {}}


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def read_entries(path: Path, last_step: float = math.inf) -> list[LogEntry]:
    """Read the entries of a log up to a step, without lines that are cut off or tell of changed settings."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = LogEntry(**json.loads(line))
            if entry.step <= last_step:
                entries.append(entry)
        except (json.JSONDecodeError, TypeError):
            continue
    return entries
