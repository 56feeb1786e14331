"""Export: the plain UNet of one task computes what the routed one does."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from mtu import TaskSpec

from ..outputs import assert_close, assert_differ, assert_unchanged, predict, rows, snapshot
from ..tiny import FAMILIES, SD, inputs, stock_unet, upcycled_unet

TASKS = ("text-to-image", "edit", "super-resolution", "remove")
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"num_experts": 1}, id="one_expert"),
    pytest.param({"num_experts": 8, "norm": "task_expert"}, id="expert_norms"),
    pytest.param({"num_experts": 4, "top_k": 2}, id="top2"),
    pytest.param({"num_experts": 8, "top_k": 3, "norm": "task_expert"}, id="expert_norms_top3"),
]
WIDE = [
    pytest.param({"num_experts": 2, "expert_ratio": 1.0}, id="wide"),
    pytest.param({"num_experts": 2, "expert_ratio": 0.25, "norm": "task_expert"}, id="narrow_expert_norms"),
    pytest.param({"num_experts": 4, "expert_ratio": 0.5, "top_k": 2}, id="wide_top2"),
]


def assert_export_equals_routed(unet, **options):
    given = inputs(unet)
    for spec in unet.tasks:
        exported = unet.export_task(spec.name, **options)
        own = rows(given, slice(None), 4 + spec.condition_channels)
        expected = predict(unet, given, spec.name)
        assert_close(predict(exported, own), expected)
    others = predict(unet, given, unet.tasks[0].name)
    assert_differ(expected, others)


@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_export_equals_routed(config, settings, dropped):
    unet = upcycled_unet(config, **settings)
    if dropped:
        unet.drop_routers_()
    assert_export_equals_routed(unet)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*SETTINGS, *WIDE])
def test_a_pruned_export_equals_routed_and_holds_active_experts_only(settings):
    unet = upcycled_unet(**settings)
    assert_export_equals_routed(unet, prune=True)
    config, exported = unet.expert_config, unet.export_task("edit", prune=True)
    for block in (m for m in exported.modules() if hasattr(m, "ff")):
        width = config.hidden_units_per_expert(4 * block.norm3.normalized_shape[0])
        assert block.ff.net[2].in_features == config.num_active_experts * width
        assert block.ff.net[0].proj.out_features == 2 * config.num_active_experts * width


@pytest.mark.parametrize("settings", WIDE)
def test_an_export_that_no_stock_configuration_describes_raises(settings):
    unet = upcycled_unet(**settings)
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"hidden units, but a stock configuration holds .*: pass prune=True"):
        unet.export_task("edit")
    assert_unchanged(unet, before)


def test_inactive_experts_are_exact_zeros_in_an_export():
    unet = upcycled_unet(top_k=1)
    weights = unet.router_weights()[:, unet.task_index("edit")]
    blocks = [m for m in unet.export_task("edit").modules() if hasattr(m, "ff")]
    for block, row in zip(blocks, weights, strict=True):
        zero = (block.ff.net[2].weight.view(-1, 4, block.ff.net[2].in_features // 4) == 0).all(dim=2).all(dim=0)
        assert zero.tolist() == (row == 0).tolist()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("name", TASKS)
def test_an_export_is_a_stock_unet_that_stock_diffusers_loads(tmp_path, config, name):
    unet = upcycled_unet(config)
    exported = unet.export_task(name)
    channels = 4 if name == "text-to-image" else 8
    assert type(exported) is UNet2DConditionModel
    assert exported.state_dict().keys() == stock_unet(config).state_dict().keys()
    stock_config = {key: value for key, value in stock_unet(config).config.items() if not key.startswith("_")}
    assert {k: v for k, v in exported.config.items() if not k.startswith("_")} == {
        **stock_config,
        "in_channels": channels,
    }
    exported.save_pretrained(tmp_path)
    answer: Any = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    loaded, info = answer
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = rows(inputs(unet), slice(None), channels)
    assert torch.equal(predict(loaded, given), predict(exported, given))
    assert type(loaded) is UNet2DConditionModel


def test_an_export_shares_nothing_with_the_model():
    unet = upcycled_unet()
    before, given = snapshot(unet), inputs(unet)
    exported = unet.export_task("edit")
    expected = predict(exported, given)
    assert all(parameter.requires_grad for parameter in exported.parameters())
    addresses = {tensor.untyped_storage().data_ptr() for tensor in unet.state_dict().values()}
    assert not addresses & {tensor.untyped_storage().data_ptr() for tensor in exported.state_dict().values()}
    for parameter in exported.parameters():
        parameter.data.zero_()
    assert_unchanged(unet, before)
    exported = unet.export_task("edit")
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert torch.equal(predict(exported, given), expected)


def test_an_export_can_be_upcycled_and_trained_again():
    import mtu

    unet = upcycled_unet()
    given = rows(inputs(unet), slice(None), 4)
    exported = unet.export_task("text-to-image")
    expected = predict(exported, given)
    assert_close(predict(mtu.upcycle(exported), given), expected)


def test_the_mode_and_the_type_are_kept():
    unet = upcycled_unet().to(torch.bfloat16)
    assert not unet.export_task("edit").training
    exported = unet.train().export_task("edit")
    assert exported.training
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", SETTINGS)
def test_folding_in_bfloat16_is_as_exact_as_routing_in_it(settings):
    unet = upcycled_unet(**settings)
    given = inputs(unet)
    exact = predict(unet, given, "edit")
    low = inputs(unet.to(torch.bfloat16))
    routed = (predict(unet, low, "edit").float() - exact).abs().max()
    folded = (predict(unet.export_task("edit"), low).float() - exact).abs().max()
    assert folded <= 2 * routed + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_an_added_task_is_exported_with_its_own_channels():
    unet = upcycled_unet()
    unet.add_task(TaskSpec("depth", condition_channels=7), "edit")
    exported = unet.export_task("depth")
    given = inputs(unet, channels=11)
    assert exported.config.in_channels == 11
    assert_close(predict(exported, given), predict(unet, given, "depth"))
    assert unet.export_task("edit").config.in_channels == 8


def test_an_unknown_task_raises():
    with pytest.raises(ValueError, match="Unknown task 'paint'"):
        upcycled_unet().export_task("paint")


def test_adapters_and_fused_projections_raise():
    unet = upcycled_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="Fused projections cannot be carried over: call unfuse_qkv_projections"):
        unet.export_task("edit")
    unet = upcycled_unet()
    unet.add_adapter(LoraConfig(target_modules=["ff.net.2"]))
    with pytest.raises(ValueError, match=r"Unload adapters, .*ff.net.2 is a Linear of peft"):
        unet.export_task("edit")


def test_stock_diffusers_refuses_the_upcycled_folder(tmp_path):
    """Silently dropping what it does not know would give a wrong model; the shape of norm3 prevents that."""
    upcycled_unet(SD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot load"):
        UNet2DConditionModel.from_pretrained(tmp_path)
