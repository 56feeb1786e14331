"""Generators, latents, sizes, kinds of output and the progress bar of a call."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from .mixed_batches import PROMPTS, STEPS, TASKS, assert_same, images, noise, run_stock, seeds


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_a_generator_per_image(pipe, mixed, picture, scheduler):
    """Also the initial noise: each image is the one its generator makes alone."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    together = mixed(latents=None, generator=seeds(), eta=0.5)
    for i in (0, 2):
        alone = pipe(
            PROMPTS[i],
            images(picture)[i],
            TASKS[i],
            generator=seeds()[i],
            height=16,
            width=16,
            num_inference_steps=STEPS,
            output_type="pt",
            eta=0.5,
        ).images
        assert_same(together[i : i + 1], alone)
    stock = run_stock(pipe, "edit", PROMPTS[1], images(picture)[1], None, generator=seeds()[1], eta=0.5)
    assert_same(together[1:2], stock)


def test_one_generator_reproduces_a_call(mixed):
    first = mixed(latents=None, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, mixed(latents=None, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, mixed(latents=None, generator=torch.Generator().manual_seed(6)))


def test_images_per_prompt(pipe, mixed, picture):
    """Outputs of one sample lie side by side, each with its own noise."""
    result = mixed(num_images_per_prompt=2, latents=noise(8), guidance_scale=[3.0, 4.0, 5.0, 6.0])
    assert len(result) == 8
    every_second = mixed(latents=noise(8)[1::2], guidance_scale=[3.0, 4.0, 5.0, 6.0])
    assert_same(result[1::2], every_second)
    stock = run_stock(pipe, "edit", [PROMPTS[1]] * 2, [images(picture)[1]] * 2, noise(8)[2:4], text=4.0)
    assert_same(result[2:4], stock)


def test_images_per_prompt_with_generators(mixed):
    result = mixed(num_images_per_prompt=2, latents=None, generator=seeds(8))
    assert not torch.equal(result[0], result[1])
    assert_same(result[::2], mixed(latents=None, generator=seeds(8)[::2]))


def test_latents_are_not_changed_and_may_have_another_precision(mixed):
    latents = noise()
    reference = mixed(latents=latents)
    assert torch.equal(latents, noise())
    assert torch.equal(mixed(latents=latents.double()), reference)


def test_default_size_is_the_models_own(pipe):
    assert pipe("a", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


def test_sizes_from_images(pipe, picture):
    given = {"num_inference_steps": 1, "output_type": "pt"}
    assert pipe("a", picture(20, 12), "edit", **given).images.shape == (1, 3, 12, 20)
    assert pipe("a", picture(21, 13), "edit", **given).images.shape == (1, 3, 12, 20)
    assert pipe(image=picture(9, 7), task="super-resolution", **given).images.shape == (1, 3, 14, 18)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(12, 20), (14, 10)])
def test_given_size(pipe, mixed, picture, height, width):
    """Images are resized with their task's filter; the latents may be odd in number."""
    latents = noise(4, (height // 2, width // 2))
    result = mixed(height=height, width=width, latents=latents)
    assert result.shape == (4, 3, height, width)
    filters = [None, PIL.Image.Resampling.LANCZOS, PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.LANCZOS]
    for i in (1, 2, 3):
        resized = images(picture)[i].resize((width, height), filters[i])
        assert_same(result[i : i + 1], run_stock(pipe, TASKS[i], PROMPTS[i], resized, latents[i : i + 1]))


def test_kinds_of_images_are_equal(pipe, picture):
    image = images(picture)[2]
    given = {"task": "super-resolution", "num_inference_steps": 2, "output_type": "pt", "latents": noise(1)}
    reference = pipe(image=image, **given).images
    array = np.array(image)
    for kind in (array, torch.from_numpy(array).permute(2, 0, 1), array[None], [array], image.convert("RGBA")):
        assert torch.equal(pipe(image=kind, **given).images, reference)


def test_output_types(mixed):
    tensors = mixed()
    assert isinstance(tensors, torch.Tensor)
    assert tensors.shape == (4, 3, 16, 16)
    arrays = mixed(output_type="np")
    assert isinstance(arrays, np.ndarray)
    assert arrays.shape == (4, 16, 16, 3)
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = mixed(output_type="pil")
    assert [(image.mode, image.size) for image in pictures] == [("RGB", (16, 16))] * 4
    assert np.array_equal(np.stack([np.array(image) for image in pictures]), (arrays * 255).round().astype(np.uint8))


def test_latent_output_is_what_the_vae_decodes(pipe, mixed):
    latents = mixed(output_type="latent")
    assert latents.shape == (4, 4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert_same(mixed(), (decoded / 2 + 0.5).clamp(0, 1))


def test_tuple_output(pipe):
    result = pipe("a", num_inference_steps=1, output_type="pt", return_dict=False)
    assert isinstance(result, tuple)
    assert result[0].shape == (1, 3, 16, 16)
    assert result[1] is None


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler, DPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_progress_bar(pipe, capfd, scheduler, steps):
    """It counts steps, of which a scheduler may make several timesteps."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    pipe("a", num_inference_steps=steps, output_type="latent")
    last = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert f"{steps}/{steps} " in last
