"""What mtu relies on beyond the public interfaces of diffusers is still so: a test for each entry, by its name."""

import inspect
import json
import types

import accelerate
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.hub_utils import load_or_create_model_card
from huggingface_hub.errors import EntryNotFoundError

import mtu
from mtu.diffusers_compat import (
    FUSED_ATTRIBUTES,
    FUSED_PROJECTIONS,
    PRIVATE_WAYS,
    RUNTIME_ATTRIBUTES,
    StockIndex,
    expand_block_scales,
    is_generated_card,
    is_offloaded,
    pipeline_settings,
)
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


def new_attributes(change):
    """What a change adds to the attributes of the modules of a UNet, and to its state dict."""
    unet = stock_unet(SD)
    before = {module: set(vars(module)) for module in unet.modules()}
    keys = set(unet.state_dict())
    change(unet)
    added = {name for module, names in before.items() for name in set(vars(module)) - names}
    return unet, added, set(unet.state_dict()) - keys


def test_fused_projections():
    unet, attributes, keys = new_attributes(lambda unet: unet.fuse_qkv_projections())
    assert keys
    assert all(any(part in key for part in FUSED_PROJECTIONS) for key in keys)
    assert attributes <= FUSED_ATTRIBUTES
    assert all(module.fused_projections for module in unet.modules() if hasattr(module, "to_qkv"))
    unet.unfuse_qkv_projections()
    assert keys <= set(unet.state_dict()), "unfusing takes the copies away now: unfused_state is needed no more"


def test_runtime_attributes():
    ways = [
        lambda unet: accelerate.cpu_offload(unet, "cpu"),
        lambda unet: unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
        lambda unet: unet.enable_group_offload("cpu", "cpu", "leaf_level"),
        lambda unet: unet.mid_block.compile(),
    ]
    for way in ways:
        assert new_attributes(way)[1] <= RUNTIME_ATTRIBUTES


def test_chunks():
    block = stock_unet(SD).mid_block.attentions[0].transformer_blocks[0]
    assert (block._chunk_size, block._chunk_dim) == (None, 0)
    block.set_chunk_feed_forward(8, dim=1)
    assert (block._chunk_size, block._chunk_dim) == (8, 1)


def test_generated_card(monkeypatch):
    def not_found(*args, **kwargs):
        raise EntryNotFoundError("none")

    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", not_found)
    for is_pipeline in (True, False):
        text = load_or_create_model_card("user/repo", is_pipeline=is_pipeline).text
        assert is_generated_card(text)
        assert not is_generated_card(text + "By us.")
    assert "working_dir" in inspect.signature(DiffusionPipeline._upload_folder).parameters
