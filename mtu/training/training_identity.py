"""What makes two trainings the same: a checkpoint describes its training by it, and no other training is resumed."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtu.training.objective import Objective
from mtu.training.trainer_config import TrainerConfig

__all__ = ["check_same_training", "describe_training", "sha256_of_tensors"]

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


def describe_training(objective: Objective, config: TrainerConfig) -> dict[str, Any]:
    """Describe a training as JSON: its settings, and the layout of its weights.

    Args:
        objective: the objective, whose weights are in the memory of this process.
        config: the settings of the training.

    Returns:
        The settings of the trainer ("config") and of the objective ("settings"), dtype and shape of each weight that is
        trained ("trained") and frozen ("frozen"), and the digest of the frozen ones ("frozen_sha256").
    """
    parameters = dict(objective.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    description = {
        "config": dataclasses.asdict(config),
        "settings": objective.settings,
        "trained": _layout({name: p for name, p in parameters.items() if p.requires_grad}),
        "frozen": _layout(frozen),
        "frozen_sha256": sha256_of_tensors(frozen),
    }
    # Values go through JSON, so that tuples equal the lists that they become in a file.
    return json.loads(json.dumps(description))


def check_same_training(saved: Mapping[str, Any], current: Mapping[str, Any], directory: Path) -> None:
    """Raise a ValueError unless a checkpoint belongs to this training.

    Args:
        saved: the description in the checkpoint.
        current: the description of this training.
        directory: the folder of the training, for the message.
    """
    changeable = set(_CHANGEABLE)
    if current["config"]["schedule"] == "constant":
        changeable.add("steps")
    changes = [c for c in _changes(saved["config"], current["config"]) if c.partition(" ")[0] not in changeable]
    changes += _changes(saved["settings"], current["settings"])
    if changes:
        raise ValueError(f"The checkpoint in {directory} was made with another {', '.join(changes)}.")
    for key, kind in (("trained", "trained parameters"), ("frozen", "frozen parameters")):
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


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of names and values of tensors on any device, one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and shape by name, such as "float32 [320, 4, 3, 3]"."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The entries in which two settings differ, with their values where they are short."""
    changes = []
    for name in sorted({**saved, **current}):
        before, now = saved.get(name), current.get(name)
        if before != now:
            values = f" ({before!r} then, {now!r} now)"
            changes.append(name + (values if len(values) < 60 else ""))
    return changes
