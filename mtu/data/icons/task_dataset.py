"""`IconTask`: the icons of one task as training data, each painted when it is asked for."""

import hashlib
from collections.abc import Sequence

from mtu.data.examples import digest_of_images
from mtu.data.icons.catalogue import Split
from mtu.data.icons.examples import IconDataset, IconExample
from mtu.data.task_dataset import ExampleImages

__all__ = ["IconTask"]


class IconTask:
    """The first icons of one task, as rows with one variant and one prompt each.

    Args:
        task_name: "text-to-image", "edit", "super-resolution" or "remove".
        count: the number of rows.
        split: "train", "validation" or "test".
        seed: seed of the icons.

    Raises:
        ValueError: the task or the split is unknown, or the count is below 1.

    Example:
        >>> icons = IconTask("edit", 2000)
        >>> icons.prompts(0)
        [('make it red',)]
    """

    def __init__(self, task_name: str, count: int, split: Split = "train", seed: int = 0) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"The number of icons must be an integer ≥ 1, but got {count!r}.")
        self.task_name, self.count = task_name, count
        self._icons = IconDataset(split, seed)
        self._icons.get_example(task_name, 0)  # raises if there is no such task
        self._prompts: dict[int, str] = {}
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        """The number of rows."""
        return self.count

    def prompts(self, row: int) -> Sequence[Sequence[str]]:
        """The prompt of a row; an empty string for super-resolution."""
        if row not in self._prompts:
            self._paint(row)
        return [(self._prompts[row],)]

    def load_images(self, row: int, variant: int) -> ExampleImages:
        """Paint the images of a row as (3, H, W) float32 tensors with values in [0, 1]."""
        example = self._paint(row)
        condition = None if example.condition_image is None else example.condition_image / 2 + 0.5
        return ExampleImages(example.target_image / 2 + 0.5, condition)

    def image_digest(self, row: int, variant: int) -> str:
        """The SHA-256 of the pixels of a row's images, which are painted for that once."""
        if row not in self._digests:
            self._digests[row] = digest_of_images(self.load_images(row, variant))
        return self._digests[row]

    def describe_row(self, row: int) -> str:
        """Where the row is, such as "icon 17 of task 'edit'"."""
        return f"icon {row} of task {self.task_name!r}"

    @property
    def digest(self) -> str:
        """A digest of the arguments, and of the first row, whose pixels change with the font and the painting."""
        settings = (self.task_name, self.count, self._icons.split, self._icons.seed, self.image_digest(0, 0))
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def _paint(self, row: int) -> IconExample:
        if not 0 <= row < self.count:
            raise IndexError(f"The rows of {self.count} icons count from 0 to {self.count - 1}, but got {row}.")
        example = self._icons.get_example(self.task_name, row)
        self._prompts[row] = example.prompt
        return example
