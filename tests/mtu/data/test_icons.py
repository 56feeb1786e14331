"""`IconDataset`: examples are deterministic, their targets true, and nothing that is held out shows up in training."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu.data.degradation import degrade_to_half_size
from mtu.data.icons import IconDataset
from mtu.data.icons.catalogue import (
    BACKGROUND_COLOURS,
    CROSSED_OUT_SUFFIX,
    ICON_COLOURS,
    OUTLINE_SUFFIX,
    SPLITS,
    icon_names,
    names_with_variant,
    one_word_names,
    split_of_combination,
    text_to_image_icon_names,
)
from mtu.data.icons.examples import EDIT_KINDS, TASK_NAMES, IconExample, paint_icon, paint_mask
from mtu.data.icons.font import icon_masks, mask_indices_by_icon_name
from mtu.data.images import psnr, to_normalized_tensor, upsample_bicubic


def pixels(image: Tensor | None) -> np.ndarray:
    """Return the (h, w, 3) uint8 picture of an image in [-1, 1]."""
    assert image is not None
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def mask_of(picture: np.ndarray) -> tuple[np.ndarray, str]:
    """Recover an icon's mask, as 0 … 1, and the background's name from a picture of known colours."""
    background = tuple(int(c) for c in picture[0, 0])
    name = {colour: name for name, colour in BACKGROUND_COLOURS.items()}[background]
    distance = np.linalg.norm(picture.astype(float) - background, axis=-1)
    return distance / distance.max(), name


def colour_of(picture: np.ndarray) -> str:
    """Return the name of the colour that is farthest from the background."""
    distance = np.linalg.norm(picture.astype(float) - picture[0, 0], axis=-1)
    colour = tuple(int(c) for c in picture.reshape(-1, 3)[distance.argmax()])
    return {colour: name for name, colour in ICON_COLOURS.items()}[colour]


def edits(split: str, count: int = 160) -> dict[str, list[IconExample]]:
    """Return edits by kind."""
    kinds = defaultdict(list)
    for example in IconDataset(split).get_examples("edit", range(count)):  # type: ignore[arg-type]
        kinds[example.edit_kind].append(example)
    return kinds


@pytest.mark.parametrize("task", TASK_NAMES)
def test_examples_depend_on_seed_split_task_and_index_alone(task: str) -> None:
    first, again = IconDataset("train", seed=3), IconDataset("train", seed=3)
    examples = first.get_examples(task, range(6))
    # In another order: an example must not depend on those drawn before it.
    for index in (5, 0, 3):
        repeated = again.get_example(task, index)
        assert repeated.prompt == examples[index].prompt
        assert torch.equal(repeated.target_image, examples[index].target_image)
        image, before = repeated.condition_image, examples[index].condition_image
        assert (image is None and before is None) or torch.equal(image, before)  # type: ignore[arg-type]
    others = IconDataset("train", seed=4).get_examples(task, range(6)) + IconDataset("test", seed=3).get_examples(
        task, range(6)
    )
    assert not any(
        torch.equal(a.target_image, b.target_image) for a, b in zip(examples + examples, others, strict=True)
    )


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_shapes_and_ranges(task: str, split: str) -> None:
    for example in IconDataset(split).get_examples(task, range(20)):  # type: ignore[arg-type]
        assert example.task_name == task
        assert example.edit_kind in (EDIT_KINDS if task == "edit" else ("",))
        assert example.target_image.shape == (3, 64, 64)
        assert example.target_image.dtype == torch.float32
        assert example.target_image.min() >= -1
        assert example.target_image.max() <= 1
        if task == "text-to-image":
            assert example.condition_image is None
        else:
            size = 32 if task == "super-resolution" else 64
            assert example.condition_image is not None
            assert example.condition_image.shape == (3, size, size)
        assert (example.prompt == "") == (task == "super-resolution")


@pytest.mark.parametrize("split", SPLITS)
def test_text_to_image_shows_the_captions_icon_in_the_splits_combinations(split: str) -> None:
    styles = Counter()
    for example in IconDataset(split).get_examples("text-to-image", range(200)):  # type: ignore[arg-type]
        match = re.fullmatch(r"a (\w+) (outlined )?(\w+) on (\w+)", example.prompt)
        assert match is not None
        colour, style, name, background = match.groups()
        full = name + (OUTLINE_SUFFIX if style else "")
        assert name in text_to_image_icon_names()
        assert split_of_combination(full, colour, background) == split
        np.testing.assert_array_equal(pixels(example.target_image), paint_icon(full, colour, background))
        styles[style] += 1
    assert min(styles["outlined "], styles[None]) > 60


@pytest.mark.slow
def test_training_pictures_are_never_held_out_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = []

    def spy(name: str, colour: str, background: str) -> np.ndarray:
        painted.append((name, colour, background))
        return paint_icon(name, colour, background)

    monkeypatch.setattr("mtu.data.icons.examples.paint_icon", spy)
    for task in ("text-to-image", "edit", "super-resolution"):
        IconDataset("train").get_examples(task, range(400))
    # An edit paints two pictures.
    assert len(painted) == 1600
    assert {split_of_combination(*combination) for combination in painted} == {"train"}


def test_kinds_of_edit_are_equally_frequent() -> None:
    counts = Counter(example.edit_kind for example in IconDataset("train").get_examples("edit", range(600)))
    assert set(counts) == set(EDIT_KINDS)
    # Four standard deviations of a binomial count of 600 draws at 1/4.
    assert all(abs(count - 150) < 43 for count in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "suffix", "prompt"),
    [("outline", OUTLINE_SUFFIX, "outline it"), ("off", CROSSED_OUT_SUFFIX, "cross it out")],
)
def test_target_is_the_other_variant_of_the_same_icon(kind: str, suffix: str, prompt: str) -> None:
    names = names_with_variant("test", suffix)
    for example in edits("test")[kind]:
        assert example.prompt == prompt
        before, after = pixels(example.condition_image), pixels(example.target_image)
        colour, (_, background) = colour_of(before), mask_of(before)
        pairs = [(paint_icon(n, colour, background), paint_icon(n + suffix, colour, background)) for n in names]
        assert any(np.array_equal(a, before) and np.array_equal(b, after) for a, b in pairs)


def test_recolouring_changes_the_colour_to_the_one_asked_for_and_nothing_else() -> None:
    for example in edits("test")["recolour"]:
        before, after = pixels(example.condition_image), pixels(example.target_image)
        colour = example.prompt.removeprefix("make it ")
        assert colour_of(after) == colour != colour_of(before)
        (old_mask, old_background), (new_mask, new_background) = mask_of(before), mask_of(after)
        assert old_background == new_background
        np.testing.assert_allclose(old_mask, new_mask, atol=0.02)


def test_new_background_is_the_one_asked_for_and_the_icon_stays() -> None:
    for example in edits("test")["background"]:
        before, after = pixels(example.condition_image), pixels(example.target_image)
        background = example.prompt.removeprefix("put it on ")
        assert mask_of(after)[1] == background != mask_of(before)[1]
        assert colour_of(before) == colour_of(after)
        np.testing.assert_allclose(mask_of(before)[0], mask_of(after)[0], atol=0.02)


def test_removal_clears_the_named_icon_and_leaves_the_other() -> None:
    pool = one_word_names("test")
    for example in IconDataset("test").get_examples("remove", range(60)):
        match = re.fullmatch(r"remove the (\w+) (\w+)", example.prompt)
        assert match is not None
        colour, name = match.groups()
        assert name in pool
        before, after = pixels(example.condition_image), pixels(example.target_image)
        changed = (before != after).any(-1)
        # What changed is one icon of the named colour and shape in one quadrant, and is plain background now.
        assert (after[changed] == after[0, 0]).all()
        top, left = (int(side.min()) // 32 * 32 for side in np.nonzero(changed))
        mask = icon_masks(32)[mask_indices_by_icon_name()[name]]
        cleared = changed[top : top + 32, left : left + 32]
        assert changed.sum() == cleared.sum()
        # The faintest grey levels may round to the background.
        assert cleared[mask > 8].all()
        assert not cleared[mask == 0].any()
        painted = paint_mask(mask, np.array(ICON_COLOURS[colour]), after[0, 0])
        np.testing.assert_array_equal(before[top : top + 32, left : left + 32], painted)
        # The other icon is still there: outside the cleared quadrant nothing changed, and there is ink.
        assert (after != after[0, 0]).any()


def test_image_tasks_are_tested_on_icons_never_seen() -> None:
    for split in SPLITS:
        assert set(names_with_variant(split, OUTLINE_SUFFIX)) <= set(icon_names(split))
        others = {name for other in SPLITS if other != split for name in icon_names(other)}
        assert not others & set(one_word_names(split))
        assert not others & set(names_with_variant(split, CROSSED_OUT_SUFFIX))


@pytest.mark.slow
def test_copying_the_input_scores_what_it_should() -> None:
    """Medians in dB, a fingerprint of rendering, colours and degradation."""
    expected = {"outline": 14, "off": 18, "recolour": 14, "super-resolution": 21, "remove": 19, "no noise": 27}
    values: dict[str, list[float]] = defaultdict(list)
    icons = IconDataset("test")
    for task in ("edit", "super-resolution", "remove"):
        for index, example in enumerate(icons.get_examples(task, range(300))):
            assert example.condition_image is not None
            copy = upsample_bicubic(example.condition_image, 64)
            values[example.edit_kind or task].append(float(psnr(copy, example.target_image)))
            if task == "super-resolution":
                clean = degrade_to_half_size(
                    pixels(example.target_image), np.random.default_rng(index), add_noise_and_jpeg=False
                )
                values["no noise"].append(
                    float(psnr(upsample_bicubic(to_normalized_tensor(clean), 64), example.target_image))
                )
    medians = {kind: float(np.median(values[kind])) for kind in expected}
    print(medians)
    assert medians == pytest.approx(expected, abs=1.2)


def test_errors_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="Unknown split 'dev'; choose one of train, validation, test"):
        IconDataset("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown task 'inpaint'; choose one of text-to-image"):
        IconDataset().get_example("inpaint", 0)
    with pytest.raises(ValueError, match="counts from 0, got -1"):
        IconDataset().get_example("edit", -1)
