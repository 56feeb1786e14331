"""Training examples in memory: `Example`, and `ExampleList`, the data set of a list of them."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from mtu.data.image_files import convert_to_rgb
from mtu.data.task_dataset import ExampleImages
from mtu.tasks import TaskSpec

__all__ = ["Example", "ExampleList", "digest_of_images"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example.

    Args:
        target: the image that the model should make: a PIL image, or a float tensor (3, H, W) with values in [0, 1].
        prompt: the prompt, or several interchangeable ones; empty for tasks without a prompt.
        condition: the condition image, as the target; None for tasks without an image.
    """

    target: PIL.Image.Image | Tensor
    prompt: str | Sequence[str] = ""
    condition: PIL.Image.Image | Tensor | None = None


class ExampleList:
    """The training examples of one task, in a list.

    Args:
        examples: the rows. A row is an example, or a list of several that are variants of each other.
        task: the task that they are examples of.

    Raises:
        ValueError: there are no examples, or one does not fit the task. The message names it.

    Example:
        >>> edits = ExampleList([Example(after, "make it blue", before)], mtu.tasks.EDIT)
    """

    def __init__(self, examples: Sequence[Example | Sequence[Example]], task: TaskSpec) -> None:
        if not len(examples):
            raise ValueError(f"The task {task.name!r} needs at least one example, but the list is empty.")
        self.task = task
        self._rows = [[row] if isinstance(row, Example) else list(row) for row in examples]
        for row, variants in enumerate(self._rows):
            if not variants:
                raise ValueError(f"{self.describe_row(row)} has no variants: expected at least one.")
            self._rows[row] = [self._checked(example, self.describe_row(row)) for example in variants]
        self._digests: dict[tuple[int, int], str] = {}

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def prompts(self, row: int) -> Sequence[Sequence[str]]:
        """The interchangeable prompts of each variant of a row; an empty string for tasks without a prompt."""
        return [_prompts_of(example) for example in self._rows[row]]

    def load_images(self, row: int, variant: int) -> ExampleImages:
        """Return the images of a variant; PIL images are RGB."""
        example = self._rows[row][variant]
        return ExampleImages(example.target, example.condition)

    def image_digest(self, row: int, variant: int) -> str:
        """The SHA-256 of the pixels of a variant's images."""
        if (row, variant) not in self._digests:
            self._digests[row, variant] = digest_of_images(self.load_images(row, variant))
        return self._digests[row, variant]

    def describe_row(self, row: int) -> str:
        """Where the row is, such as "example 17 of task 'edit'"."""
        return f"example {row} of task {self.task.name!r}"

    @property
    def digest(self) -> str:
        """A digest of all prompts and images."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            digest.update(repr([list(prompts) for prompts in self.prompts(row)]).encode("utf-8", "surrogatepass"))
            for variant in range(len(self._rows[row])):
                digest.update(self.image_digest(row, variant).encode())
        return digest.hexdigest()

    def _checked(self, example: Any, where: str) -> Example:
        """The example with PIL images in RGB."""
        if not isinstance(example, Example):
            raise ValueError(f"{where} must be an Example, but is of type {type(example).__name__}.")
        prompts = _prompts_of(example)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{where} must have a string or a list of strings as prompt, but has {example.prompt!r}.")
        if self.task.uses_prompt and not all(prompt.strip() for prompt in prompts):
            raise ValueError(f"{where} has an empty prompt.")
        if not self.task.uses_prompt and any(prompts):
            raise ValueError(f"{where} has the prompt {example.prompt!r}, but its task takes none.")
        if (example.condition is not None) != self.task.takes_image:
            has, takes = ("no", "one") if self.task.takes_image else ("a", "none")
            raise ValueError(f"{where} has {has} condition image, but its task takes {takes}.")
        condition = None if example.condition is None else _checked_image(example.condition, where)
        return dataclasses.replace(example, target=_checked_image(example.target, where), condition=condition)


def digest_of_images(images: ExampleImages) -> str:
    """The SHA-256 of the pixels of images, of their sizes and of their types."""
    digest = hashlib.sha256()
    for image in images:
        if isinstance(image, Tensor):
            digest.update(f"{image.dtype} {tuple(image.shape)} ".encode())
            digest.update(image.detach().cpu().contiguous().view(torch.uint8).numpy())
        elif image is not None:
            digest.update(f"{image.mode} {image.size} ".encode())
            digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _prompts_of(example: Example) -> tuple[str, ...]:
    return (example.prompt,) if isinstance(example.prompt, str) else tuple(example.prompt)


def _checked_image(image: Any, where: str) -> PIL.Image.Image | Tensor:
    if isinstance(image, PIL.Image.Image):
        if image.mode.partition(";")[0] in ("I", "F"):
            raise ValueError(f"{where} must have images of 8 bits a channel, but one has the mode {image.mode!r}.")
        return convert_to_rgb(image, where)
    if not isinstance(image, Tensor):
        raise ValueError(f"{where} must have PIL images or tensors, but has one of type {type(image).__name__}.")
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or not image.numel():
        raise ValueError(
            f"{where} must have float tensors of shape (3, H, W), but has one of shape {tuple(image.shape)} and dtype "
            f"{image.dtype}."
        )
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):  # also where a value is not a number
        raise ValueError(f"{where} must have tensors with values in [0, 1], but one has {low:.3g} to {high:.3g}.")
    return image
