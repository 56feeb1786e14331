"""The pictures that the base model learns to draw, and their prompts.

Most prompts are captions of the data set. Others describe a picture through the instructions of the image tasks: the
picture of a red outlined bell on black is also "a blue bell on white, outline it, make it red, put it on black". The
text encoder is frozen in later multi-task training, so it must learn the words of the instructions here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mtu.data.icons.catalogue import (
    BACKGROUND_COLOURS,
    CROSSED_OUT_SUFFIX,
    ICON_COLOURS,
    OUTLINE_SUFFIX,
    Split,
    icon_caption,
    scene_caption,
    split_of_combination,
    text_to_image_icon_names,
)
from mtu.data.icons.examples import paint_icon, paint_scene, random_choice
from mtu.data.icons.font import code_points_by_icon_name


@dataclass(frozen=True)
class PromptConfig:
    """The fractions of the kinds of training examples of the base model.

    Attributes:
        scene_fraction: fraction of the examples that are scenes of two half-size icons.
        scenes: number of different scenes.
        removal_fraction: fraction of the scenes whose prompt removes one of the two icons.
        instruction_fraction: fraction of the single icons that instructions describe.
        prompt_dropout_prob: fraction of the prompts that are left empty, for classifier-free guidance.
    """

    scene_fraction: float = 0.12
    scenes: int = 6000
    removal_fraction: float = 0.35
    instruction_fraction: float = 0.3
    prompt_dropout_prob: float = 0.1


class IconPicture(NamedTuple):
    """A picture of one icon. Its name says whether it is plain, outlined or crossed out."""

    name: str
    colour: str
    background: str

    def paint(self) -> np.ndarray:
        """Paint the picture, (64, 64, 3) uint8."""
        return paint_icon(self.name, self.colour, self.background)


class ScenePicture(NamedTuple):
    """A picture of two half-size icons in two quadrants.

    If `second_icon_removed` is true, the picture shows the first alone, and only the prompt names the second.
    """

    names: tuple[str, str]
    colours: tuple[str, str]
    quadrants: tuple[int, int]
    background: str
    second_icon_removed: bool

    def paint(self) -> np.ndarray:
        """Paint the picture, (64, 64, 3) uint8."""
        icons = list(zip(self.names, self.colours, self.quadrants, strict=True))
        return paint_scene(icons[:1] if self.second_icon_removed else icons, self.background)

    def prompt(self, swapped: bool) -> str:
        """Return the caption of the scene, with the instruction of a removal.

        Args:
            swapped: whether the caption names the second icon first.
        """
        order = -1 if swapped else 1
        text = scene_caption(self.names[::order], self.colours[::order], self.background)
        return f"{text}, remove the {self.colours[1]} {self.names[1]}" if self.second_icon_removed else text


def icon_pictures(split: Split) -> list[IconPicture]:
    """Return all pictures of a split that text-to-image may show: plain, outlined and crossed-out icons."""
    named = [
        name + style
        for name in text_to_image_icon_names()
        for style in ("", OUTLINE_SUFFIX, CROSSED_OUT_SUFFIX)
        if name + style in code_points_by_icon_name()
    ]
    return [
        IconPicture(name, colour, background)
        for name in named
        for colour in ICON_COLOURS
        for background in BACKGROUND_COLOURS
        if split_of_combination(name, colour, background) == split
    ]


def draw_scene_pictures(rng: np.random.Generator, config: PromptConfig) -> list[ScenePicture]:
    """Draw scenes, each with two names, two colours, two quadrants and a background."""
    names, colours, backgrounds = text_to_image_icon_names(), tuple(ICON_COLOURS), tuple(BACKGROUND_COLOURS)

    def two(options: Sequence[str]) -> tuple[str, str]:
        first, second = rng.choice(len(options), 2, replace=False)
        return options[int(first)], options[int(second)]

    scenes = []
    for _ in range(config.scenes):
        first, second = rng.choice(4, 2, replace=False)
        removed = bool(rng.random() < config.removal_fraction)
        scene = ScenePicture(
            two(names), two(colours), (int(first), int(second)), random_choice(rng, backgrounds), removed
        )
        scenes.append(scene)
    return scenes


def draw_instruction_prompt(picture: IconPicture, rng: np.random.Generator) -> str:
    """Describe a picture of one icon by a caption and instructions that change what the caption says.

    The caption lacks each property that an instruction sets, or names another one.

    Args:
        picture: the picture to describe.
        rng: chooses the properties (colour, background, style) that instructions set, and their order.
    """
    name, colour, background = picture
    instructions = []
    if rng.random() < 0.5:
        instructions.append(f"make it {colour}")
        colour = random_choice(rng, tuple(ICON_COLOURS)) if rng.random() < 0.5 else ""
    if rng.random() < 0.5:
        instructions.append(f"put it on {background}")
        background = random_choice(rng, tuple(BACKGROUND_COLOURS)) if rng.random() < 0.5 else ""
    for style, instruction in ((OUTLINE_SUFFIX, "outline it"), (CROSSED_OUT_SUFFIX, "cross it out")):
        if name.endswith(style) and rng.random() < 0.7:
            instructions.append(instruction)
            name = name.removesuffix(style)
    # This removes the gaps that words left out have made in the caption.
    text = " ".join(icon_caption(name, colour, background or "?").removesuffix(" on ?").split())
    order = rng.permutation(len(instructions))
    return ", ".join([text, *(instructions[i] for i in order)])


def draw_prompt(picture: IconPicture | ScenePicture, rng: np.random.Generator, config: PromptConfig) -> str:
    """Draw a prompt for a picture: an empty one, a caption, or a caption with instructions."""
    if rng.random() < config.prompt_dropout_prob:
        return ""
    if isinstance(picture, ScenePicture):
        return picture.prompt(swapped=bool(rng.random() < 0.5))
    return (
        draw_instruction_prompt(picture, rng) if rng.random() < config.instruction_fraction else icon_caption(*picture)
    )
