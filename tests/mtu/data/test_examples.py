"""Examples in memory and painted icons as training data."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mtu.data.examples import Example, ExampleList
from mtu.data.icons import IconDataset
from mtu.data.icons.task_dataset import IconTask
from mtu.tasks import EDIT, SUPER_RESOLUTION, TEXT_TO_IMAGE

GREY = Image.new("L", (6, 4), 7)
TENSOR = torch.rand(3, 4, 6)
EDITED = Example(TENSOR, "make it blue", GREY)


def test_examples_and_variants_are_rows():
    data = ExampleList([EDITED, [Example(GREY, ["one", "1"], TENSOR), Example(GREY, "two", GREY)]], EDIT)
    assert len(data) == 2
    assert data.prompts(0) == [("make it blue",)]
    assert data.prompts(1) == [("one", "1"), ("two",)]
    target, condition = data.load_images(0, 0)
    assert target is TENSOR
    assert (condition.mode, condition.getpixel((0, 0))) == ("RGB", (7, 7, 7))
    assert data.describe_row(1) == "example 1 of task 'edit'"
    assert pickle.loads(pickle.dumps(data)).digest == data.digest


def test_digests_follow_pixels_and_prompts():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 1
    images = [GREY, Image.fromarray(pixels), TENSOR, TENSOR.double(), TENSOR.clone().reshape(3, 6, 4), TENSOR / 2]
    data = ExampleList([Example(image, "a") for image in images], TEXT_TO_IMAGE)
    digests = [data.image_digest(row, 0) for row in range(len(images))]
    assert len(set(digests)) == len(images)
    pair = [
        ExampleList([Example(*images)], EDIT).image_digest(0, 0)
        for images in ((GREY, "a", TENSOR), (TENSOR, "a", GREY))
    ]
    assert pair[0] != pair[1]
    assert ExampleList([Example(GREY.copy(), "b")], TEXT_TO_IMAGE).image_digest(0, 0) == digests[0]
    lists = [["a"], ["b"], ["a", "a"], [["a", "b"]]]
    found = {ExampleList([Example(GREY, prompt) for prompt in prompts], TEXT_TO_IMAGE).digest for prompts in lists}
    assert len(found) == len(lists)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (EDIT, [], "The task 'edit' needs at least one example, but the list is empty"),
        (EDIT, [EDITED, []], "example 1 of task 'edit' has no variants"),
        (EDIT, [[EDITED, 3]], "example 0 of task 'edit' must be an Example, but is of type int"),
        (EDIT, [dataclasses.replace(EDITED, prompt=" ")], "has an empty prompt"),
        (EDIT, [dataclasses.replace(EDITED, prompt=[])], r"a string or a list of strings as prompt, but has \[\]"),
        (
            EDIT,
            [dataclasses.replace(EDITED, prompt=["a", 3])],
            r"a string or a list of strings as prompt, but has \['a', 3\]",
        ),
        (EDIT, [Example(GREY, "a")], "has no condition image, but its task takes one"),
        (TEXT_TO_IMAGE, [EDITED], "has a condition image, but its task takes none"),
        (SUPER_RESOLUTION, [EDITED], "has the prompt 'make it blue', but its task takes none"),
        (TEXT_TO_IMAGE, [Example(GREY.convert("I"), "a")], "8 bits a channel, but one has the mode 'I'"),
        (TEXT_TO_IMAGE, [Example(np.zeros((4, 4, 3)), "a")], "PIL images or tensors, but has one of type ndarray"),
        (TEXT_TO_IMAGE, [Example(TENSOR[0], "a")], r"shape \(3, H, W\), but has one of shape \(4, 6\)"),
        (TEXT_TO_IMAGE, [Example(TENSOR.to(torch.uint8), "a")], r"float tensors .* dtype torch.uint8"),
        (TEXT_TO_IMAGE, [Example(TENSOR * 2 - 1, "a")], r"values in \[0, 1\], but one has -"),
        (TEXT_TO_IMAGE, [Example(TENSOR * torch.nan, "a")], r"values in \[0, 1\], but one has nan"),
    ],
)
def test_examples_that_do_not_fit_are_named(task, rows, message):
    with pytest.raises(ValueError, match=message):
        ExampleList(rows, task)


@pytest.mark.parametrize("task", ["text-to-image", "edit", "super-resolution", "remove"])
def test_icons_are_the_examples_of_the_icon_data_set(task):
    data = IconTask(task, 5, "validation", seed=3)
    copy = pickle.loads(pickle.dumps(data))
    for row in (4, 0):
        example = IconDataset("validation", 3).get_example(task, row)
        assert copy.prompts(row) == [(example.prompt,)]
        target, condition = copy.load_images(row, 0)
        assert torch.equal(target * 2 - 1, example.target_image)
        assert (condition is None) == (task == "text-to-image")
        assert condition is None or torch.equal(condition * 2 - 1, example.condition_image)
        assert target.min() >= 0
        assert target.max() <= 1
    assert len({copy.image_digest(row, 0) for row in range(5)}) == 5
    assert copy.image_digest(2, 0) == data.image_digest(2, 0)
    assert data.describe_row(2) == f"icon 2 of task '{task}'"


def test_icons_are_told_apart_by_their_arguments():
    arguments = [("edit", 5), ("edit", 6), ("remove", 5), ("edit", 5, "test"), ("edit", 5, "train", 1)]
    assert len({IconTask(*each).digest for each in arguments}) == len(arguments)
    assert IconTask("edit", 5).digest == IconTask("edit", 5).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inpaint", 3), "Unknown task 'inpaint'"),
        (("edit", 3, "dev"), "Unknown split 'dev'"),
        (("edit", 0), "an integer ≥ 1, but got 0"),
        (("edit", 2.5), r"an integer ≥ 1, but got 2\.5"),
    ],
)
def test_icons_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IconTask(*arguments)
    with pytest.raises(IndexError, match="count from 0 to 2, but got 3"):
        IconTask("edit", 3).load_images(3, 0)
