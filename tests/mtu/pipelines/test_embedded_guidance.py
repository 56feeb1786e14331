"""UNets that take the guidance scale as an input, as those of latent consistency models."""

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

import mtu
from mtu.experts import stock_config
from mtu.inspection.counting import count_flops
from mtu.runtime.compiling import CompiledUNetCalls, ExecutionPlan
from tests.mtu.pipelines.conftest import randomise_
from tests.mtu.pipelines.mixed_batches import PROMPTS, TASKS, assert_same, images, noise, run_stock, seeds


def consistency_pipeline(stock):
    config = {name: value for name, value in stock.unet.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    stock.unet = UNet2DConditionModel(**{**config, "time_cond_proj_dim": 6}).eval()
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    return stock


@pytest.fixture
def distilled(stock):
    pipe = mtu.upcycle(consistency_pipeline(stock))
    randomise_(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_upcycling_keeps_the_images(stock):
    pipe = consistency_pipeline(stock)
    given = {"latents": noise(1), "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 8.0}
    expected = pipe("a bell", generator=seeds(1), **given).images
    other = pipe("a bell", generator=seeds(1), **{**given, "guidance_scale": 1.0}).images
    assert (expected - other).abs().max() > 0.001
    assert_same(mtu.upcycle(pipe)("a bell", generator=seeds(1), **given).images, expected)


def test_each_image_is_that_of_the_stock_pipeline(distilled, picture):
    """Text-to-image has its own scale embedded and one branch; with an image, stock pipelines guide and embed none."""
    calls = []
    hook = distilled.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    names, scales = ["text-to-image", *TASKS], [8.0, 2.0, 3.0, None, None]
    prompts, pictures = ["a star", *PROMPTS], [None, *images(picture)]
    at_size = [None if image is None else image.resize((16, 16), 3) for image in pictures]
    together = distilled(
        prompts, pictures, names, latents=noise(5), guidance_scale=scales, generator=seeds(5), num_inference_steps=3,
        output_type="pt",
    ).images  # fmt: skip
    assert calls == [9] * 3
    hook.remove()
    for i, name in enumerate(names):
        given = {"text": scales[i], "steps": 3, "generator": seeds(5)[i : i + 1]}
        alone = run_stock(distilled, name, prompts[i], at_size[i], noise(5)[i : i + 1], **given)
        assert_same(together[i : i + 1], alone)


def test_a_changed_scale_has_no_effect(distilled):
    """As in the stock pipeline, which embeds it before the first step."""

    def change(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return tensors

    given = {"latents": noise(1), "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
    plain = distilled("a bell", generator=seeds(1), **given).images
    assert torch.equal(distilled("a bell", generator=seeds(1), callback_on_step_end=change, **given).images, plain)


def test_warm_up_prepares_the_sizes_of_calls(distilled, caplog):
    unet = distilled.unet
    unet._compiled_call_impl = CompiledUNetCalls(unet, ExecutionPlan(None, False), 8)
    mtu.warmup(distilled, ["text-to-image", ["edit", "text-to-image"]])
    given = {"latents": noise(1), "num_inference_steps": 1, "output_type": "latent"}
    distilled("a bell", **given)
    assert "New size" not in caplog.text
    assert mtu.warmup(distilled, [2]).keys() == {2}


def test_flops_count_the_embedding(distilled):
    config = stock_config(distilled.unet)
    with torch.device("meta"):
        unets = [UNet2DConditionModel(**{**config, "time_cond_proj_dim": width}) for width in (6, None)]
    embedding, plain = (count_flops(unet, 4, 8).layers for unet in unets)
    # One product of the embedding (6) by the first width (16).
    assert embedding - plain == 2 * 6 * 16
