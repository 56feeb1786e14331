"""What a pipeline call may be given, what is made of it, and what is refused."""

import dataclasses
import io
import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from mtu.pipelines.inputs import output_height_and_width, parse_pipeline_inputs, prepare_condition_image
from mtu.tasks import EDIT, REMOVE, SD_TASKS, SUPER_RESOLUTION, TEXT_TO_IMAGE, TaskSpec


def parse(specs=SD_TASKS, **given):
    defaults = dict.fromkeys(
        ("prompt", "image", "negative_prompt", "guidance_scale", "image_guidance_scale", "num_inference_steps")
    )
    return parse_pipeline_inputs(specs, **{**defaults, "task": "text-to-image", "num_images_per_prompt": 1, **given})


def size_of(images, tasks, height=None, width=None, default=(64, 64), multiple=8):
    request = parse(prompt=["" for _ in tasks], image=images, task=[task.name for task in tasks])
    return output_height_and_width(request, height, width, default, multiple)


# ------------------------------------------------------------------------------------------------------- spreading


def test_defaults_of_each_task(picture):
    request = parse(
        prompt=["a", "b", None, "c"],
        image=[None, picture(), picture(8, 8), picture()],
        task=["text-to-image", "edit", "super-resolution", "remove"],
    )
    assert request.prompts == ["a", "b", "", "c"]
    assert request.negative_prompts == [""] * 4
    assert request.guidance_scales == [7.5, 7.5, 1.0, 4.0]
    assert request.image_guidance_scales == [1.0, 1.6, 1.0, 1.5]
    assert request.num_inference_steps == 20


def test_single_values_are_spread(picture):
    image = picture()
    request = parse(
        prompt=("a", "b"),
        image=image,
        task="edit",
        negative_prompt="n",
        guidance_scale=np.float32(2),
        num_images_per_prompt=2,
    )
    assert request.prompts == ["a", "a", "b", "b"]
    assert request.negative_prompts == ["n"] * 4
    assert request.images == [image] * 4
    assert request.guidance_scales == [2.0] * 4


def test_one_prompt_serves_several_images(picture):
    request = parse(prompt="a", image=[picture(seed=0), picture(seed=1)], task="edit")
    assert request.prompts == ["a", "a"]


def test_scales_of_each_sample(picture):
    request = parse(
        prompt=["a", "b"],
        image=[picture(), picture()],
        task="edit",
        guidance_scale=[3, None],
        image_guidance_scale=[None, 2.5],
        negative_prompt=["x", None],
    )
    assert request.guidance_scales == [3.0, 7.5]
    assert request.image_guidance_scales == [1.6, 2.5]
    assert request.negative_prompts == ["x", ""]


@pytest.mark.parametrize("batch", [np.zeros((3, 8, 8, 3), np.uint8), torch.zeros(3, 3, 8, 8)])
def test_batches_are_taken_apart(batch):
    request = parse(prompt=["a", "b", "c"], image=batch, task="edit")
    assert [tuple(image.shape) for image in request.images] == [tuple(batch.shape[1:])] * 3


def test_numpy_integers_are_integers():
    assert parse(prompt="a", num_inference_steps=np.int64(3)).num_inference_steps == 3
    assert output_height_and_width(parse(prompt="a"), np.int64(16), np.int64(24), (8, 8), 8) == (16, 24)


def test_different_default_steps_need_a_number(picture):
    specs = (TEXT_TO_IMAGE, dataclasses.replace(EDIT, num_inference_steps=50))
    given = {"prompt": ["a", "b"], "image": [None, picture()], "task": ["text-to-image", "edit"]}
    with pytest.raises(ValueError, match=r"share their steps.*'text-to-image': 20, 'edit': 50"):
        parse(specs, **given)
    assert parse(specs, **given, num_inference_steps=7).num_inference_steps == 7


# ----------------------------------------------------------------------------------------------------------- sizes


def test_size_is_the_models_own_without_images():
    assert size_of([None], [TEXT_TO_IMAGE], default=(64, 96)) == (64, 96)


def test_size_of_images(picture):
    assert size_of([picture(40, 24)], [EDIT]) == (24, 40)
    assert size_of([picture(40, 24)], [SUPER_RESOLUTION]) == (48, 80)
    assert size_of([np.zeros((24, 40, 3))], [EDIT]) == (24, 40)
    assert size_of([torch.zeros(3, 24, 40)], [EDIT]) == (24, 40)
    assert size_of([None, picture(40, 24), picture(20, 12)], [TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION]) == (24, 40)


