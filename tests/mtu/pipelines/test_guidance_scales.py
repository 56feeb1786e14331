"""Guidance of each sample in a mixed batch, and how many rows and channels the UNet is called with."""

import PIL.Image
import pytest
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from mtu.tasks import TaskSpec

from .mixed_batches import PROMPTS, STEPS, TASKS, assert_same, at_output_size, count_unet_rows, images, noise, run_stock


def test_scales_of_each_sample(pipe, mixed, picture):
    together = mixed(guidance_scale=[3.0, 9.0, 2.0, 1.5], image_guidance_scale=[None, 2.5, None, 1.1])
    stock = {}
    stock[0] = run_stock(pipe, TASKS[0], PROMPTS[0], None, noise()[:1], text=3.0)
    stock[1] = run_stock(pipe, TASKS[1], PROMPTS[1], images(picture)[1], noise()[1:2], text=9.0, dual=2.5)
    stock[2] = run_stock(pipe, TASKS[2], "", at_output_size(images(picture)[2]), noise()[2:3], text=1.0)
    stock[3] = run_stock(pipe, TASKS[3], PROMPTS[3], images(picture)[3], noise()[3:], text=1.5, dual=1.1)
    for i, expected in stock.items():
        assert_same(together[i : i + 1], expected)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_text_guidance_up_to_one_is_the_prompt_alone(pipe, mixed, scale):
    together = mixed(guidance_scale=[scale, None, None, None])
    assert_same(together[:1], run_stock(pipe, TASKS[0], PROMPTS[0], None, noise()[:1], text=scale))


def test_dual_guidance_with_both_one_is_the_prompt_alone(pipe, mixed, picture):
    together = mixed(guidance_scale=[None, 1.0, None, None], image_guidance_scale=[None, 1.0, None, None])
    stock = run_stock(pipe, "edit", PROMPTS[1], images(picture)[1], noise()[1:2], text=1.0, dual=1.0)
    assert_same(together[1:2], stock)


def test_dual_guidance_keeps_to_its_formula_where_stock_pipelines_drop_it(pipe, picture):
    """Stock pipelines silently fall back to the prompt alone if s_text ≤ 1 or s_image < 1."""
    given = {"latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt"}
    prompt, image = PROMPTS[1], images(picture)[1]

    def run(text, dual):
        return pipe(prompt, image, "edit", guidance_scale=text, image_guidance_scale=dual, **given).images

    # Continuous in the scales: no jump at s_text = 1.
    assert (run(1.0, 1.6) - run(1.001, 1.6)).abs().max() < 0.01
    assert_same(run(1.001, 1.6), run_stock(pipe, "edit", prompt, image, noise(1), text=1.001, dual=1.6))
    assert (run(1.0, 1.6) - run_stock(pipe, "edit", prompt, image, noise(1), text=1.0, dual=1.6)).abs().max() > 0.01
    # s_text = s_image = 0: the branch without prompt and image is that of an empty prompt and zero latents.
    assert (run(0.0, 0.0) - run(1.0, 1.0)).abs().max() > 0.05


def test_text_guidance_of_a_task_with_an_image(pipe, picture):
    """The negative branch keeps the image: the stock formula at the image scale 1."""
    pipe.unet.add_task(TaskSpec("restyle", guidance="text", guidance_scale=5.0), init_from="edit")
    image = images(picture)[1]
    expected = run_stock(pipe, "restyle", "blue", image, noise(1), negative_prompt="red")
    calls = count_unet_rows(pipe)
    result = pipe(
        "blue", image, "restyle", latents=noise(1), num_inference_steps=STEPS, output_type="pt", negative_prompt="red"
    ).images
    assert calls == [2] * STEPS
    assert_same(result, expected)


def test_own_task_among_others(pipe, picture):
    spec = TaskSpec(
        "quarter", guidance="dual", guidance_scale=3.0, image_guidance_scale=1.2, scale=4, resample="bilinear"
    )
    pipe.unet.add_task(spec, init_from="edit")
    small = picture(4, 4)
    result = pipe(
        ["bigger", "a bell"],
        [small, None],
        ["quarter", "text-to-image"],
        latents=noise(2),
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    large = small.resize((16, 16), PIL.Image.Resampling.BILINEAR)
    assert_same(result[:1], run_stock(pipe, "quarter", "bigger", large, noise(2)[:1]))
    assert_same(result[1:], run_stock(pipe, "text-to-image", "a bell", None, noise(2)[1:]))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_the_unet_is_called_once_per_timestep(pipe, mixed, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    calls = count_unet_rows(pipe)
    mixed(num_inference_steps=4)
    assert calls == [2 + 3 + 1 + 3] * len(pipe.scheduler.timesteps)
    calls.clear()
    mixed(num_inference_steps=4, guidance_scale=[1.0, 1.0, 5.0, 4.0], image_guidance_scale=[2.0, 1.0, 3.0, 1.0])
    assert calls == [1 + 1 + 1 + 3] * len(pipe.scheduler.timesteps)
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps)


def test_channels_of_the_unet_are_those_of_the_batch(pipe, mixed):
    widths: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    mixed(num_inference_steps=1)
    pipe("a bell", num_inference_steps=1, output_type="latent")
    assert widths == [8, 4]
