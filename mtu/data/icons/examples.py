"""`IconDataset`: examples of four image tasks with true targets, drawn with the Material Design Icons font.

Every example is a pure function of (seed, split, task, index). An image is (3, 64, 64) float32 in [-1, 1]. It shows
one icon in one of 8 colours on one of 4 backgrounds, or a scene of two half-size icons in two quadrants.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mtu.data.degradation import degrade_to_half_size
from mtu.data.icons.catalogue import (
    BACKGROUND_COLOURS,
    CROSSED_OUT_SUFFIX,
    ICON_COLOURS,
    OUTLINE_SUFFIX,
    SPLITS,
    Split,
    icon_caption,
    icon_names,
    names_with_variant,
    one_word_names,
    split_of_combination,
    text_to_image_icon_names,
)
from mtu.data.icons.font import icon_masks, mask_indices_by_icon_name
from mtu.data.images import to_normalized_tensor

IMAGE_SIZE = 64
TASK_NAMES = ("text-to-image", "edit", "super-resolution", "remove")
EDIT_KINDS = ("outline", "off", "recolour", "background")


class IconExample(NamedTuple):
    """One example of one task.

    Attributes:
        task_name: a name out of `TASK_NAMES`.
        edit_kind: a name out of `EDIT_KINDS`; empty for the other tasks.
        prompt: the caption or instruction; empty for super-resolution.
        condition_image: the condition image, (3, 64, 64), or (3, 32, 32) for super-resolution; None for text-to-image.
        target_image: (3, 64, 64), the image that the model should make.
    """

    task_name: str
    edit_kind: str
    prompt: str
    condition_image: Tensor | None
    target_image: Tensor


def paint_mask(mask: np.ndarray, colour: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Composite icons over plain backgrounds: `background + (colour - background) * mask / 255`.

    Args:
        mask: (..., h, w) uint8.
        colour: (..., 3) numbers in 0 … 255.
        background: (..., 3) numbers in 0 … 255.

    Returns:
        (..., h, w, 3) uint8.
    """
    behind = np.asarray(background, dtype=np.float32)[..., None, None, :]
    front = np.asarray(colour, dtype=np.float32)[..., None, None, :]
    return np.rint(behind + (front - behind) * (mask[..., None].astype(np.float32) / 255)).astype(np.uint8)


def paint_icon(name: str, colour: str, background: str) -> np.ndarray:
    """Paint one icon over the whole image, (64, 64, 3) uint8."""
    mask = icon_masks(IMAGE_SIZE)[mask_indices_by_icon_name()[name]]
    return paint_mask(mask, np.array(ICON_COLOURS[colour]), np.array(BACKGROUND_COLOURS[background]))