def test_size_of_images_is_rounded_down(picture):
    assert size_of([picture(47, 31)], [EDIT]) == (24, 40)
    assert size_of([picture(23, 15)], [SUPER_RESOLUTION]) == (24, 40), "46×30, then down; not 2 × (16×8)"


def test_given_size_wins(picture):
    assert size_of([picture(40, 24), picture(16, 16)], [EDIT, REMOVE], 32, 48) == (32, 48)


def test_conflicting_sizes(picture):
    with pytest.raises(ValueError, match=r"one output size, but got 40×24 \(sample 1\), 16×16 \(sample 2\)"):
        size_of([None, picture(40, 24), picture(16, 16)], [TEXT_TO_IMAGE, EDIT, REMOVE])
    with pytest.raises(ValueError, match="one output size"):
        size_of([picture(16, 16), picture(16, 16)], [EDIT, SUPER_RESOLUTION])


def test_too_small_an_image(picture):
    with pytest.raises(ValueError, match=r"at least 8 pixels.*but got 16×0"):
        size_of([picture(16, 7)], [EDIT])


@pytest.mark.parametrize("height", [0, -8, 12, 16.0, "16", True])
def test_bad_size(height):
    with pytest.raises(ValueError, match=r"height must be a positive multiple of 8 pixels, but got"):
        size_of([None], [TEXT_TO_IMAGE], height, 16)


@pytest.mark.parametrize(("height", "width"), [(16, None), (None, 16)])
def test_half_a_size(height, width):
    with pytest.raises(
        ValueError, match=rf"both height and width or neither, but got height={height} and width={width}"
    ):
        size_of([None], [TEXT_TO_IMAGE], height, width)


# ---------------------------------------------------------------------------------------------------- image values


def as_unit(picture: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 * 2 - 1


def test_values_are_those_of_the_picture(picture):
    image = picture(24, 16)
    pixels = prepare_condition_image(image, EDIT, 16, 24)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 16, 24)
    assert torch.equal(pixels, as_unit(image))
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_every_kind_of_image_means_the_same(picture):
    image = picture(24, 16)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [
        array,
        array.astype(np.float32) / 255,
        array.astype(np.float64) / 255,
        (array / 255).astype(">f4"),
        tensor,
        tensor.float() / 255,
        tensor.double() / 255,
        np.ascontiguousarray(array[:, ::-1])[:, ::-1],
        np.asfortranarray(array),
        np.asarray(image),  # read-only
        (tensor.float() / 255).requires_grad_(),
    ]
    expected = as_unit(image)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for kind in kinds:
            request = parse(prompt="a", image=kind, task="edit")
            torch.testing.assert_close(
                prepare_condition_image(request.images[0], EDIT, 16, 24), expected, rtol=0, atol=2e-7
            )


def test_half_precision_tensors(picture):
    exact = torch.arange(0, 48).view(3, 4, 4) / 64
    for dtype in (torch.float16, torch.bfloat16):
        request = parse(prompt="a", image=exact.to(dtype), task="edit")
        assert torch.equal(prepare_condition_image(request.images[0], EDIT, 4, 4), exact * 2 - 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_converted_to_rgb(picture, mode):
    image = picture().convert(mode)
    request = parse(prompt="a", image=image, task="edit")
    assert torch.equal(prepare_condition_image(request.images[0], EDIT, 16, 16), as_unit(image.convert("RGB")))


def test_the_given_image_is_left_as_it_was(picture):
    tensor = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    array = tensor.permute(1, 2, 0).numpy().copy()
    before = tensor.clone()
    for image in (tensor, array):
        prepare_condition_image(image, EDIT, 8, 8)
        prepare_condition_image(image, EDIT, 16, 16)
    assert torch.equal(tensor, before)
    assert np.array_equal(array, before.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("spec", "filter_"),
    [
        (SUPER_RESOLUTION, PIL.Image.Resampling.BICUBIC),
        (EDIT, PIL.Image.Resampling.LANCZOS),
        (TaskSpec("smooth", resample="bilinear"), PIL.Image.Resampling.BILINEAR),
    ],
)
@pytest.mark.parametrize(("width", "height"), [(32, 48), (7, 5), (16, 8)])
def test_pictures_are_resized_as_pil_does_it(picture, spec, filter_, width, height):
    image = picture(16, 24)
    pixels = prepare_condition_image(image, spec, height, width)
    assert torch.equal(pixels, as_unit(image.resize((width, height), filter_)))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(32, 48), (7, 5)])
