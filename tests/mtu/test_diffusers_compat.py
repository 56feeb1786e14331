"""What mtu relies on beyond the public interfaces of diffusers is still so: a test for each entry, by its name."""

import inspect
import json
import types

import pytest
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import mtu
from mtu.diffusers_compat import PRIVATE_WAYS, StockIndex, expand_block_scales, is_offloaded, pipeline_settings
from tests.mtu.pipelines.conftest import stock_pipeline
from tests.mtu.tiny import SD, stock_unet, upcycled_unet


@pytest.mark.parametrize("name", PRIVATE_WAYS)
def test_each_private_way_has_a_test(name):
    assert callable(globals().get(f"test_{name}"))


def test_block_scales():
    (scales,) = expand_block_scales(stock_unet(SD), [{"down": 0.5, "up": {"block_1": [0.1, 0.2]}}])
    attentions = {"down_blocks.0": [0.5], "mid_block": [1.0], "up_blocks.1": [0.1, 0.2]}
    assert scales == {f"{name}.attentions.{i}": v for name, values in attentions.items() for i, v in enumerate(values)}
    assert expand_block_scales(stock_unet(SD), [None, 0.3]) == [1.0, 0.3]


def test_call_settings():
    text, edit = StableDiffusionPipeline, StableDiffusionInstructPix2PixPipeline
    read = {text: "interrupt guidance_scale guidance_rescale", edit: "guidance_scale image_guidance_scale"}
    expected = {"interrupt": 3, "guidance_scale": 2.0, "guidance_rescale": 4, "image_guidance_scale": 1.0}
    pipe = types.SimpleNamespace(**{f"_{name}": value for name, value in expected.items()}, **expected)
    pipe.unet, expected["do_classifier_free_guidance"] = stock_unet(SD), True
    for cls, names in read.items():
        for name in [*names.split(), "do_classifier_free_guidance"]:
            loop = inspect.getsource(cls.__call__).partition("Denoising loop")[2]
            assert f"self.{name}" in loop
            assert getattr(cls, name).fget(pipe) == expected[name]


def test_constructor_signature():
    own, stock = (
        set(inspect.signature(cls.__init__).parameters) for cls in (mtu.MTUUNet2DConditionModel, UNet2DConditionModel)
    )
    assert stock < own
    assert (own - {"self"}) <= set(upcycled_unet(SD).config)


def test_hub_download(tmp_path):
    """If diffusers knows mtu one day, or reads the index in another way, `StockIndex` can go or must change."""
    assert "mtu" not in LOADABLE_CLASSES
    assert "cls._dict_from_json_file(config_file)" in inspect.getsource(DiffusionPipeline.download)
    index = {
        "_class_name": "MTUPipeline",
        "unet": ["mtu", "MTUUNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    stock = ["diffusers", "UNet2DConditionModel"]
    assert StockIndex._dict_from_json_file(tmp_path / "model_index.json") == {**index, "unet": stock}


def test_model_offload():
    pipe = stock_pipeline()
    assert not is_offloaded(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe._all_hooks
    assert is_offloaded(pipe)
    pipe.remove_all_hooks()
    assert not is_offloaded(pipe)
    pipe.unet.enable_group_offload("cpu", "cpu", "leaf_level")
    assert is_offloaded(pipe)


def test_pipeline_settings():
    pipe = stock_pipeline()
    names = {"_is_unet_config_sample_size_int", "vae_scale_factor", "image_processor", "_progress_bar_config"}
    assert pipeline_settings(pipe).keys() == names
