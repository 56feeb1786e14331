"""`ImageFolder`: the training examples of one task in a folder with images and a `metadata.jsonl`.

Hugging Face's `datasets.load_dataset("imagefolder", data_dir=…)` reads the same folders. `mtu.data.metadata_rows` has
the rules of a row, and `mtu.data.checking` finds every fault of a folder.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtu.data.image_digests import ImageDigests
from mtu.data.image_files import read_image
from mtu.data.metadata_rows import METADATA_NAME, Variant, nonempty_lines, parse_row
from mtu.data.task_dataset import ExampleImages
from mtu.tasks import TaskSpec

__all__ = ["ImageFolder", "read_metadata"]


class ImageFolder:
    """The training examples of one task: a folder with images and a `metadata.jsonl`, of which each line is a row.

        {"target_file_name": "after/1.png", "condition_file_name": "before/1.png", "prompt": "make it blue"}

    The object keeps the text of `metadata.jsonl` and reads images when they are asked for. It may be pickled. It never
    writes into the folder.

    Args:
        directory: the folder.
        task: the task that the rows are examples of.
        digests: remembers the digests of the images for later processes; None: this object alone remembers them.

    Raises:
        ValueError: the folder has no `metadata.jsonl`, or a row has a fault. The message names the first one.

    Example:
        >>> edits = ImageFolder("data/edit", mtu.tasks.EDIT)
        >>> edits.prompts(0)
        [('make it blue',)]
    """

    def __init__(self, directory: str | os.PathLike, task: TaskSpec, digests: ImageDigests | None = None) -> None:
        self.directory, self.task = Path(directory), task
        self._digests = ImageDigests() if digests is None else digests
        # One string and one array cost worker processes no copies, unlike an object for each row.
        self._contents = read_metadata(self.directory)
        self._lines = np.array(list(nonempty_lines(self._contents)), dtype=np.int64).reshape(-1, 3)
        if not len(self._lines):
            raise ValueError(f"{self.directory / METADATA_NAME} has no rows.")
        for row in range(len(self)):
            _, faults = self._parse(row)
            if faults:
                raise ValueError(f"{self.describe_row(row)}: the row {faults[0]} `mtu data check` lists all faults.")

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._lines)

    def prompts(self, row: int) -> Sequence[Sequence[str]]:
        """The interchangeable prompts of each variant of a row; an empty string for tasks without a prompt."""
        return [variant.prompts for variant in self._parse(row)[0]]

    def load_images(self, row: int, variant: int) -> ExampleImages:
        """Load the images of a variant as upright RGB images (see `read_image`).

        Raises:
            ValueError: an image cannot be read; the message names the row and the file.
        """
        try:
            target, condition = self._files(row, variant)
            return ExampleImages(read_image(target), None if condition is None else read_image(condition))
        except ValueError as error:
            raise ValueError(f"{self.describe_row(row)}: {error}") from None

    def image_digest(self, row: int, variant: int) -> str:
        """The SHA-256 of the digests of a variant's files.

        Raises:
            ValueError: a file cannot be read; the message names the row and the file.
        """
        try:
            digests = [self._digests.of(file) for file in self._files(row, variant) if file is not None]
        except OSError as error:
            raise ValueError(f"{self.describe_row(row)}: {error.filename} cannot be read: {error.strerror}.") from None
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def describe_row(self, row: int) -> str:
        """Where the row is, such as "data/edit/metadata.jsonl, line 17"."""
        return f"{self.directory / METADATA_NAME}, line {self._lines[row][0]}"

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the text of all rows, and of the size of each file.

        Reading all images would take minutes at each start. `image_digest` notices changed contents of equal size.
        """
        names = {
            name
            for row in range(len(self))
            for variant in self._parse(row)[0]
            for name in (variant.target, variant.condition)
            if name is not None
        }
        sizes = [(name, _size_in_bytes(self.directory / name)) for name in sorted(names)]
        digest = hashlib.sha256(self._contents)
        digest.update(json.dumps(sizes).encode())
        return digest.hexdigest()

    def _parse(self, row: int) -> tuple[list[Variant], list[str]]:
        _, start, end = self._lines[row]
        return parse_row(self._contents[start:end], self.task)

    def _files(self, row: int, variant: int) -> tuple[Path, Path | None]:
        names = self._parse(row)[0][variant]
        return self.directory / names.target, None if names.condition is None else self.directory / names.condition


def read_metadata(directory: Path) -> bytes:
    """Read the `metadata.jsonl` of a folder.

    Raises:
        ValueError: the folder or the file does not exist.
    """
    path = directory / METADATA_NAME
    if not directory.is_dir():
        raise ValueError(f"There is no folder {directory}.")
    if not path.is_file():
        others = [name for name in ("metadata.csv", "metadata.parquet") if (directory / name).is_file()]
        raise ValueError(f"{directory} has no {METADATA_NAME}" + (f", but a {others[0]}." if others else "."))
    return path.read_bytes()


def _size_in_bytes(file: Path) -> int:
    """The size of a file; −1 if it is missing, which reading it reports."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1