def test_float_values_are_resized_like_pictures(picture, resample, width, height):
    """Within PIL's rounding: to integers after each of its two passes, of which the second can amplify the first."""
    # Of half the contrast: PIL also clips the overshoot of bicubic interpolation between its passes.
    image, spec = picture(16, 24).point(lambda value: 64 + value // 2), TaskSpec("own", resample=resample)
    expected = prepare_condition_image(image, spec, height, width)
    for kind in (np.array(image) / 255, torch.from_numpy(np.array(image)).permute(2, 0, 1).half() / 255):
        pixels = prepare_condition_image(kind, spec, height, width)
        assert pixels.shape == (3, height, width)
        # Steps are 2/255 in [−1, 1]; another filter (bilinear for bicubic, no antialiasing) is tens of them off.
        assert (pixels - expected).abs().max() <= 2 * 2 / 255


@pytest.mark.parametrize("spec", [SUPER_RESOLUTION, EDIT], ids=lambda spec: spec.resample)
def test_bytes_are_resized_as_pictures(picture, spec):
    image = picture(16, 24)
    array = np.array(image)
    for kind in (array, torch.from_numpy(array).permute(2, 0, 1), np.asfortranarray(array)):
        for size in ((48, 32), (5, 7), (24, 16)):
            assert torch.equal(prepare_condition_image(kind, spec, *size), prepare_condition_image(image, spec, *size))


def test_overshoot_is_clamped():
    """Bicubic interpolation of an edge leaves [0, 1]."""
    edge = torch.zeros(3, 8, 8)
    edge[:, :, 4:] = 1
    pixels = prepare_condition_image(edge, SUPER_RESOLUTION, 16, 16)
    assert pixels.min() == -1
    assert pixels.max() == 1


# ---------------------------------------------------------------------------------------------------------- errors

BAD_IMAGES = [
    (torch.full((3, 8, 8), float("nan")), "must be finite.*sample 0"),
    (np.full((8, 8, 3), np.inf, np.float32), "must be finite.*sample 0"),
    (torch.full((3, 8, 8), 1.5), r"in \[0, 1\].*1\.5"),
    (torch.full((3, 8, 8), -0.25), r"in \[0, 1\].*-0\.25"),
    (np.full((8, 8, 3), 255.0), r"in \[0, 1\].*255"),
    (torch.zeros(4, 8, 8), r"three colours.*\(4, 8, 8\)"),
    (torch.zeros(8, 8, 3), r"three colours.*\(8, 8, 3\)"),
    (np.zeros((3, 8, 8)), r"three colours.*\(3, 8, 8\)"),
    (np.zeros((8, 8)), r"three colours.*\(8, 8\)"),
    (np.zeros(()), r"three colours.*\(\)"),
    (np.zeros((1, 1, 8, 8, 3)), r"three colours.*\(1, 1, 8, 8, 3\)"),
    (torch.zeros(3, 0, 8), r"three colours and at least one pixel.*\(3, 0, 8\)"),
    (np.zeros((0, 8, 3), np.uint8), r"at least one pixel.*\(0, 8, 3\)"),
    (PIL.Image.new("RGB", (0, 4)), r"at least one pixel.*\(0, 4\)"),
    (torch.zeros(3, 8, 8, dtype=torch.int64), "float in .* or uint8.*int64"),
    (np.zeros((8, 8, 3), np.uint16), "float in .* or uint8.*uint16"),
    (np.zeros((8, 8, 3), bool), "float in .* or uint8.*bool"),
    (np.zeros((8, 8, 3), object), "float in .* or uint8.*object"),
    (np.zeros((8, 8, 3), np.complex64), "float in .* or uint8.*complex64"),
    (torch.zeros(3, 8, 8, dtype=torch.complex64), "float in .* or uint8.*complex64"),
    (PIL.Image.new("I;16", (8, 8)), "8 bits.*'I;16'"),
    (PIL.Image.new("I", (8, 8)), "8 bits.*'I'"),
    (PIL.Image.new("F", (8, 8)), "8 bits.*'F'"),
    ("picture.png", "PIL image, an array or a tensor.*str"),
    (b"bytes", "PIL image, an array or a tensor.*bytes"),
    (7, "PIL image, an array or a tensor.*int"),
]


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES, ids=[message for _, message in BAD_IMAGES])
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(prompt="a", image=image, task="edit")
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_the_bad_sample_is_named(picture):
    images = [picture(), picture(), torch.full((3, 8, 8), float("inf"))]
    with pytest.raises(ValueError, match="image of sample 2"):
        parse(prompt=["a"] * 3, image=images, task="edit", num_images_per_prompt=2)


