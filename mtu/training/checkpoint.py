"""Checkpoints of a training in a directory: named tensors, and a state as JSON.

A checkpoint replaces the previous one atomically, so an interruption leaves one of the two whole. `fit` chooses the
contents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtu import storage

__all__ = ["check_no_checkpoint", "delete_checkpoint_in", "has_checkpoint", "read_checkpoint", "write_checkpoint"]

_STEM = "checkpoint"


def has_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a checkpoint, which may be damaged."""
    return (directory / f"{_STEM}.json").is_file()


def check_no_checkpoint(directory: Path) -> None:
    """Raise a FileExistsError if a directory holds a checkpoint, which a new training would destroy."""
    if has_checkpoint(directory):
        raise FileExistsError(
            f"{directory} holds the checkpoint of a training: continue it with resume, delete it with overwrite, or "
            "choose another folder."
        )


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint and delete the previous one.

    Args:
        directory: the folder of the checkpoint.
        tensors: the tensors to save, by name.
        state: further values to save, as JSON; must have the key "step".

    Raises:
        OSError: the checkpoint cannot be written. The previous one stays.
    """
    storage.write_description_and_tensors(directory, _STEM, tensors, state)


def read_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the checkpoint of a directory.

    Args:
        directory: the folder that `write_checkpoint` wrote into.

    Returns:
        The tensors by name, and the state.

    Raises:
        FileNotFoundError: the directory holds no checkpoint.
        ValueError: the checkpoint is damaged.
    """
    if not has_checkpoint(directory):
        raise FileNotFoundError(f"There is no checkpoint in {directory} to resume from.")
    try:
        state, tensors = storage.read_description_and_tensors(directory, _STEM, requires_digest=False)
    except ValueError as error:
        raise ValueError(f"The checkpoint is damaged: {error}") from error
    return tensors, state


def delete_checkpoint_in(directory: Path) -> None:
    """Delete the checkpoint of a directory, if there is one."""
    storage.delete_tensor_files(directory, _STEM)
