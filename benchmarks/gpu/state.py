"""The state of a run on a GPU between its calls: the steps that ended, their files, and a copy of the tree."""

import fcntl
import json
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.process import kill_leftover
from benchmarks.gpu.steps import TABLE, TUNE
from benchmarks.harness.provenance import ROOT

_TREE = ("mtu", "mtu_kernels", "benchmarks", "tests", "pyproject.toml")
_TABLE = Path("mtu_kernels", "triton", TABLE)
DONE, FAILED, ENDED, CUT, LATE = "done", "failed", "ended", "cut", "not started"


class Outcome(NamedTuple):
    """The end of a step, the seconds that it took, and the reason in a sentence where it is not done.

    A step is `DONE`, `FAILED` by itself, `ENDED` at its budget, `CUT` with the whole run, or `LATE`: never begun.
    """

    status: str
    seconds: float
    sentence: str = ""


class State:
    """The state folder of a run, for one call of it at a time; it is made if it is not there.

    Steps are kept by commit, caches of compilers for all commits. ValueError says that the folder cannot be written, or
    that another call is using it.
    """

    def __init__(self, folder: Path, commit: str) -> None:
        self.caches, self._running = folder.resolve() / "caches", folder.resolve() / "running"
        self.folder = folder_of_commit(folder.resolve(), commit)
        self.tree = self.folder / "tree"
        try:
            for made in (self.caches, self._running, self.folder / "steps", self.folder / "outcomes"):
                made.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise ValueError(f"--state must be a folder that can be written, got {folder}: {error.strerror}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(f"--state must be of this call alone, but another one uses {folder} now.") from None

    def release(self) -> None:
        self._lock.close()

    def kill_leftovers(self) -> list[str]:
        """Kills the steps that a killed call left running. Returns their names."""
        return [note.name for note in sorted(self._running.iterdir()) if kill_leftover(note)]

    def copy_source_tree(self) -> None:
        """Copies the tree of this module, which stays as it is when tiles are tuned."""
        shutil.rmtree(self.tree, ignore_errors=True)
        skipped = shutil.ignore_patterns("__pycache__", "*.partial")
        self.tree.mkdir()
        for name in _TREE:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.tree / name, ignore=skipped)
            else:
                shutil.copy2(ROOT / name, self.tree / name)

    def copy_tuned_table(self) -> bool:
        """Puts the tuned table into the copy of the tree. Returns whether there is one."""
        tuned = self.step_folder(TUNE) / TABLE
        if tuned.exists():
            replace_file(self.tree / _TABLE, tuned.read_bytes())
        return tuned.exists()

    def step_folder(self, name: str) -> Path:
        """The folder of a step, made if it is not there."""
        folder = self.folder / "steps" / name
        folder.mkdir(exist_ok=True)
        return folder

    def note_file(self, name: str) -> Path:
        """The file that identifies the process of a step."""
        return self._running / name

    def read_outcome(self, name: str) -> Outcome | None:
        """The end of a step in this call or an earlier one; None if there is none, or it cannot be read."""
        try:
            return Outcome(**json.loads((self.folder / "outcomes" / name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_outcome(self, name: str, outcome: Outcome) -> None:
        replace_file(self.folder / "outcomes" / name, json.dumps(outcome._asdict()).encode())

    def read_outcomes(self, names: Iterable[str]) -> dict[str, Outcome]:
        found = {name: self.read_outcome(name) for name in names}
        return {name: outcome for name, outcome in found.items() if outcome is not None}


def folder_of_commit(state: Path, commit: str) -> Path:
    """The part of a state folder that is of one commit."""
    return state / re.sub(r"[^\w.+-]", "_", f"commit-{commit}")


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file as a whole: a reader, also after a crash, finds the old content or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