def paint_scene(icons: Iterable[tuple[str, str, int]], background: str) -> np.ndarray:
    """Paint half-size icons into quadrants.

    Args:
        icons: (name, colour, quadrant) of each; quadrants are numbered left to right, then down.
        background: a key of `BACKGROUND_COLOURS`.

    Returns:
        (64, 64, 3) uint8.
    """
    half = IMAGE_SIZE // 2
    behind = np.array(BACKGROUND_COLOURS[background])
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    picture[:] = behind
    for name, colour, quadrant in icons:
        top, left = half * (quadrant // 2), half * (quadrant % 2)
        mask = icon_masks(half)[mask_indices_by_icon_name()[name]]
        picture[top : top + half, left : left + half] = paint_mask(mask, np.array(ICON_COLOURS[colour]), behind)
    return picture


def random_choice(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draw one of the options with equal probabilities."""
    return options[int(rng.integers(len(options)))]


class IconDataset:
    """The icon data set: an endless number of examples of four tasks, with true targets.

    Args:
        split: "train", "validation" or "test". Image-to-image tasks show icons whose base name is in that split;
            text-to-image shows training names in combinations of icon, colour and background that are in that split.
            In the train split no image of any task is a held-out combination of a single icon.
        seed: seed of all random choices.

    Raises:
        ValueError: the split is unknown.
    """

    def __init__(self, split: Split = "train", seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
        self.split: Split = split
        self.seed = seed

    def get_example(self, task: str, index: int) -> IconExample:
        """Return one example of a task. The same arguments always give the same example.

        Args:
            task: a name out of `TASK_NAMES`.
            index: number of the example, from 0 without end.

        Raises:
            ValueError: the task is unknown, or the index is negative.
        """
        if task not in TASK_NAMES:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASK_NAMES)}.")
        if index < 0:
            raise ValueError(f"An example's index counts from 0, got {index}.")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), TASK_NAMES.index(task), index])
        if task == "text-to-image":
            return self._text_to_image(rng)
        if task == "edit":
            return self._edit(rng)
        return self._super_resolution(rng) if task == "super-resolution" else self._remove(rng)

    def get_examples(self, task: str, indices: Iterable[int]) -> list[IconExample]:
        """Return the examples of a task at the given indices."""
        return [self.get_example(task, index) for index in indices]

    def _allowed(self, name: str, colour: str, background: str) -> bool:
        """Whether this split may show the combination. Only the train split must not show held-out ones."""
        return self.split != "train" or split_of_combination(name, colour, background) == "train"

    def _colours(self, rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
        """Draw a colour and background that this split may show with every one of the names."""
        while True:
            colour, background = random_choice(rng, tuple(ICON_COLOURS)), random_choice(rng, tuple(BACKGROUND_COLOURS))
            if all(self._allowed(name, colour, background) for name in names):
                return colour, background

    def _text_to_image(self, rng: np.random.Generator) -> IconExample:
        while True:
            name = random_choice(rng, text_to_image_icon_names()) + random_choice(rng, ("", OUTLINE_SUFFIX))
            colour, background = random_choice(rng, tuple(ICON_COLOURS)), random_choice(rng, tuple(BACKGROUND_COLOURS))
            if split_of_combination(name, colour, background) == self.split:
                break
        target = to_normalized_tensor(paint_icon(name, colour, background))
        return IconExample("text-to-image", "", icon_caption(name, colour, background), None, target)

    def _edit(self, rng: np.random.Generator) -> IconExample:
        kind = random_choice(rng, EDIT_KINDS)
        if kind in ("outline", "off"):
            suffix, prompt = (
                (OUTLINE_SUFFIX, "outline it") if kind == "outline" else (CROSSED_OUT_SUFFIX, "cross it out")
            )
            name = random_choice(rng, names_with_variant(self.split, suffix))
            colour, background = self._colours(rng, (name, name + suffix))
            before = paint_icon(name, colour, background)
            after = paint_icon(name + suffix, colour, background)
            return IconExample("edit", kind, prompt, to_normalized_tensor(before), to_normalized_tensor(after))
        # A rejected draw is repeated from its start, because every change of some icons is held out.
        while True:
            name = random_choice(rng, icon_names(self.split))
            colour, background = self._colours(rng, (name,))
            new_colour, new_background = colour, background
            if kind == "recolour":
                new_colour = random_choice(rng, tuple(ICON_COLOURS))
                prompt = f"make it {new_colour}"
            else:
                new_background = random_choice(rng, tuple(BACKGROUND_COLOURS))
                prompt = f"put it on {new_background}"
            changed = (new_colour, new_background) != (colour, background)
            if changed and self._allowed(name, new_colour, new_background):
                break
        before, after = paint_icon(name, colour, background), paint_icon(name, new_colour, new_background)
        return IconExample("edit", kind, prompt, to_normalized_tensor(before), to_normalized_tensor(after))

    def _super_resolution(self, rng: np.random.Generator) -> IconExample:
        name = random_choice(rng, icon_names(self.split))
        target = paint_icon(name, *self._colours(rng, (name,)))
        return IconExample(
            "super-resolution",
            "",
            "",
            to_normalized_tensor(degrade_to_half_size(target, rng)),
            to_normalized_tensor(target),
        )

    def _remove(self, rng: np.random.Generator) -> IconExample:
        pool = one_word_names(self.split)
        names = [pool[i] for i in rng.choice(len(pool), 2, replace=False)]
        colours = [tuple(ICON_COLOURS)[i] for i in rng.choice(len(ICON_COLOURS), 2, replace=False)]
        quadrants = [int(i) for i in rng.choice(4, 2, replace=False)]
        background = random_choice(rng, tuple(BACKGROUND_COLOURS))
        icons = list(zip(names, colours, quadrants, strict=True))
        removed = int(rng.integers(2))
        prompt = f"remove the {colours[removed]} {names[removed]}"
        before, after = paint_scene(icons, background), paint_scene([icons[1 - removed]], background)
        return IconExample("remove", "", prompt, to_normalized_tensor(before), to_normalized_tensor(after))