def test_truncated_files_are_found_at_once(picture):
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    image = PIL.Image.open(io.BytesIO(file.getvalue()[:2000]))
    with pytest.raises(OSError, match="truncated"):
        parse(prompt="a", image=image, task="edit")


PICTURE = PIL.Image.new("RGB", (8, 8))
BAD_CALLS = [
    ({"prompt": "a", "task": "paint"}, r"Unknown task 'paint': this model has \['text-to-image', 'edit'"),
    ({"prompt": "a", "task": 3}, "Unknown task 3"),
    ({"prompt": ["a"], "task": [["edit"]]}, r"Unknown task \['edit'\]"),
    ({"prompt": ["a"], "task": [None]}, "Unknown task None"),
    ({"prompt": ["a", "b"], "task": ["text-to-image"]}, "one entry per sample, but got 2 for prompt, 1 for task"),
    ({"prompt": "a", "task": ["text-to-image"] * 3}, "one entry per sample, but got 3 for task and a single prompt"),
    ({"prompt": ["a"], "image": [PICTURE] * 2, "task": "edit"}, "but got 1 for prompt, 2 for image"),
    ({"prompt": ["a", "b"], "negative_prompt": ["n"]}, "negative_prompt must have one entry for each of 2.*but got 1"),
    ({"prompt": ["a", "b"], "guidance_scale": [1.0] * 3}, "guidance_scale must have one entry for each of 2.*got 3"),
    ({"prompt": []}, "At least one sample is needed, but got empty lists"),
    ({"prompt": [], "image": [], "task": []}, "At least one sample is needed"),
    ({"prompt": None, "image": torch.zeros(0, 3, 8, 8), "task": "super-resolution"}, "At least one sample"),
    ({"prompt": "a", "task": "edit"}, "'edit' takes an image, but sample 0 has none"),
    ({"prompt": ["a", "b"], "image": [PICTURE, None], "task": "edit"}, "takes an image, but sample 1 has none"),
    ({"prompt": "a", "image": PICTURE}, "'text-to-image' takes no image, but sample 0 has one"),
    ({"prompt": "a", "image": PICTURE, "task": "super-resolution"}, "takes no prompt, but sample 0 has 'a'"),
    ({"image": PICTURE, "task": "edit"}, r"needs a prompt \(a string\), but sample 0 has None"),
    ({}, "'text-to-image' needs a prompt.*None"),
    ({"prompt": 5}, "needs a prompt.*5"),
    ({"prompt": ["a", b"b"]}, "needs a prompt.*sample 1 has b'b'"),
    ({"prompt": "a", "negative_prompt": 5}, "negative prompt is a string or None.*sample 0 has 5"),
    ({"prompt": ["a"], "negative_prompt": [["b"]]}, r"negative prompt is a string or None.*\['b'\]"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be an integer ≥ 1, but got 0"),
    ({"prompt": "a", "num_inference_steps": 2.0}, "num_inference_steps must be an integer ≥ 1, but got 2.0"),
    ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps must be an integer ≥ 1, but got True"),
    ({"prompt": "a", "guidance_scale": -1.0}, "guidance_scale must be a finite number ≥ 0, but got -1.0"),
    ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a finite number ≥ 0, but got nan"),
    ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale must be a finite number ≥ 0, but got inf"),
    ({"prompt": "a", "guidance_scale": "7"}, "guidance_scale must be a finite number ≥ 0, but got '7'"),
    ({"prompt": "a", "image_guidance_scale": -0.5}, "image_guidance_scale must be a finite number ≥ 0, but got -0.5"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be an integer ≥ 1, but got 0"),
    ({"prompt": "a", "num_images_per_prompt": 1.5}, "num_images_per_prompt must be an integer ≥ 1, but got 1.5"),
    ({"prompt": "a", "num_images_per_prompt": None}, "num_images_per_prompt must be an integer ≥ 1, but got None"),
]


@pytest.mark.parametrize(("given", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_calls(given, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(**given)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")
