"""The checkpoints of a training, in the folder `checkpoints` of its directory: named tensors and a state as JSON.

A checkpoint consists of `step-00000500.json` and the file of tensors that it names. An older checkpoint is deleted only
when a newer one is on the disk, so an interruption never leaves a directory without a whole checkpoint.

The trainer chooses the contents. Among them is a description of the training, because a checkpoint is only resumed by
the training that wrote it. While a training runs, its directory is locked against others.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtu import storage
from mtu.training.distributed import full_tensor
from mtu.training.objective import Objective
from mtu.training.trainer_config import TrainerConfig
from mtu.training.training_state import persistent_buffers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "Checkpoint",
    "check_no_checkpoints",
    "check_same_training",
    "checkpoint_steps",
    "delete_checkpoints",
    "describe_training",
    "locked_folder_context",
    "named_folder_context",
    "read_newest_checkpoint",
    "write_checkpoint",
]

_FOLDER = "checkpoints"
_OWN_FILE = re.compile(r"\.?(step-\d{8,})\.(json|[0-9a-f]{12}\.safetensors|partial)")
# These settings may change when a training is resumed, because no step that was already made depends on them. How the
# batch is split changes the rounding of sums alone.
_CHANGEABLE = (
    "checkpoint_every",
    "checkpoints_total_limit",
    "fully_shard",
    "gradient_accumulation_steps",
    "log_every",
    "max_minutes",
    "num_workers",
    "tensorboard",
    "validate_every",
)
# These may change, too, if the user accepts it: the steps that follow mean something else, but those made stay as they
# are. The same holds for the settings of an objective, such as its data.
_ACCEPTABLE = ("learning_rate", "max_grad_norm", "schedule", "seed", "steps", "warmup_steps", "weight_decay")
# The values of a checkpoint without which no training goes on.
_CONTENTS = ("training", "seconds", "optimizer_numbers", "log_sums", "accepted_changes")
_LAYOUTS = {
    "trained": "trained parameters",
    "frozen": "frozen parameters",
    "buffers": "buffers",
    "rows": "parameters with one row per task",
}


class Checkpoint(NamedTuple):
    """A checkpoint in memory.

    Args:
        step: number of steps made.
        tensors: the tensors by name, on the CPU.
        state: further values, as JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


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
        storage.make_folder(directory)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of all checkpoints of a directory in rising order; some may be damaged."""
    folder = directory / _FOLDER
    found = (re.fullmatch(r"step-(\d{8,})\.json", name) for name in _names(folder))
    return sorted(int(match[1]) for match in found if match)


def check_no_checkpoints(directory: Path) -> None:
    """Raise a FileExistsError if a directory holds checkpoints, which a new training would destroy."""
    if checkpoint_steps(directory):
        raise FileExistsError(
            f"{directory} holds the checkpoint of a training: continue it with resume, delete it with overwrite, or "
            "choose another folder."
        )


def write_checkpoint(directory: Path, checkpoint: Checkpoint, total_limit: int | None = None) -> None:
    """Write a checkpoint, and then delete the oldest ones.

    Checkpoints of later steps are deleted, too: the training has gone back behind them because they are damaged.

    Args:
        directory: the folder of the training.
        checkpoint: the contents.
        total_limit: number of checkpoints to keep; None: all.

    Raises:
        OSError: the checkpoint cannot be written. The older ones stay.
    """
    folder, step = directory / _FOLDER, checkpoint.step
    try:
        storage.write_description_and_tensors(folder, _stem(step), checkpoint.tensors, checkpoint.state)
    except OSError as error:
        older = [other for other in checkpoint_steps(directory) if other < step]
        kept = f"that of step {older[-1]} stays" if older else "there is no older one"
        raise OSError(
            f"The checkpoint of step {step} cannot be written to {folder} ({error.strerror or error}); {kept}."
        ) from error
    steps = [other for other in checkpoint_steps(directory) if other <= step]
    kept_steps = steps if total_limit is None else steps[-total_limit:]
    _delete_all_but(folder, {_stem(other) for other in kept_steps})


def read_newest_checkpoint(directory: Path) -> Checkpoint:
    """Read the newest checkpoint that is whole.

    Args:
        directory: the folder of the training.

    Raises:
        FileNotFoundError: the directory holds no checkpoint.
        ValueError: all checkpoints are damaged.

    Warns:
        UserWarning: newer checkpoints are damaged.
    """
    folder, faults = directory / _FOLDER, []
    for step in reversed(checkpoint_steps(directory)):
        try:
            state, tensors = storage.read_description_and_tensors(folder, _stem(step))
        except (ValueError, OSError) as error:
            faults.append(f"{_stem(step)} ({str(error).rstrip('.')})")
            continue
        if faults:
            warnings.warn(
                f"Training goes on from step {step}, because newer checkpoints are damaged: {', '.join(faults)}.",
                UserWarning,
                stacklevel=4,
            )
        return Checkpoint(step, tensors, state)
    if faults:
        raise ValueError(f"Every checkpoint in {folder} is damaged: {', '.join(faults)}.")
    raise FileNotFoundError(f"There is no checkpoint in {directory} to resume from.")


def delete_checkpoints(directory: Path) -> None:
    """Delete all checkpoints of a directory, and no other file."""
    _delete_all_but(directory / _FOLDER, set())


def describe_training(objective: Objective, config: TrainerConfig, *, needs_digest: bool = True) -> dict[str, Any]:
    """Describe a training as JSON: its settings, and the layout of its weights.

    Args:
        objective: the objective. If its weights are sharded, all processes call this together.
        config: the settings of the training.
        needs_digest: whether to compute the digest of the frozen weights, which takes seconds.

    Returns:
        The settings of the trainer ("config") and of the objective ("settings"), dtype and shape of each weight that is
        trained ("trained") or frozen ("frozen"), of each buffer ("buffers") and of each trained weight with one row per
        task ("rows"), and the digest of the frozen weights ("frozen_sha256") or None.
    """
    parameters = dict(objective.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    rows = {id(parameter) for parameter in objective.row_parameters()}
    description = {
        "config": dataclasses.asdict(config),
        "settings": objective.settings,
        "trained": _layout({name: p for name, p in parameters.items() if p.requires_grad}),
        "frozen": _layout(frozen),
        "buffers": _layout(persistent_buffers(objective)),
        "rows": _layout({name: p for name, p in parameters.items() if p.requires_grad and id(p) in rows}),
        "frozen_sha256": _sha256(frozen) if needs_digest else None,
    }
    # Values go through JSON, so that tuples equal the lists that they become in a file.
    return json.loads(json.dumps(description))


def check_same_training(
    state: Mapping[str, Any], current: Mapping[str, Any], directory: Path, *, accept_changes: bool = False
) -> list[str]:
    """Raise a ValueError unless a checkpoint belongs to this training.

    Args:
        state: the values in the checkpoint, with the description of its training as "training".
        current: the description of this training.
        directory: the folder of the training, for the message.
        accept_changes: whether settings may differ that determine the steps to come.

    Returns:
        The accepted changes, such as "learning_rate (0.01 then, 0.001 now)".
    """
    saved = state.get("training", {})
    missing = [key for key in _CONTENTS if key not in state] + [key for key in current if key not in saved]
    if missing:
        raise ValueError(
            f"The checkpoint in {directory} lacks {', '.join(map(repr, missing))}: expected one that a Trainer wrote."
        )
    changeable = set(_CHANGEABLE)
    if current["config"]["schedule"] == "constant":
        changeable.add("steps")
    changes = _changes(saved["config"], current["config"])
    changes = {name: text for name, text in changes.items() if name not in changeable}
    refused = [text for name, text in changes.items() if name not in _ACCEPTABLE]
    accepted = [text for name, text in changes.items() if name in _ACCEPTABLE]
    accepted += [text for text in _changes(saved["settings"], current["settings"]).values() if text not in accepted]
    if refused or (accepted and not accept_changes):
        advice = "" if refused else "; accept_changes (--accept-changes) goes on with it all the same"
        raise ValueError(
            f"The checkpoint in {directory} was made with another {', '.join(refused + accepted)}{advice}."
        )
    for key, kind in _LAYOUTS.items():
        different = [name for name in {**saved[key], **current[key]} if saved[key].get(name) != current[key].get(name)]
        if different:
            raise ValueError(
                f"The checkpoint in {directory} does not fit this model: {len(different)} {kind} differ in name, dtype "
                f"or shape, for example {min(different)}."
            )
    if saved["frozen_sha256"] != current["frozen_sha256"]:
        raise ValueError(
            f"The checkpoint in {directory} was made with another model: the values of its frozen parameters differ."
        )
    return accepted


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


def _stem(step: int) -> str:
    return f"step-{step:08d}"


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _delete_all_but(folder: Path, kept_stems: set[str]) -> None:
    """Delete checkpoints, and what interrupted writing and deleting left of others."""
    stems = {match[1] for match in map(_OWN_FILE.fullmatch, _names(folder)) if match}
    for stem in sorted(stems - kept_stems):
        storage.delete_tensor_files(folder, stem)
        shutil.rmtree(folder / f".{stem}.partial", ignore_errors=True)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors' values in the order of their names, one tensor at a time."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(full_tensor(tensor).cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and shape by name, such as "float32 [320, 4, 3, 3]"."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """The entries in which two settings differ, by name, as text with their values or keys where these are short."""
    changes = {}
    for name in sorted({**saved, **current}):
        before, now = saved.get(name), current.get(name)
        if before != now:
            details = f" ({before!r} then, {now!r} now)"
            if len(details) >= 60 and isinstance(before, Mapping) and isinstance(now, Mapping):
                # Of the digests of data, a user wants to know the tasks.
                details = f" ({', '.join(key for key in {**before, **now} if before.get(key) != now.get(key))})"
            changes[name] = name + (details if len(details) < 60 else "")
    return changes
