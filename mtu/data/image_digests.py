"""SHA-256 digests of files, remembered by size and time of modification as in git's index.

With them, encoded images are found again in a cache without reading any image.
"""

import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch

from mtu import storage

__all__ = ["ImageDigests"]

logger = logging.getLogger(__name__)

# A file may be changed twice within one tick of a file system's clock, and look the same. No tick is longer than this.
_NANOSECONDS_OF_A_TICK = 2 * 10**9
_SECONDS_BETWEEN_SAVES = 30


class ImageDigests:
    """The SHA-256 of files, each read once for as long as its size and time of modification stay.

    Args:
        path: a file that keeps the digests for later processes; its folder is made if it does not exist. None: memory
            alone keeps them. Several processes may use one file. Whatever one of them loses is computed again. The file
            is written every half minute that brings new digests, and by `save`.

    Example:
        >>> digests = ImageDigests(Path("cache/image-digests.safetensors"))
        >>> digests.of(Path("photo.jpg"))  # reads the photo
        >>> digests.of(Path("photo.jpg"))  # asks the file system for its size and time
        >>> digests.save()
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._entries: dict[str, tuple[int, int, bytes]] | None = None
        self._unsaved = 0
        self._last_save = time.monotonic()

    def of(self, file: Path) -> str:
        """Return the SHA-256 of a file's contents in hexadecimal digits.

        Raises:
            OSError: the file cannot be read.
        """
        if self._entries is None:
            self._entries = self._load()
        name, state = os.path.abspath(file), os.stat(file)
        size, modified, digest = self._entries.get(name, (-1, -1, b""))
        if (size, modified) == (state.st_size, state.st_mtime_ns):
            return digest.hex()
        with open(file, "rb") as contents:
            digest = hashlib.file_digest(contents, "sha256").digest()
        if time.time_ns() - state.st_mtime_ns > _NANOSECONDS_OF_A_TICK:
            self._entries[name] = state.st_size, state.st_mtime_ns, digest
            self._unsaved += 1
            if time.monotonic() - self._last_save >= _SECONDS_BETWEEN_SAVES:
                self._try_to_save()
        return digest.hex()

    def save(self) -> None:
        """Write the new digests into the file, beside those that other processes wrote.

        Raises:
            OSError: the file cannot be written.
        """
        if self.path is None or self._entries is None or not self._unsaved:
            return
        storage.make_folder(self.path.parent)
        entries = {**self._load(), **self._entries}
        tensors = {
            "names": _as_bytes(b"\0".join(map(os.fsencode, entries))),
            "sizes": torch.tensor([size for size, _, _ in entries.values()], dtype=torch.int64),
            "times": torch.tensor([modified for _, modified, _ in entries.values()], dtype=torch.int64),
            "digests": _as_bytes(b"".join(digest for _, _, digest in entries.values())),
        }
        storage.write_tensors(self.path, tensors, {"entries": len(entries)})
        self._entries, self._unsaved = entries, 0

    def _try_to_save(self) -> None:
        self._last_save = time.monotonic()
        try:
            self.save()
        except OSError as error:  # a training that needs no file now should go on
            logger.warning("%s The digests stay in memory.", error)

    def _load(self) -> dict[str, tuple[int, int, bytes]]:
        if self.path is None:
            return {}
        try:
            tensors, metadata = storage.read_tensors(self.path)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            logger.warning("%s All digests are computed again.", error)
            return {}
        if not metadata["entries"]:
            return {}
        names = map(os.fsdecode, tensors["names"].numpy().tobytes().split(b"\0"))
        digests = tensors["digests"].numpy().tobytes()
        rows = (digests[start : start + 32] for start in range(0, len(digests), 32))
        return dict(
            zip(names, zip(tensors["sizes"].tolist(), tensors["times"].tolist(), rows, strict=True), strict=True)
        )


def _as_bytes(contents: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(contents, dtype=np.uint8).copy())
