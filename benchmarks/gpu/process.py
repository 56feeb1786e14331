"""Commands in process groups of their own, which end when they are told to, and are found again by a later run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# A command that is told to stop has this long to write what it has.
GRACE_SECONDS = 4.0
_POLL_SECONDS = 0.05
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# The shell becomes the command. Before that, it leaves the kernel's line on itself in a file: who kills the run between
# the start and the note would otherwise leave a process behind that nobody knows of. A step runs without its
# note, too.
_START = 'cat /proc/sys/kernel/random/boot_id "/proc/$$/stat" > "$0"; exec "$@"'


class Group:
    """A command that runs in a session, and so in a process group, of its own.

    Args:
        command: program and arguments.
        note: file that says which process it is, for `end_leftover`.
        log: file that its output is added to.
        cwd: where it runs.
        environment: of the command.

    Raises:
        OSError: the log cannot be written, or there is no shell.
    """

    def __init__(
        self, command: Sequence[str], note: Path, log: Path, cwd: Path, environment: Mapping[str, str]
    ) -> None:
        self.note, self.started = note, time.monotonic()
        self._asked: float | None = None
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _START, str(note), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """What the command returned, negative if a signal ended it; None while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def ask(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Asks the command to stop; those that are to stop together are asked together, and then ended."""
        if self._asked is None:
            self._asked = time.monotonic()
            with suppress(ProcessLookupError):
                self._process.send_signal(how)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Asks the command to stop, waits a while, and kills what is left of its group; also after it has ended."""
        if self.code is None:
            self.ask(how)
            while self.code is None and time.monotonic() < self._asked + GRACE_SECONDS:
                pause()
        _kill_group(self._process.pid)
        self._process.wait()
        self.note.unlink(missing_ok=True)


def pause() -> None:
    """Lets the processes run for a moment."""
    time.sleep(_POLL_SECONDS)


def end_leftover(note: Path) -> bool:
    """Kills the group that a run which was killed itself has left behind, if it is still there.

    A process number may have been given out again since: a process is the same if it began at the same time, and a
    number whose group has members is not given out.

    Returns:
        Whether there was one.
    """
    found = _noted(note)
    note.unlink(missing_ok=True)
    if found is None:
        return False
    boot, number, began = found
    current = _began(Path(f"/proc/{number}/stat"))
    return boot == _BOOT.read_text().strip() and current in (None, began) and _kill_group(number)


def _kill_group(number: int) -> bool:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(number, signal.SIGKILL)
        return True
    return False


def _noted(note: Path) -> tuple[str, int, str] | None:
    """Boot, process number and beginning; None where there is no note, or only a part of one."""
    with suppress(OSError, ValueError, IndexError):
        boot, line = note.read_text().splitlines()
        return boot, int(line.partition(" ")[0]), _field_of_beginning(line)
    return None


def _began(stat: Path) -> str | None:
    with suppress(OSError):
        return _field_of_beginning(stat.read_text())
    return None


def _field_of_beginning(line: str) -> str:
    # The name of the program, in parentheses, may hold anything.
    return line.rpartition(")")[2].split()[19]
