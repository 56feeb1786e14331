"""Weights that are brought in for each call of a module: the same outputs as of a model that is in memory."""

import functools

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload

import mtu

from .outputs import assert_close, predict
from .tiny import WITH_AND_WITHOUT_ROUTERS, inputs, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
CPU = torch.device("cpu")
# The fast tier offloads in `test_states.py`.
pytestmark = [pytest.mark.slow, pytest.mark.parametrize(("settings", "dropped"), WITH_AND_WITHOUT_ROUTERS)]


def model(settings, dropped):
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    return unet


def assert_computes(unet, given, expected):
    """A call, a later call, one with precomputed routing as in pipelines, and one that records gradients."""
    for _ in range(2):
        assert_close(predict(unet, given, *NAMES), expected)
    with torch.no_grad(), unet.precomputed_routing_context():
        assert_close(predict(unet, given, *NAMES), expected)
    assert_close(unet(**given, task_ids=unet.task_ids(NAMES)).sample, expected)
    with torch.inference_mode():
        assert_close(predict(unet, given, *NAMES), expected)


# ------------------------------------------------------------------------------------------------------ by accelerate


OFFLOADED = [
    pytest.param(lambda unet, folder: cpu_offload(unet, CPU), id="cpu"),
    pytest.param(lambda unet, folder: disk_offload(unet, folder, CPU), id="disk"),
    pytest.param(lambda unet, folder: disk_offload(unet, folder, CPU, offload_buffers=True), id="disk-buffers"),
    pytest.param(lambda unet, folder: cpu_offload_with_hook(unet, CPU), id="model"),
]


@pytest.mark.parametrize("offload", OFFLOADED)
def test_offloading(settings, dropped, offload, tmp_path):
    unet = model(settings, dropped)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    offload(unet, tmp_path)
    assert_computes(unet, given, expected)


def placed(unet, *on_disk):
    """A map of the parts that have tensors, these on disk: the names of modules that are or hold them."""
    names = {}
    for name, module in unet.named_modules():
        is_split = name == "" or any(part.startswith(f"{name}.") for part in on_disk)
        is_within = any(name.startswith(f"{other}.") for other in names)
        if not is_split and not is_within and len(list(module.parameters())) > 0:
            names[name] = "disk" if name in on_disk else "cpu"
    return names


def part_of_first_block(part):
    return f"down_blocks.0.attentions.0.transformer_blocks.0.{part}"


MAPS = [
    pytest.param(("conv_in", part_of_first_block("ff.router")), id="conv_in and a router"),
    pytest.param(("up_blocks", "mid_block"), id="blocks"),
    pytest.param(("conv_in", "task_embedding", "conv_out", "down_blocks", "up_blocks.1"), id="many"),
]


@pytest.mark.parametrize("on_disk", MAPS)
def test_device_maps(settings, dropped, on_disk, tmp_path):
    unet = model(settings, dropped)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.save_pretrained(tmp_path / "saved")
    device_map = placed(unet, *on_disk)
    assert list(device_map.values()).count("disk") == len(on_disk) - (dropped and "task_embedding" in on_disk)
    load = functools.partial(mtu.MTUUNet2DConditionModel.from_pretrained, tmp_path / "saved")
    loaded = load(device_map=device_map, offload_folder=tmp_path / "offloaded").eval()
    assert_computes(loaded, given, expected)
    # Taking the hooks off would leave a model without values.
    with pytest.raises(ValueError, match=r"but accelerate offloads .* load the model without a device_map"):
        loaded.remove_task("edit")


@pytest.mark.slow
def test_an_inferred_map(settings, dropped, tmp_path):
    unet = model(settings, dropped)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.save_pretrained(tmp_path / "saved")
    loaded = mtu.MTUUNet2DConditionModel.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        max_memory={"cpu": 2 * unet.get_memory_footprint() // 3},
        offload_folder=tmp_path / "offloaded",
    ).eval()
    assert {"cpu", "disk"} <= {str(place) for place in loaded.hf_device_map.values()}
    assert_computes(loaded, given, expected)


# ------------------------------------------------------------------------------------------------------- by diffusers


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("blocks", [1, 2, None], ids=["block", "two blocks", "leaf"])
def test_group_offloading(settings, dropped, blocks, on_disk, tmp_path):
    unet = model(settings, dropped)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.enable_group_offload(
        CPU,
        offload_type="leaf_level" if blocks is None else "block_level",
        num_blocks_per_group=blocks,
        offload_to_disk_path=str(tmp_path) if on_disk else None,
    )
    assert_computes(unet, given, expected)
