"""Names, splits, colours and captions of the icon data set."""

import itertools

import numpy as np
import pytest

from mtu.data.icons import catalogue, font
from mtu.data.icons.catalogue import BACKGROUND_COLOURS, ICON_COLOURS, SPLITS


def test_the_font_has_the_icons_that_the_tasks_are_counted_on() -> None:
    names = font.code_points_by_icon_name()
    assert len(names) == 7279
    assert sum(name + "-outline" in names for name in names) == 1834
    assert sum(name + "-off" in names for name in names) == 303
    assert sum("-" not in name and name + "-outline" in names for name in names) == 226


def test_missing_font_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font, "FONT_PACKAGE", "no_such_font_package")
    with pytest.raises(FileNotFoundError, match=r'pip install "mtu\[train\]"'):
        font.font_path()


@pytest.mark.slow
def test_masks_are_drawn_whole_and_keep_a_margin() -> None:
    for size in (64, 32):
        masks = font.icon_masks(size)
        assert masks.shape == (7279, size, size)
        assert masks.dtype == np.uint8
        margin = size // 32
        assert not masks[:, :margin].any()
        assert not masks[:, -margin:].any()
        assert not masks[:, :, :margin].any()
        assert not masks[:, :, -margin:].any()
        # Every icon but the font's one blank glyph has ink, and antialiasing gives grey levels.
        assert (masks.max(axis=(1, 2)) > 128).sum() >= 7278
        assert len(np.unique(masks)) == 256


def test_splits_are_disjoint_by_base_name_and_of_the_right_size() -> None:
    names = {split: catalogue.icon_names(split) for split in SPLITS}
    assert sum(map(len, names.values())) == 7279
    bases = {split: {catalogue.first_word_of_name(name) for name in names[split]} for split in SPLITS}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not bases[first] & bases[second]
    total = sum(map(len, bases.values()))
    assert 0.08 < len(bases["test"]) / total < 0.12
    assert 0.03 < len(bases["validation"]) / total < 0.07


def test_splits_never_change() -> None:
    # Written down, so that a change of the hash, which would spoil the shipped model's scores, cannot pass unseen.
    assert catalogue.hash_fraction("bell") == pytest.approx(0.96294, abs=1e-5)
    assert [len(catalogue.icon_names(split)) for split in SPLITS] == [6053, 272, 954]
    assert len(catalogue.text_to_image_icon_names()) == 187


def test_combinations_are_held_out_at_the_stated_rates() -> None:
    combinations = itertools.product(catalogue.text_to_image_icon_names(), ICON_COLOURS, BACKGROUND_COLOURS)
    splits = [catalogue.split_of_combination(*combination) for combination in combinations]
    assert 0.08 < splits.count("test") / len(splits) < 0.12
    assert 0.02 < splits.count("validation") / len(splits) < 0.04


def test_colours_are_far_apart() -> None:
    colours = {**ICON_COLOURS, **BACKGROUND_COLOURS}
    assert len(ICON_COLOURS) == 8
    assert len(BACKGROUND_COLOURS) == 4
    for first, second in itertools.combinations(colours, 2):
        distance = np.linalg.norm(np.subtract(colours[first], colours[second]))
        # An icon must stand out from its background more clearly than two colours differ from one another.
        least = 100 if (first in ICON_COLOURS) != (second in ICON_COLOURS) else 75
        assert distance >= least, f"{first} and {second} are only {distance:.0f} apart"


def test_caption_grammar() -> None:
    assert catalogue.icon_caption("bell", "red", "white") == "a red bell on white"
    assert catalogue.icon_caption("bell-outline", "red", "white") == "a red outlined bell on white"
    assert catalogue.icon_caption("bell-off", "red", "white") == "a red crossed out bell on white"
    assert catalogue.icon_caption("bell-ring-outline", "blue", "gray") == "a blue outlined bell ring on gray"
    scene = catalogue.scene_caption(("bell", "star"), ("red", "blue"), "white")
    assert scene == "a red bell and a blue star on white"
    assert set(scene.split()) <= set(catalogue.vocabulary())
