"""Saving and loading of parts, and strict loading of whole models: safetensors and JSON, never pickle."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from mtu import storage
from mtu.compat import in_memory
from mtu.experts import ExpertConfig, stock_config
from mtu.models import task_rows
from mtu.tasks import TaskSpec, as_task_specs

if TYPE_CHECKING:
    from mtu.models.unet import MTUUNet2DConditionModel

__all__ = [
    "check_format",
    "check_tensors",
    "load_pretrained",
    "load_task",
    "read_trained",
    "save_pretrained",
    "save_task",
    "save_trained",
]

# How the names of files begin. A task's own name follows the first one and a dot; earlier versions left it out.
_TASK, _TRAINED = "mtu_task", "mtu_trained"

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")

# Of the stock configuration, what decides which tensors there are and what they mean.
_IGNORED_CONFIG = {"sample_size"}


def save_task(unet: "MTUUNet2DConditionModel", directory: str | os.PathLike, index: int) -> None:
    """Write the rows that task id `index` owns, and its spec; other tasks' files in the folder stay."""
    spec = unet.tasks[index]
    rows = task_rows.get_task_rows(unet, index)
    rows["conv_in.weight"] = rows["conv_in.weight"][:, : unet.conv_in.latent_channels + spec.condition_channels]
    description = {"task": spec.to_dict(), "architecture": _architecture(unet)}
    storage.write(directory, f"{_TASK}.{spec.name}", rows, description)
    if _saved_tasks(directory, named=False).get(spec.name) == _TASK:
        storage.remove(directory, _TASK)


def load_task(
    unet: "MTUUNet2DConditionModel", directory: str | os.PathLike, replace: bool, name: str | None = None
) -> int:
    """Read what `save_task` wrote into a new task, or over the one of that name; returns its id."""
    task_rows.check_surgery(unet, "load_task")
    description, rows = storage.read(directory, _task_stem(directory, name))
    spec = TaskSpec.from_dict(_entry(description, "task", directory))
    _check_architecture(description, _architecture(unet), directory)
    expected = {name: row.shape for name, row in task_rows.get_task_rows(unet, 0).items()}
    conv = expected["conv_in.weight"]
    width = unet.conv_in.latent_channels + spec.condition_channels
    expected["conv_in.weight"] = torch.Size((conv[0], width, *conv[2:]))
    _check_shapes(expected, rows, directory)
    names = [task.name for task in unet.tasks]
    if spec.name not in names:
        index = task_rows.add_task(unet, spec, 0)
    elif not replace:
        raise ValueError(f"A task named {spec.name!r} exists already: pass replace=True to overwrite it.")
    elif unet.tasks[names.index(spec.name)].condition_channels != spec.condition_channels:
        raise ValueError(
            f"Task {spec.name!r} has {unet.tasks[names.index(spec.name)].condition_channels} condition channels here, "
            f"but {spec.condition_channels} in {directory}."
        )
    else:
        index = names.index(spec.name)
        tasks = [spec if i == index else task for i, task in enumerate(unet.tasks)]
        unet.register_to_config(tasks=[task.to_dict() for task in tasks])
    task_rows.set_task_rows_(unet, index, rows)
    return index


def _saved_tasks(directory: str | os.PathLike, *, named: bool = True) -> dict[str, str]:
    """How the files of each task in a folder begin, by the task's name; `named`: whether it is in the files' names."""
    folder, stems = Path(directory), {}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        stems[json.loads((folder / f"{_TASK}.json").read_text(encoding="utf-8"))["task"]["name"]] = _TASK
    for path in sorted(folder.glob(f"{_TASK}.*.json")) if named else ():
        stems[path.name.removeprefix(f"{_TASK}.").removesuffix(".json")] = path.stem
    return stems


def _task_stem(directory: str | os.PathLike, name: str | None) -> str:
    """How the files of the task to load begin: that of the given name, or the only one."""
    stems = _saved_tasks(directory)
    if name is None and len(stems) > 1:
        raise ValueError(f"{directory} holds the tasks {sorted(stems)}: pass name=… to say which of them to load.")
    if name is not None and name not in stems:
        raise ValueError(f"{directory} holds no task {name!r}: it holds {sorted(stems)}.")
    return stems[name] if name is not None else next(iter(stems.values()), _TASK)


