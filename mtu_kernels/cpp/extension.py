"""The extension that `csrc` is compiled to: where it is found, and which instruction sets ("levels") it has here."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import NamedTuple

import torch


class LoadedExtension(NamedTuple):
    """The result of loading the extension.

    Attributes:
        instruction_sets: the instruction sets that it has kernels for and this machine runs, the fastest first.
        why_not_loaded: the reason why it could not be loaded, as a clause; or ``None``.
    """

    instruction_sets: tuple[str, ...]
    why_not_loaded: str | None


def load_extension(folder: Path) -> LoadedExtension:
    """Loads the extension from a folder, which registers its kernels. Failures are returned, never raised."""
    paths = sorted([*folder.glob("_C*.so"), *folder.glob("_C*.dylib")])
    if not paths:
        return LoadedExtension(
            (), "its extension was not built when mtu was installed: a compiler or torch was missing"
        )
    try:
        torch.ops.load_library(paths[0])
        name_of = ctypes.CDLL(str(paths[0])).mtu_level_name
    except (OSError, AttributeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0].removeprefix(f"{paths[0]}: ")
        return LoadedExtension(
            (), f"its extension does not load with torch {torch.__version__} ({reason}); reinstall mtu"
        )
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    names = itertools.takewhile(lambda name: name is not None, map(name_of, itertools.count()))
    return LoadedExtension(tuple(name.decode() for name in names), None)


# setup.py installs it as mtu_kernels/_C.
EXTENSION = load_extension(Path(__file__).parents[1])
