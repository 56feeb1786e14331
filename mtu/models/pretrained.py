"""Saving and loading of whole models as in diffusers, but only as safetensors, atomically, and with strict checks.

The files of one task or of the trained parameters live in `mtu.models.partial_checkpoints`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from mtu import storage

__all__ = ["check_saves_safetensors", "load_strictly", "save_atomically"]

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def check_saves_safetensors(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if the arguments of diffusers' `save_pretrained` ask for another format than safetensors."""
    if not arguments.get("safe_serialization", True) or arguments.get("use_flashpack", False):
        raise ValueError("Only safetensors files are saved, but got safe_serialization=False or use_flashpack=True.")


def save_atomically(save: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Call diffusers' `save_pretrained` so that after an interruption the older or the newer model loads.

    This also deletes the shards and the index of an older model. diffusers deletes the shards alone, and would then
    load by the index.

    Args:
        save: the inherited `save_pretrained`.
        arguments: its arguments by name.

    Raises:
        ValueError: the arguments ask for another format than safetensors, or the directory is a file.
    """
    check_saves_safetensors(arguments)
    rest = {key: value for key, value in arguments.items() if key not in ("save_directory", "kwargs")}
    extra = dict(arguments.get("kwargs", {}))
    if not arguments.get("is_main_process", True):
        # Processes other than the main one write their files directly, as diffusers does.
        save(arguments["save_directory"], **rest, **extra)
        return
    if arguments.get("push_to_hub", False):
        extra.setdefault("repo_id", Path(arguments["save_directory"]).name)
    variant = re.escape(f".{arguments['variant']}") if arguments.get("variant") else ""
    stem = re.escape(Path(SAFETENSORS_WEIGHTS_NAME).stem)
    weights = rf"{stem}{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors|{stem}\.safetensors\.index{variant}\.json"
    with storage.atomic_replacement(arguments["save_directory"], re.compile(weights)) as folder:
        save(str(folder), **rest, **extra)


def load_strictly(cls: type, load: Callable[..., Any], path: str | os.PathLike, kwargs: dict[str, Any]):
    """Call diffusers' `from_pretrained`, and refuse missing, surplus and misshapen tensors.

    Args:
        cls: the model class.
        load: the inherited `from_pretrained`.
        path: a folder or the name of a repository on the Hub.
        kwargs: the other arguments of `from_pretrained`.

    Returns:
        The model; with `output_loading_info`, also diffusers' report.

    Raises:
        ValueError: the checkpoint is of another architecture, or a file is truncated or altered.
    """
    output_loading_info = kwargs.pop("output_loading_info", False)
    if kwargs.pop("use_safetensors", True) is False:
        raise ValueError("Only safetensors files are loaded, but got use_safetensors=False.")
    if kwargs.get("low_cpu_mem_usage") is False:
        # This argument only affects how much memory loading takes. diffusers refuses it for models that keep some
        # tensors in float32.
        del kwargs["low_cpu_mem_usage"]
    if os.path.isdir(path):
        storage.finish_replacement(Path(path, kwargs.get("subfolder") or ""))
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
        # Failures of the network and full devices are not the fault of the files.
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and not os.path.isdir(path)):
            raise
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"{path} is not a complete checkpoint of an upcycled UNet, or these arguments cannot load it: {reason}."
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
    model.conv_in.move_channel_counts_to_own_device_()
    model.freeze_stock_parameters_()
    return (model, info) if output_loading_info else model


def _check_shards(folder: Path) -> None:
    # If the index of a safetensors checkpoint names a shard of another file type, diffusers would unpickle it.
    for index in folder.glob("*.safetensors.index*.json"):
        for name in json.loads(index.read_text())["weight_map"].values():
            if not name.endswith(".safetensors"):
                raise ValueError(f"only safetensors files are loaded, but {index.name} names {name!r}")
