"""The names, colours and captions of the icon data set, and the split of names and of combinations.

Names are split by their *base name*, the first word of the hyphenated name: `bell`, `bell-ring` and `bell-outline`
are always in the same split, so image-to-image tasks are tested on icons never seen in any variant. Text-to-image
cannot be tested on unseen names; it is tested on seen names in unseen *combinations* of icon, colour and background.
"""

import hashlib
from functools import cache
from typing import Literal

from mtu.data.icons.font import code_points_by_icon_name

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

ICON_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (245, 210, 45),
    "green": (30, 175, 70),
    "cyan": (45, 195, 215),
    "blue": (45, 85, 225),
    "purple": (140, 60, 190),
    "pink": (240, 90, 170),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (85, 85, 85),
    "beige": (225, 205, 165),
}

OUTLINE_SUFFIX, CROSSED_OUT_SUFFIX = "-outline", "-off"
TEST_FRACTION, VALIDATION_FRACTION = 0.10, 0.05
TEST_COMBINATIONS_FRACTION, VALIDATION_COMBINATIONS_FRACTION = 0.10, 0.03


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, and so is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def first_word_of_name(name: str) -> str:
    """Return the first word of a hyphenated icon name."""
    return name.split("-", 1)[0]


def split_of_name(name: str) -> Split:
    """Return the split of an icon name, which all variants of its base name share."""
    fraction = hash_fraction(first_word_of_name(name))
    if fraction < TEST_FRACTION:
        return "test"
    return "validation" if fraction < TEST_FRACTION + VALIDATION_FRACTION else "train"


@cache
def split_of_combination(name: str, colour: str, background: str) -> Split:
    """Return the split of one combination of icon (in its style), colour and background.

    Args:
        name: the icon's full name, so that `bell` and `bell-outline` are held out independently.
        colour: a key of `ICON_COLOURS`.
        background: a key of `BACKGROUND_COLOURS`.
    """
    fraction = hash_fraction(f"{name}|{colour}|{background}")
    if fraction < TEST_COMBINATIONS_FRACTION:
        return "test"
    return "validation" if fraction < TEST_COMBINATIONS_FRACTION + VALIDATION_COMBINATIONS_FRACTION else "train"


@cache
def icon_names(split: Split) -> tuple[str, ...]:
    """Return all icon names of a split."""
    return tuple(name for name in code_points_by_icon_name() if split_of_name(name) == split)


@cache
def names_with_variant(split: Split, suffix: str) -> tuple[str, ...]:
    """Return the names of a split for which the font also has the name with the suffix."""
    return tuple(name for name in icon_names(split) if name + suffix in code_points_by_icon_name())


@cache
def one_word_names(split: Split) -> tuple[str, ...]:
    """Return the names of a split that are a single word, which scenes of two icons show."""
    return tuple(name for name in icon_names(split) if "-" not in name)


@cache
def text_to_image_icon_names() -> tuple[str, ...]:
    """Return the names that text-to-image shows: those of one word in the train split that have an outlined variant."""
    return tuple(name for name in one_word_names("train") if name + OUTLINE_SUFFIX in code_points_by_icon_name())


def icon_caption(name: str, colour: str, background: str) -> str:
    """Return the caption of one icon: "a red bell on white", "a red outlined bell on white".

    The grammar is "a COLOUR [outlined | crossed out] NAME on BACKGROUND"; the style comes from the icon's name.

    Args:
        name: the icon's full name; hyphens become spaces.
        colour: a key of `ICON_COLOURS`.
        background: a key of `BACKGROUND_COLOURS`.
    """
    style = ""
    if name.endswith(OUTLINE_SUFFIX):
        name, style = name.removesuffix(OUTLINE_SUFFIX), "outlined "
    elif name.endswith(CROSSED_OUT_SUFFIX):
        name, style = name.removesuffix(CROSSED_OUT_SUFFIX), "crossed out "
    return f"a {colour} {style}{name.replace('-', ' ')} on {background}"


def scene_caption(names: tuple[str, str], colours: tuple[str, str], background: str) -> str:
    """Return the caption of two icons: "a red bell and a blue star on white"."""
    return f"a {colours[0]} {names[0]} and a {colours[1]} {names[1]} on {background}"


def vocabulary() -> tuple[str, ...]:
    """Return the sorted words of all captions and instructions of icons with one-word names."""
    words = {word for split in SPLITS for word in one_word_names(split)}
    words |= {*ICON_COLOURS, *BACKGROUND_COLOURS}
    words |= {"a", "and", "on", "crossed", "out", "outlined"}
    words |= {"outline", "cross", "it", "make", "put", "remove", "the"}
    return tuple(sorted(words))
