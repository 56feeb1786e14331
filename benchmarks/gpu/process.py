"""Commands in process groups of their own, which can be ended, and which a later run finds again."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# A command that is asked to stop has this long to write its results.
GRACE_SECONDS = 4.0
_POLL_SECONDS = 0.05
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# The shell becomes the command. Before that, it writes the kernel's line on itself into a file: otherwise a run that is
# killed between the start and the note would leave an unknown process behind. A step runs without its note, too.
_START = 'cat /proc/sys/kernel/random/boot_id "/proc/$$/stat" > "$0"; exec "$@"'


class CommandGroup:
    """A command that runs in a session, and so in a process group, of its own.

    Its output is added to the log; `note` is the file that identifies its process for `kill_leftover`. Raises OSError
    where the log cannot be written, or there is no shell.
    """

    def __init__(
        self, command: Sequence[str], note: Path, log: Path, cwd: Path, environment: Mapping[str, str]
    ) -> None:
        self.note, self.started = note, time.monotonic()
        self._asked = math.inf
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
    def exit_status(self) -> int | None:
        """The exit status of the command, negative if a signal ended it; None while it runs."""
        return self._process.poll()

    @property
    def seconds_since_start(self) -> float:
        return time.monotonic() - self.started

    def ask_to_stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Asks the command to stop, once. Commands that are to stop together are all asked before one is ended."""
        if self._asked == math.inf:
            self._asked = time.monotonic()
            with suppress(ProcessLookupError):
                self._process.send_signal(how)

    def stop_or_kill(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Asks the command to stop, waits a while, and kills the rest of its group, also after its end."""
        if self.exit_status is None:
            self.ask_to_stop(how)
            while self.exit_status is None and time.monotonic() < self._asked + GRACE_SECONDS:
                sleep_briefly()
        _kill_group(self._process.pid)
        self._process.wait()
        self.note.unlink(missing_ok=True)


def sleep_briefly() -> None:
    """Lets the processes run for a moment."""
    time.sleep(_POLL_SECONDS)


def kill_leftover(note: Path) -> bool:
    """Kills the group that a killed run has left behind. Returns whether it was still there.

    A process number may have been given out again since: a process is the same if it began at the same time, and a
    number whose group has members is not given out.
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
    """Boot, process number and start time; None without a note, or with only a part of one."""
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