def save_trained(unet: "MTUUNet2DConditionModel", directory: str | os.PathLike) -> None:
    """Write the trained parameters alone, with what is needed to rebuild the model over its base.

    Raises:
        ValueError: the routers were dropped, adapters are loaded, or weights are quantized or on the meta device.
    """
    if unet.task_embedding is None:
        raise ValueError("Trained parameters include the routers, which were dropped: expected a model with routers.")
    in_memory.check_plain(unet, "save_trained")
    in_memory.check_values(unet, "save_trained")
    tensors = in_memory.read_tensors(unet, {name for name, _ in unet.named_trainable_parameters()})
    description = {
        "tasks": [spec.to_dict() for spec in unet.tasks],
        "experts": dataclasses.asdict(unet.expert_config),
        "base": _json_config(stock_config(unet)),
    }
    storage.write(directory, _TRAINED, tensors, description)


def read_trained(
    directory: str | os.PathLike, base: Mapping[str, Any]
) -> tuple[tuple[TaskSpec, ...], ExpertConfig, dict[str, Tensor]]:
    """Read what `save_trained` wrote, for a base UNet of the stock configuration `base`.

    Raises:
        ValueError: another base, or a truncated or altered file.
    """
    description, tensors = storage.read(directory, _TRAINED)
    _check_equal_config(_entry(description, "base", directory), _json_config(base), directory)
    specs = as_task_specs(_entry(description, "tasks", directory))
    try:
        config = ExpertConfig(**_entry(description, "experts", directory))
    except TypeError as error:
        raise ValueError(f"{directory} describes no expert layout that this version knows: {error}.") from None
    return specs, config, tensors


def check_tensors(unet: "MTUUNet2DConditionModel", tensors: Mapping[str, Tensor], directory: str | os.PathLike) -> None:
    """Raise a ValueError unless `tensors` are the trained parameters of `unet`, by name and shape."""
    _check_shapes({name: p.shape for name, p in unet.named_trainable_parameters()}, tensors, directory)


def check_format(given: Mapping[str, Any]) -> None:
    """Raise a ValueError if the arguments of diffusers' `save_pretrained` ask for another format than safetensors."""
    if not given.get("safe_serialization", True) or given.get("use_flashpack", False):
        raise ValueError("Only safetensors files are saved, but got safe_serialization=False or use_flashpack=True.")


def save_pretrained(save: Callable[..., None], given: dict[str, Any]) -> None:
    """diffusers' `save_pretrained` made whole: cut off anywhere, the older or the newer model loads.

    Shards and the index of an older model go, too: diffusers deletes the one and would load by the other.

    Args:
        save: the inherited `save_pretrained`.
        given: its arguments by name.

    Raises:
        ValueError: another format than safetensors, or the directory is a file.
    """
    check_format(given)
    rest = {key: value for key, value in given.items() if key not in ("save_directory", "kwargs")}
    extra = dict(given.get("kwargs", {}))
    if not given.get("is_main_process", True):
        # Other processes write what diffusers has them write, where the main one does not get in their way.
        save(given["save_directory"], **rest, **extra)
        return
    if given.get("push_to_hub", False):
        extra.setdefault("repo_id", Path(given["save_directory"]).name)
    variant = re.escape(f".{given['variant']}") if given.get("variant") else ""
    stem = re.escape(Path(SAFETENSORS_WEIGHTS_NAME).stem)
    weights = rf"{stem}{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors|{stem}\.safetensors\.index{variant}\.json"
    with storage.replacing(given["save_directory"], re.compile(weights)) as folder:
        save(str(folder), **rest, **extra)


