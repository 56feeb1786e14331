"""The output folder of a run on a GPU: a few files, each of them whole at any moment."""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.state import Outcome, State, replace_file

# The output of each step's command.
LOG = "log.txt"
RUN = "benchmarks.gpu_run"
RESULTS, SUMMARY, FACTS = "results.zip", "summary.md", "summary.json"
# The model of a step that trains; it is packed into a file of its own.
MODEL = Path("output", "model")
# The way back from the machine may refuse large files.
_PART_BYTES = 15 * 2**20
_PACKED = (".txt", ".csv", ".py", ".json", ".md", ".png")
# The end of a log is packed: a compiler may write megabytes.
_LOG_BYTES = 2**19
_TAIL_LINES = 40


class PackedOutput:
    """Packs the steps' files into three files, and a trained model into parts of one more.

    The folder is made if it is not there; ValueError says that it cannot be written. `names` are the steps in order.
    """

    def __init__(self, folder: Path, state: State, names: Sequence[str], commit: str, quick: bool = False) -> None:
        make_writable_folder(folder)
        self._folder, self._state, self._names = folder.resolve(), state, names
        self._commit, self._quick = commit, quick
        try:
            self.write_files()
        except OSError as error:
            raise ValueError(_refusal(folder, error)) from None

    def write_files(self) -> None:
        """Writes the results and the summary as they are now."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in self._names:
                self._add(archive, name, self._state.folder / "steps" / name)
        replace_file(self._folder / RESULTS, packed.getvalue())
        replace_file(self._folder / SUMMARY, self.summary_text(tails=True).encode())
        outcomes = self._outcomes()
        facts = {"run": RUN, "commit": self._commit, "quick": self._quick}
        facts["steps"] = {name: outcome._asdict() for name, outcome in outcomes.items()}
        replace_file(self._folder / FACTS, json.dumps(facts, indent=1).encode())
        for name in outcomes:
            if self._model(name).exists():
                self._pack_model(self._model(name), self._folder / f"{name}-model.zip")

    def _add(self, archive: zipfile.ZipFile, name: str, folder: Path) -> None:
        for file in sorted(folder.rglob("*")) if folder.exists() else ():
            path = file.relative_to(folder)
            if file.is_file() and file.suffix in _PACKED and not path.is_relative_to(MODEL):
                archive.writestr(f"{name}/{path}", _end_of(file))

    def _pack_model(self, model: Path, packed: Path) -> None:
        # It is written once, since a trained model has megabytes. The first part is written last.
        if not _part(packed, 0).exists():
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(model.rglob("*")):
                    archive.write(file, file.relative_to(model))
            content = stream.getvalue()
            for number in reversed(range(-(-len(content) // _PART_BYTES))):
                part = content[number * _PART_BYTES : (number + 1) * _PART_BYTES]
                replace_file(_part(packed, number), part)

    def summary_text(self, tails: bool = False) -> str:
        """A table of the steps for people; with the ends of their logs."""
        outcomes = self._outcomes()
        lines = [f"# Run on a GPU, commit {self._commit}", "", "| step | | s | why |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {o.status} | {o.seconds:.0f} | {o.sentence.replace('|', '/')} |"
            for name, o in outcomes.items()
        ]
        models = [f"{name}-model.zip" for name in outcomes if self._model(name).exists()]
        lines += [line for model in models for line in ("", f"The model: `cat {model}.* > {model}; unzip {model}`")]
        for name in outcomes if tails else ():
            log = self._state.folder / "steps" / name / LOG
            if log.exists():
                text = _end_of(log).decode(errors="replace")
                kept = [line.rpartition("\r")[2] for line in text.splitlines()][-_TAIL_LINES:]
                lines += ["", f"## {name}", "", "```", *kept, "```"]
        return "\n".join(lines) + "\n"

    def _model(self, name: str) -> Path:
        return self._state.folder / "steps" / name / MODEL

    def _outcomes(self) -> dict[str, Outcome]:
        return self._state.read_outcomes(self._names)


def _part(packed: Path, number: int) -> Path:
    return packed.with_name(f"{packed.name}.{number:03d}")


def make_writable_folder(folder: Path) -> None:
    """Makes the folder if it is not there. Raises ValueError if it cannot be written."""
    probe = folder / f"{SUMMARY}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(_refusal(folder, error)) from None


def _refusal(folder: Path, error: OSError) -> str:
    return f"--output must be a folder that can be written, got {folder}: {error.strerror}."


def _end_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        if file.name == LOG:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - _LOG_BYTES))
        return opened.read()
