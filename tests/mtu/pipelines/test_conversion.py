"""Pipelines upcycled, saved, loaded and exported."""

import json

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

import mtu

from .mixed_batches import STEPS, TASKS, assert_same, images, noise, run_stock


def test_upcycling_keeps_the_other_components(stock):
    before = dict(stock.components)
    pipe = mtu.upcycle(stock, ["text-to-image", "edit"], 2)
    assert type(pipe) is mtu.MTUPipeline
    assert [spec.name for spec in pipe.unet.tasks] == ["text-to-image", "edit"]
    assert pipe.config.requires_safety_checker is False
    for name, component in pipe.components.items():
        assert (component is before[name]) == (name != "unet" or component is None)


def test_upcycling_keeps_the_images(stock):
    given = {"latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt"}
    before = stock("a red bell", **given).images
    pipe = mtu.upcycle(stock)
    pipe.set_progress_bar_config(disable=True)
    assert_same(pipe("a red bell", **given).images, before)


def test_upcycling_twice(pipe):
    with pytest.raises(ValueError, match=r"upcycled already.*expected a stock UNet"):
        mtu.upcycle(pipe)


def test_upcycling_another_pipeline(stock):
    other = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    with pytest.raises(TypeError, match="StableDiffusionPipeline, but got a StableDiffusionImg2ImgPipeline"):
        mtu.upcycle(other)


def test_a_stock_unet_in_the_pipeline(stock):
    pipe = mtu.MTUPipeline(**stock.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"holds a UNet2DConditionModel, but an upcycled UNet is needed") as raised:
        pipe("a bell")
    assert "mtu.upcycle(pipe)" in str(raised.value)
    assert type(mtu.upcycle(pipe).unet) is mtu.MTUUNet2DConditionModel


def test_saving_and_loading(pipe, mixed, tmp_path):
    expected = mixed()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MTUPipeline"
    assert index["unet"] == ["mtu", "MTUUNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    loaded = mtu.MTUPipeline.from_pretrained(tmp_path)
    assert type(loaded) is mtu.MTUPipeline
    assert loaded.unet.tasks == pipe.unet.tasks
    pipe.unet, pipe.vae, pipe.text_encoder = loaded.unet, loaded.vae, loaded.text_encoder
    pipe.tokenizer, pipe.scheduler = loaded.tokenizer, loaded.scheduler
    assert torch.equal(mixed(), expected)


def test_the_stock_class_opens_a_saved_folder_as_text_to_image(pipe, tmp_path):
    given = {"prompt": "a red bell", "latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt"}
    expected = pipe(**given).images
    pipe.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionPipeline
    assert_same(opened(**given).images, expected)


def test_exported_pipelines_share_all_but_the_unet(pipe):
    for name, kind in zip(TASKS, [StableDiffusionPipeline, *[StableDiffusionInstructPix2PixPipeline] * 3], strict=True):
        exported = pipe.export_task(name)
        assert type(exported) is kind
        assert type(exported.unet) is UNet2DConditionModel
        assert exported.unet.config.in_channels == (4 if name == "text-to-image" else 8)
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            assert getattr(exported, part) is getattr(pipe, part)


def test_exporting_an_unknown_task(pipe):
    with pytest.raises(ValueError, match="Unknown task 'paint': this model has"):
        pipe.export_task("paint")


def test_exported_pipelines_can_be_saved(pipe, picture, tmp_path):
    image = images(picture)[1]
    expected = run_stock(pipe, "edit", "blue", image, noise(1))
    pipe.export_task("edit").save_pretrained(tmp_path)
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    given = {"guidance_scale": 7.5, "image_guidance_scale": 1.6, "num_inference_steps": STEPS, "output_type": "pt"}
    assert torch.equal(loaded("blue", image=image, latents=noise(1), **given).images, expected)
