"""Running the command `mtu` in this process, with what it writes and its exit code."""

from typing import NamedTuple

import pytest

from mtu.cli import main


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_mtu(capsys, monkeypatch):
    """Run `mtu` with the given arguments, its output going into a pipe."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # `main` would set it for all tests to come

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        captured = capsys.readouterr()
        return Ended(exit_info.value.code, captured.out, captured.err)

    return run
