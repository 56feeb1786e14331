"""The folder of a training while it runs: a lock against other trainings, and errors of writing that name it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtu.storage import make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["locked_folder_context", "named_folder_context"]


@contextmanager
def named_folder_context(directory: Path | None) -> Iterator[None]:
    """Let errors of writing name the folder of the training."""
    try:
        yield
    except OSError as error:
        raise OSError(f"The folder {directory} cannot be written to ({error.strerror or error}).") from error


@contextmanager
def locked_folder_context(directory: Path) -> Iterator[None]:
    """Make a folder, and keep trainings of other processes out of it within this context.

    The file `.lock` stays in the folder. Where the system or the disk has no locks of files, nothing is locked.

    Args:
        directory: the folder.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: another training has locked the folder, or a file has its name.
    """
    with named_folder_context(directory):
        make_folder(directory)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    if fcntl is None:
        return
    try:
        # The workers of a killed training live on for seconds. They would keep a lock of flock, but not one of lockf.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"Another training is running in {directory}: wait for its end, or choose another folder."
        ) from None
    except OSError:
        # Some network file systems have no locks.
        return
