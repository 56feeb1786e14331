"""Signals that end a training: it finishes its step and saves before the process ends."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interruption", "raise_for_signal"]

_EXIT_CODE_OF_SIGTERM = 128 + signal.SIGTERM


class Interruption:
    """A context that notes the first SIGINT or SIGTERM, for the training to end after its step.

    A second signal ends the process at once. Handlers are only installed in the main thread of a process, because
    Python allows no other, and the earlier ones return at the end of the context.

    Args:
        announcement: what to tell the user after the first signal; None: nothing.

    Attributes:
        signal_number: the first signal; None: there was none.
    """

    def __init__(self, announcement: str | None = None) -> None:
        self.signal_number: int | None = None
        self._announcement = announcement
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            # Python reports a handler that was not installed from Python as None, which it does not take.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise_for_signal(number)
        self.signal_number = number
        if self._announcement is not None:
            # `print` may not be called from a handler, because the interrupted code may be printing.
            os.write(2, f"\n{self._announcement}\n".encode())


def raise_for_signal(number: int | None) -> None:
    """Raise what ends a process after a signal: SystemExit(143) after SIGTERM, KeyboardInterrupt after SIGINT.

    Args:
        number: the signal; None: there was none, and nothing is raised.
    """
    if number == signal.SIGTERM:
        raise SystemExit(_EXIT_CODE_OF_SIGTERM)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
