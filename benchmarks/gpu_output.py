"""The output folder of a run on a GPU: a few files, each of them whole at any moment."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_state import Outcome, State, replace

RESULTS, SUMMARY, FACTS = "results.zip", "summary.md", "summary.json"
# Of one log, its end: a compiler may fill megabytes.
_LOG_BYTES = 2**19
_TAIL_LINES = 40


class Output:
    """Packs what the steps wrote into three files.

    Args:
        folder: made if it is not there.
        state: of the run.
        names: of the steps, in order.
        commit: that is measured.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path, state: State, names: Sequence[str], commit: str) -> None:
        self._folder, self._state, self._names, self._commit = folder.resolve(), state, names, commit
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.pack()
        except OSError as error:
            raise ValueError(
                f"--output must be a folder that can be written, got {folder}: {error.strerror}."
            ) from None

    def pack(self) -> None:
        """Writes the results and the summary as they are now."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in self._names:
                folder = self._state.folder / "steps" / name
                for file in sorted(folder.rglob("*")) if folder.exists() else ():
                    if file.is_file() and file.suffix in (".txt", ".csv", ".py", ".json"):
                        archive.writestr(f"{name}/{file.relative_to(folder)}", _end_of(file))
        replace(self._folder / RESULTS, packed.getvalue())
        replace(self._folder / SUMMARY, self.summary(tails=True).encode())
        outcomes = {name: outcome._asdict() for name, outcome in self._outcomes().items()}
        facts = {"run": "benchmarks.gpu_run", "commit": self._commit, "steps": outcomes}
        replace(self._folder / FACTS, json.dumps(facts, indent=1).encode())

    def summary(self, tails: bool = False) -> str:
        """A table of the steps for people; with the ends of their logs."""
        outcomes = self._outcomes()
        lines = [f"# Run on a GPU, commit {self._commit}", "", "| step | | s | why |", "|---|---|---|---|"]
        lines += [f"| {name} | {o.status} | {o.seconds:.0f} | {o.sentence} |" for name, o in outcomes.items()]
        for name in outcomes if tails else ():
            log = self._state.folder / "steps" / name / "log.txt"
            if log.exists():
                text = _end_of(log).decode(errors="replace")
                kept = [line.rpartition("\r")[2] for line in text.splitlines()][-_TAIL_LINES:]
                lines += ["", f"## {name}", "", "```", *kept, "```"]
        return "\n".join(lines) + "\n"

    def _outcomes(self) -> dict[str, Outcome]:
        return self._state.outcomes(self._names)


def _end_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        if file.name == "log.txt":
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - _LOG_BYTES))
        return opened.read()
