"""A cache of encoded images and prompts: one file a row, so that one bad file never spoils the others.

A key is a digest of everything that determines an entry, so no entry is ever out of date. The keys are made elsewhere.
"""

import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mtu import storage

__all__ = ["EncodedCache"]

_KEY = re.compile(r"[0-9a-f]{32,128}")
_SECONDS_OF_A_WRITE = 3600  # at most


class EncodedCache:
    """Tensors by key, in a folder or in memory.

    Threads and processes may share a folder. A damaged file counts as missing, and the next `put` of its key writes it
    anew. Files spread over 256 subfolders, `DIRECTORY/ab/abcdef….safetensors`, because some file systems are slow with
    large folders.

    A cache in memory belongs to its process: a worker process gets a copy, and its `put` reaches nobody else.

    Args:
        directory: the folder, made if it does not exist; None: in memory.

    Raises:
        ValueError: the directory is a file.
        OSError: the directory cannot be made.

    Example:
        >>> cache = EncodedCache(Path("cache/latents"))
        >>> key = hashlib.sha256(b"what determines the entry").hexdigest()
        >>> cache.put(key, {"latents": torch.zeros(4, 64, 64)})
        >>> cache.get(key)["latents"].shape
        torch.Size([4, 64, 64])
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = None if directory is None else storage.make_folder(directory)
        self._in_memory: dict[str, dict[str, Tensor]] = {}
        self._damaged_keys: set[str] = set()
        self._tidied: set[Path] = set()

    @property
    def damaged(self) -> int:
        """How many damaged files `get` met in this process."""
        return len(self._damaged_keys)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key on the CPU, or None if they are missing or damaged.

        Tensors of a cache in memory are shared, so the caller must not change them.
        """
        if self.directory is None:
            found = self._in_memory.get(_checked(key))
            return None if found is None else dict(found)
        path = self._path(key)
        try:
            tensors, metadata = storage.read_tensors(path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            self._damaged_keys.add(key)
            return None
        if metadata != {"key": key}:  # somebody renamed the file
            self._damaged_keys.add(key)
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a key.

        Raises:
            OSError: the file cannot be written.
        """
        if self.directory is None:
            self._in_memory[_checked(key)] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            return
        path = self._path(key)
        if path.parent not in self._tidied:
            path.parent.mkdir(parents=True, exist_ok=True)
            _delete_abandoned_files(path.parent)
            self._tidied.add(path.parent)
        # A power cut may damage the newest files, which `get` notices: waiting for the disk is not worth its time.
        storage.write_tensors(path, tensors, {"key": key}, durable=False)

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry. Only `get` finds out whether its file is damaged."""
        return _checked(key) in self._in_memory if self.directory is None else self._path(key).is_file()

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / _checked(key)[:2] / f"{key}.safetensors"


def _checked(key: str) -> str:
    """The key, which must be safe as the name of a file."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"A key is a digest of 32 to 128 hexadecimal digits, but got {key!r}.")
    return key


def _delete_abandoned_files(folder: Path) -> None:
    """Delete the incomplete files of processes that were killed, but none that another process may be writing."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _SECONDS_OF_A_WRITE:
                path.unlink()
