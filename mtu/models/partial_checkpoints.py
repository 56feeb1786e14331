"""The files of one task and of the trained parameters: safetensors and JSON, without the frozen weights.

The model decides which tensors go into a file. Whole models are saved by `mtu.models.pretrained`.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtu import storage
from mtu.experts import ExpertConfig
from mtu.tasks import TaskSpec, as_task_specs

__all__ = [
    "ModelArchitecture",
    "check_tensor_names_and_shapes",
    "read_task_checkpoint",
    "read_tasks_layout_and_trained_parameters",
    "write_task_checkpoint",
    "write_tasks_layout_and_trained_parameters",
]

# The file names begin with these. A dot and the task's name follow the first one; earlier versions left them out.
_TASK, _TRAINED = "mtu_task", "mtu_trained"

# These entries of the stock configuration affect neither the set of tensors nor their meaning.
_IGNORED_CONFIG = {"sample_size"}


class ModelArchitecture(NamedTuple):
    """The settings that two models must share for the rows of a task to fit both.

    Args:
        stock_config: the configuration of the base UNet.
        expert_config: the expert layout.
        routers_dropped: whether the model has routing tables in the place of routers.
    """

    stock_config: dict[str, Any]
    expert_config: ExpertConfig
    routers_dropped: bool

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, under the keys of the files."""
        return {
            "base": _json_config(self.stock_config),
            "experts": dataclasses.asdict(self.expert_config),
            "routers_dropped": self.routers_dropped,
        }


def write_task_checkpoint(
    directory: str | os.PathLike, spec: TaskSpec, rows: dict[str, Tensor], architecture: ModelArchitecture
) -> None:
    """Write the rows of one task and its spec; the files of other tasks in the folder stay.

    Args:
        directory: the folder; made if it does not exist.
        spec: the task.
        rows: the task's rows, by the names of the parameters.
        architecture: of the model that the rows are from.
    """
    description = {"task": spec.to_dict(), "architecture": architecture.to_dict()}
    storage.write_description_and_tensors(directory, f"{_TASK}.{spec.name}", rows, description)
    if _saved_tasks(directory, named=False).get(spec.name) == _TASK:
        storage.delete_tensor_files(directory, _TASK)


def read_task_checkpoint(
    directory: str | os.PathLike, name: str | None, architecture: ModelArchitecture
) -> tuple[TaskSpec, dict[str, Tensor]]:
    """Read what `write_task_checkpoint` wrote.

    Args:
        directory: the folder.
        name: the task to read; None: the only one of the folder.
        architecture: of the model that the rows are for.

    Returns:
        The task, and its rows by the names of the parameters.

    Raises:
        ValueError: the rows are from another architecture, a file is truncated or altered, or the task is not there.
    """
    description, rows = storage.read_description_and_tensors(directory, _task_stem(directory, name))
    spec = TaskSpec.from_dict(_entry(description, "task", directory))
    _check_architecture(description, architecture.to_dict(), directory)
    return spec, rows


def _saved_tasks(directory: str | os.PathLike, *, named: bool = True) -> dict[str, str]:
    """The stem of each task's files in a folder, by the task's name.

    Args:
        named: whether to include the files that have the task's name in theirs.
    """
    folder, stems = Path(directory), {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        stems[json.loads((folder / f"{_TASK}.json").read_text(encoding="utf-8"))["task"]["name"]] = _TASK
    for path in sorted(folder.glob(f"{_TASK}.*.json")) if named else ():
        stems[path.name.removeprefix(f"{_TASK}.").removesuffix(".json")] = path.stem
    return stems


def _task_stem(directory: str | os.PathLike, name: str | None) -> str:
    """The stem of the files of the named task, or of the only one."""
    stems = _saved_tasks(directory)
    if name is None and len(stems) > 1:
        raise ValueError(f"{directory} holds the tasks {sorted(stems)}: pass name=… to say which of them to load.")
    if name is not None and name not in stems:
        raise ValueError(f"{directory} holds no task {name!r}: it holds {sorted(stems)}.")
    return stems[name] if name is not None else next(iter(stems.values()), _TASK)


def write_tasks_layout_and_trained_parameters(
    directory: str | os.PathLike,
    specs: tuple[TaskSpec, ...],
    config: ExpertConfig,
    base_config: Mapping[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Write the trained parameters, with the settings that rebuild the model.

    Args:
        directory: the folder; made if it does not exist.
        specs: the tasks.
        config: the expert layout.
        base_config: the stock configuration of the UNet that was upcycled.
        tensors: the trained parameters, by name.
    """
    description = {
        "tasks": [spec.to_dict() for spec in specs],
        "experts": dataclasses.asdict(config),
        "base": _json_config(base_config),
    }
    storage.write_description_and_tensors(directory, _TRAINED, tensors, description)


def read_tasks_layout_and_trained_parameters(
    directory: str | os.PathLike, base_config: Mapping[str, Any]
) -> tuple[tuple[TaskSpec, ...], ExpertConfig, dict[str, Tensor]]:
    """Read what `write_tasks_layout_and_trained_parameters` wrote.

    Args:
        directory: the folder that it wrote into.
        base_config: the stock configuration of the base UNet.

    Returns:
        The tasks, the expert layout, and the parameters by name.

    Raises:
        ValueError: the parameters are of another base UNet, or a file is truncated or altered.
    """
    description, tensors = storage.read_description_and_tensors(directory, _TRAINED)
    _check_equal_config(_entry(description, "base", directory), _json_config(base_config), directory)
    specs = as_task_specs(_entry(description, "tasks", directory))
    try:
        config = ExpertConfig(**_entry(description, "experts", directory))
    except TypeError as error:
        raise ValueError(f"{directory} describes no expert layout that this version knows: {error}.") from None
    return specs, config, tensors


def _entry(description: Any, key: str, directory: str | os.PathLike) -> Any:
    if not isinstance(description, dict) or key not in description:
        raise ValueError(f"The description in {directory} lacks the entry {key!r}.")
    return description[key]


def _json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in _IGNORED_CONFIG}))


def _check_architecture(description: dict, own: dict[str, Any], directory: str | os.PathLike) -> None:
    saved = _entry(description, "architecture", directory)
    _check_equal_config(_entry(saved, "base", directory), own["base"], directory)
    for key in ("experts", "routers_dropped"):
        if _entry(saved, key, directory) != own[key]:
            raise ValueError(f"{directory} was saved with {key} = {saved[key]}, but this model has {own[key]}.")


def _check_equal_config(saved: Mapping[str, Any], own: Mapping[str, Any], directory: str | os.PathLike) -> None:
    for key in sorted(set(saved) | set(own)):
        # A key that only one side has was added by another version of diffusers, and has its default value there.
        if key in saved and key in own and saved[key] != own[key]:
            raise ValueError(
                f"{directory} belongs to another architecture: its {key} is {saved[key]}, this model's is {own[key]}."
            )


def check_tensor_names_and_shapes(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], directory: str | os.PathLike
) -> None:
    """Raise a ValueError unless the tensors of a folder have these names and shapes."""
    for name in sorted(set(expected) ^ set(tensors)):
        state = "lacks" if name in expected else "has the surplus tensor"
        raise ValueError(f"{directory} {state} {name!r}: expected {len(expected)} tensors of this architecture.")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{directory}: {name!r} must have shape {tuple(shape)}, but got {tuple(tensors[name].shape)}."
            )