def load_pretrained(cls: type, load: Callable[..., Any], path: str | os.PathLike, kwargs: dict[str, Any]):
    """diffusers' `from_pretrained` made strict: a missing, surplus or misshapen tensor is an error.

    Args:
        cls: the model class.
        load: the inherited `from_pretrained`.
        path: folder or hub name.
        kwargs: of `from_pretrained`.
    """
    output_loading_info = kwargs.pop("output_loading_info", False)
    if kwargs.pop("use_safetensors", True) is False:
        raise ValueError("Only safetensors files are loaded, but got use_safetensors=False.")
    if kwargs.get("low_cpu_mem_usage") is False:
        # Only how much memory loading takes; diffusers refuses it for models that keep some tensors in float32.
        del kwargs["low_cpu_mem_usage"]
    if os.path.isdir(path):
        storage.finish(Path(path, kwargs.get("subfolder") or ""))
    config = cls.load_config(path, **{key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs})
    saved_class = config.get("_class_name")
    if saved_class != cls.__name__:
        raise ValueError(
            f"{path} holds a {saved_class}, but an upcycled {cls.__name__} is expected: load a stock UNet with its own "
            "class and pass it to mtu.upcycle."
        )
    try:
        if os.path.isdir(path):
            _check_shards(Path(path, kwargs.get("subfolder") or ""))
        model, info = load(path, use_safetensors=True, output_loading_info=True, **kwargs)
    except (SafetensorError, LookupError, AttributeError, TypeError, RuntimeError, ValueError, OSError) as error:
        # The network or a full device is no fault of the files.
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and not os.path.isdir(path)):
            raise
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"{path} is not a whole checkpoint of an upcycled UNet, or cannot be loaded as asked: {reason}."
        ) from error
    wrong = {kind: sorted(map(str, info.get(f"{kind}_keys", []))) for kind in ("missing", "unexpected", "mismatched")}
    for kind, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{path} is a checkpoint of another architecture than its config.json says: {len(keys)} {kind} "
                f"tensors, for example {keys[0]}."
            )
    if any(parameter.is_meta for parameter in model.parameters()) and "device_map" not in kwargs:
        raise ValueError(f"{path} lacks parameters of the architecture in its config.json.")
    model.conv_in.place_channels_()
    model.freeze_stock_parameters_()
    return (model, info) if output_loading_info else model


def _check_shards(folder: Path) -> None:
    # diffusers would unpickle a shard of another file type, if the index of a safetensors checkpoint names one.
    for index in folder.glob("*.safetensors.index*.json"):
        for name in json.loads(index.read_text())["weight_map"].values():
            if not name.endswith(".safetensors"):
                raise ValueError(f"only safetensors files are loaded, but {index.name} names {name!r}")


def _entry(description: Any, key: str, directory: str | os.PathLike) -> Any:
    if not isinstance(description, dict) or key not in description:
        raise ValueError(f"The description in {directory} lacks the entry {key!r}.")
    return description[key]


def _json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in _IGNORED_CONFIG}))


def _architecture(unet: "MTUUNet2DConditionModel") -> dict[str, Any]:
    """What two models must share for a task's rows to fit both."""
    return {
        "base": _json_config(stock_config(unet)),
        "experts": dataclasses.asdict(unet.expert_config),
        "routers_dropped": unet.task_embedding is None,
    }


def _check_architecture(description: dict, own: dict[str, Any], directory: str | os.PathLike) -> None:
    saved = _entry(description, "architecture", directory)
    _check_equal_config(_entry(saved, "base", directory), own["base"], directory)
    for key in ("experts", "routers_dropped"):
        if _entry(saved, key, directory) != own[key]:
            raise ValueError(f"{directory} was saved with {key} = {saved[key]}, but this model has {own[key]}.")


def _check_equal_config(saved: Mapping[str, Any], own: Mapping[str, Any], directory: str | os.PathLike) -> None:
    for key in sorted(set(saved) | set(own)):
        # A key that only one side has comes with another version of diffusers, at its default.
        if key in saved and key in own and saved[key] != own[key]:
            raise ValueError(
                f"{directory} belongs to another architecture: its {key} is {saved[key]}, this model's is {own[key]}."
            )


def _check_shapes(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], directory: str | os.PathLike
) -> None:
    for name in sorted(set(expected) ^ set(tensors)):
        state = "lacks" if name in expected else "has the surplus tensor"
        raise ValueError(f"{directory} {state} {name!r}: expected {len(expected)} tensors of this architecture.")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{directory}: {name!r} must have shape {tuple(shape)}, but got {tuple(tensors[name].shape)}."
            )
