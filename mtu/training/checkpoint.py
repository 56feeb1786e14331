"""Checkpoints: one safetensors file and one JSON file that names it, never a pickle.

The tensors are written first, under a name that carries the step; then the JSON file is renamed into place. An
interruption at any moment leaves the previous checkpoint or the new one, never half of each.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "checkpoint.json"


def save_checkpoint(directory: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint and delete the one before.

    Args:
        directory: an existing folder.
        tensors: what to keep, by name.
        state: what else to keep, as JSON; must hold "step".
    """
    name = f"checkpoint-{state['step']:07d}.safetensors"
    partial = directory / (name + ".partial")
    # Clones, because safetensors refuses tensors that share memory, and stores no memory format but the plain one.
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, partial)
    partial.replace(directory / name)
    partial = directory / (STATE_FILE + ".partial")
    partial.write_text(json.dumps({**state, "file": name}, indent=1))
    partial.replace(directory / STATE_FILE)
    for old in directory.glob("checkpoint-*.safetensors*"):
        if old.name != name:
            old.unlink()


def load_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the checkpoint of a directory.

    Args:
        directory: the folder that `save_checkpoint` wrote into.

    Returns:
        The tensors by name, and the state.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is damaged.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint in {directory} to resume from.")
    try:
        state = json.loads(path.read_text())
        tensors = load_file(directory / state["file"])
    except (json.JSONDecodeError, KeyError, SafetensorError, OSError) as error:
        raise ValueError(f"The checkpoint in {directory} is damaged ({type(error).__name__}).") from error
    return tensors, state
