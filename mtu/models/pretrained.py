"""Saving and loading whole models as diffusers does, made strict: safetensors alone, and a file is whole or refused."""

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

__all__ = ["check_safetensors_only", "load_strictly", "save_atomically"]

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def check_safetensors_only(given: Mapping[str, Any]) -> None:
    """Raise a ValueError if the arguments of diffusers' `save_pretrained` ask for another format than safetensors."""
    if not given.get("safe_serialization", True) or given.get("use_flashpack", False):
        raise ValueError("Only safetensors files are saved, but got safe_serialization=False or use_flashpack=True.")


def save_atomically(save: Callable[..., None], given: dict[str, Any]) -> None:
    """diffusers' `save_pretrained` made whole: cut off anywhere, the older or the newer model loads.

    Shards and the index of an older model go, too: diffusers deletes the one and would load by the other.

    Args:
        save: the inherited `save_pretrained`.
        given: its arguments by name.

    Raises:
        ValueError: another format than safetensors, or the directory is a file.
    """
    check_safetensors_only(given)
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
    with storage.atomic_replacement(given["save_directory"], re.compile(weights)) as folder:
        save(str(folder), **rest, **extra)


def load_strictly(cls: type, load: Callable[..., Any], path: str | os.PathLike, kwargs: dict[str, Any]):
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
    model.conv_in.update_channel_counts_()
    model.freeze_stock_parameters_()
    return (model, info) if output_loading_info else model


def _check_shards(folder: Path) -> None:
    # diffusers would unpickle a shard of another file type, if the index of a safetensors checkpoint names one.
    for index in folder.glob("*.safetensors.index*.json"):
        for name in json.loads(index.read_text())["weight_map"].values():
            if not name.endswith(".safetensors"):
                raise ValueError(f"only safetensors files are loaded, but {index.name} names {name!r}")
