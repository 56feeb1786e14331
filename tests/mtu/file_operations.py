"""Writing that is cut off: the n-th operation on files fails, and so does every later one, as after a kill."""

import io
import os
from collections.abc import Callable

import pytest

from mtu import storage

CUTS = [KeyboardInterrupt(), OSError(28, "No space left on device")]


def count_operations(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """How many operations on files a run makes."""
    calls: list[str] = []
    _run_until(monkeypatch, run, 10**9, RuntimeError(), calls)
    return len(calls)


def run_cut_off(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], operation: int, cut: BaseException) -> None:
    """Run until an operation on files, counted from 0, raises `cut`."""
    with pytest.raises(type(cut)):
        _run_until(monkeypatch, run, operation, cut, [])


def _run_until(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], last: int, cut: BaseException, calls: list[str]
) -> None:
    def cut_off(name: str, real: Callable, torn: Callable[..., object] | None = None) -> Callable:
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == last and torn is not None:
                torn(*args)
            if len(calls) > last:
                raise cut
            return real(*args, **kwargs)

        return call

    def opened(file, mode="r", *args, **kwargs):
        return (writing if set(mode) & set("wax+") else real_open)(file, mode, *args, **kwargs)

    def torn_tensors(tensors, path, *args) -> None:
        real_save(tensors, path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    real_open, real_save = io.open, storage.save_file
    # A file opened anew is empty by then; one that is added to is as it was.
    writing = cut_off("open", real_open, lambda file, mode, *_: "w" in mode and real_open(file, "w").close())
    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, cut_off(name, getattr(os, name)))
        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)
        patch.setattr(storage, "save_file", cut_off("save_file", real_save, torn_tensors))
        run()
