"""The interface of training data: the rows of one task, each with one or several variants.

The objective of a training asks a data set for images only when it encodes them. It also draws whatever is random, such
as the variant and its prompt, so a data set has no random state.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import PIL.Image
from torch import Tensor

__all__ = ["ExampleImages", "TaskDataset"]


class ExampleImages(NamedTuple):
    """The images of one training example, as pipelines take them.

    Args:
        target: the image that the model should make: a PIL image, or a tensor (3, H, W) with values in [0, 1].
        condition: the condition image, likewise; None for tasks without an image.
    """

    target: PIL.Image.Image | Tensor
    condition: PIL.Image.Image | Tensor | None


class TaskDataset(Protocol):
    """The training examples of one task.

    An epoch visits each row once. The variants of a row are alternatives, such as several edits of one image. So are
    the prompts of a variant, such as the captions of one picture. Each visit draws one of them.
    """

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def prompts(self, row: int) -> Sequence[Sequence[str]]:
        """The interchangeable prompts of each variant of a row; an empty string for tasks without a prompt."""
        ...

    def load_images(self, row: int, variant: int) -> ExampleImages:
        """Load the images of a variant.

        Raises:
            ValueError: an image cannot be read; the message names the row and the file.
        """
        ...

    def image_digest(self, row: int, variant: int) -> str:
        """A digest of the images' contents, by which encoded images are found again in a cache."""
        ...

    def describe_row(self, row: int) -> str:
        """Where a user finds the row, such as "edits/metadata.jsonl, line 17"."""
        ...

    @property
    def digest(self) -> str:
        """A digest of the whole data set, by which a resumed training recognises its data."""
        ...
