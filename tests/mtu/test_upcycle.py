"""Upcycling: the original's output, its very weights, and the paper's numbers."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

import mtu
from mtu.inspection.inspected_model import BUILT_IN_UNET_CONFIGS
from mtu.tasks import SD_TASKS, SDXL_TASKS

from .outputs import assert_close, assert_differ, assert_unchanged, predict, rows, snapshot
from .tiny import FAMILIES, SD, SDXL, inputs, stock_unet, upcycled_unet

PRESERVED = [
    pytest.param({}, id="default"),
    pytest.param({"num_experts": 1}, id="one_expert"),
    pytest.param({"num_experts": 8, "norm": "task_expert"}, id="expert_norms"),
    pytest.param({"num_experts": 4, "expert_ratio": 1.0}, id="whole_experts"),
    pytest.param({"num_experts": 2, "expert_ratio": 0.75}, id="uneven"),
    pytest.param({"num_experts": 2, "expert_ratio": 1.25, "norm": "task_expert"}, id="uneven_above_one"),
    pytest.param({"num_experts": 4, "expert_ratio": 1.0, "top_k": 2}, id="top2_whole"),
    pytest.param({"num_experts": 4, "expert_ratio": 1.5, "top_k": 2}, id="top2_uneven"),
    pytest.param({"num_experts": 4, "top_k": 4}, id="top_all"),
]


def names_of(unet, count=5):
    return [unet.tasks[i % len(unet.tasks)].name for i in range(count)]


@pytest.mark.parametrize("settings", PRESERVED)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.filterwarnings("ignore:In . of . layers some expert is used by no task")
def test_the_output_is_the_originals(config, settings):
    stock = stock_unet(config)
    given = inputs(stock)
    expected = predict(stock, {**given, "sample": given["sample"][:, :4]})
    unet = mtu.upcycle(stock, **settings)
    assert_close(predict(unet, given, *names_of(unet)), expected)
    assert_close(predict(unet, rows(given, slice(None), 4)), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"only_cross_attention": True},
        {"attention_head_dim": (2, 8), "use_linear_projection": True},
        {"resnet_time_scale_shift": "scale_shift", "upcast_attention": True},
        {"cross_attention_dim": (16, 16)},
        {"conv_in_kernel": 5},
        {"mid_block_type": None},
        {"transformer_layers_per_block": (2, 1), "layers_per_block": 2},
        {"dropout": 0.1, "time_cond_proj_dim": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_uncommon_unets_are_preserved_too(changes):
    stock = stock_unet(SD, **changes)
    given = inputs(stock)
    given["sample"] = given["sample"][:, :4]
    given["encoder_attention_mask"] = torch.ones(5, 5).index_fill(1, torch.tensor([4]), 0)
    if "time_cond_proj_dim" in changes:
        given["timestep_cond"] = torch.ones(5, 8)
    expected = predict(stock, given)
    unet = mtu.upcycle(stock)
    assert_close(predict(unet, given, *names_of(unet)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_unet_keeps_its_type_and_output(dtype):
    exact = predict(stock_unet(), rows(inputs(stock_unet()), slice(None), 4))
    stock = stock_unet().to(dtype)
    given = inputs(stock)
    expected = predict(stock, rows(given, slice(None), 4)).float()
    unet = mtu.upcycle(stock)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    actual = predict(unet, given, *names_of(unet)).float()
    # Both round after every layer, in different places: as far from the exact output, within the usual factor of 2.
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max() + torch.finfo(dtype).eps * exact.max()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_weights_are_taken_over_and_not_changed(config):
    stock = stock_unet(config)
    before, addresses = snapshot(stock)[0], {k: p.data_ptr() for k, p in stock.named_parameters()}
    unet = mtu.upcycle(stock)
    per_task = {name for name in before if ".norm3." in name or name.startswith("conv_in.")}
    taken = {name: p for name, p in unet.named_parameters() if name in before and name not in per_task}
    assert taken.keys() | per_task == before.keys()
    assert any(".ff.net.2.weight" in name for name in taken)
    for name, parameter in taken.items():
        assert parameter.data_ptr() == addresses[name], name
        assert torch.equal(parameter, before[name]), name
        assert parameter.dtype == before[name].dtype


def test_experts_of_another_size_share_what_can_be_shared():
    stock = stock_unet()
    addresses = {k: p.data_ptr() for k, p in stock.named_parameters()}
    unet = mtu.upcycle(stock, num_experts=2, expert_ratio=1.0)
    names = {k for k, p in unet.named_parameters() if addresses.get(k) == p.data_ptr()}
    expected = {k for k in addresses if ".norm3." not in k and not k.startswith("conv_in.")}
    assert {k for k in expected - names} == {
        k for k in addresses if k.endswith(("ff.net.0.proj.weight", "ff.net.0.proj.bias", "ff.net.2.weight"))
    }


@pytest.mark.parametrize("norm", ["task", "task_expert"])
def test_what_is_per_task_starts_from_the_original(norm):
    stock = stock_unet()
    state = snapshot(stock)[0]
    unet = mtu.upcycle(stock, norm=norm)
    own = unet.state_dict()
    norms = [k for k in state if ".norm3." in k]
    assert norms
    for key in norms:
        dim = len(state[key])
        assert own[key].shape == ((4, dim) if norm == "task" else (4, 4, dim))
        assert (own[key] == state[key]).all()
    assert own["conv_in.weight"].shape == (4, 32, 8, 3, 3)
    assert (own["conv_in.weight"][:, :, :4] == state["conv_in.weight"]).all()
    assert (own["conv_in.weight"][:, :, 4:] == 0).all()
    assert (own["conv_in.bias"] == state["conv_in.bias"]).all()
    assert own["task_embedding.weight"].shape == (4, 16)
    assert own["task_embedding.weight"].unique(dim=0).shape[0] == 4
    stock_names, new = set(state), {k for k in own if ".ff.router." in k} | {"task_embedding.weight"}
    assert set(own) == stock_names | new


def test_defaults_are_the_papers():
    sd, sdxl = mtu.upcycle(stock_unet(SD)), mtu.upcycle(stock_unet(SDXL))
    assert (sd.config.num_experts, sdxl.config.num_experts) == (4, 1)
    assert (sd.tasks, sdxl.tasks) == (SD_TASKS, SDXL_TASKS)
    assert (sd.config.routing_scale, sdxl.config.routing_scale) == (4.0, 1.0)
    assert (sd.config.in_channels, sd.config.router_width) == (4, 16)
    assert mtu.upcycle(stock_unet(SDXL), ["edit"]).tasks == (SDXL_TASKS[1],)
    assert mtu.upcycle(stock_unet(SD), ["edit"]).tasks == (SD_TASKS[1],)


def test_the_papers_own_initialisation_is_the_plain_split():
    stock = stock_unet()
    given = inputs(stock)
    expected, weights = predict(stock, rows(given, slice(None), 4)), snapshot(stock)[0]
    unet = mtu.upcycle(stock, num_experts=2, expert_ratio=1.0, init="paper")
    assert unet.config.routing_scale == 1.0
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    assert torch.equal(unet.state_dict()[name], weights[name].repeat(1, 2))
    assert_close(predict(unet, given), expected)  # whole experts do, of any weights that add up to 1
    assert_differ(predict(mtu.upcycle(stock_unet(), init="paper"), given), expected)


def test_a_seed_decides_the_routers_alone():
    def state(seed):
        return mtu.upcycle(stock_unet(), top_k=2, expert_ratio=1.0, seed=seed).state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(5)
        first = state(0)
        torch.manual_seed(6)
        same, other = state(0), state(1)
    assert all(torch.equal(first[k], same[k]) for k in first)
    different = {k for k in first if not torch.equal(first[k], other[k])}
    assert "task_embedding.weight" in different
    assert all(k == "task_embedding.weight" or ".ff.router." in k for k in different)


def test_the_mode_checkpointing_and_processors_are_kept():
    stock = stock_unet().train()
    stock.enable_gradient_checkpointing()
    processor = next(iter(stock.attn_processors.values()))
    unet = mtu.upcycle(stock)
    assert unet.training
    assert all(module.training for module in unet.modules())
    assert unet.is_gradient_checkpointing
    assert processor in unet.attn_processors.values()
    assert not mtu.upcycle(stock_unet()).training


# --------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"expert_ratio": 0.125}, {"top_k": 1, "norm": "task_expert"}])
def test_it_warns_where_the_output_cannot_be_preserved(settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In . of . layers some expert")
        with pytest.warns(UserWarning, match="The output of the original cannot be preserved: .*") as caught:
            mtu.upcycle(stock_unet(), **settings)
        assert caught[0].filename == __file__
        mtu.upcycle(stock_unet(), init="paper", **settings)  # makes no promise


def test_it_warns_of_idle_experts_only_where_they_could_be_busy():
    with pytest.warns(UserWarning, match="some expert is used by no task, and will get no gradient") as caught:
        mtu.upcycle(stock_unet(), num_experts=8, expert_ratio=1.0, top_k=2)
    assert caught[0].filename == __file__
    mtu.upcycle(stock_unet(), ["edit"], num_experts=4, expert_ratio=1.0, top_k=2)  # 1 task · 2 < 4 experts


# ----------------------------------------------------------------------------------------------------------- errors

BAD_ARGUMENTS = [
    ({"num_experts": 3}, ValueError, "3 does not divide 128"),
    ({"num_experts": 0}, ValueError, "num_experts must be an integer"),
    ({"num_experts": 4.0}, ValueError, "num_experts must be an integer"),
    ({"num_experts": 4, "top_k": 5}, ValueError, "top_k must be at most num_experts = 4, but got 5"),
    ({"top_k": 0}, ValueError, "top_k must be"),
    ({"expert_ratio": 0}, ValueError, "expert_ratio must be a positive number"),
    ({"expert_ratio": 0.3}, ValueError, "must be a whole number"),
    ({"norm": "expert"}, ValueError, "norm must be 'task' or 'task_expert', but got 'expert'"),
    ({"init": "zero"}, ValueError, "init must be 'preserve' or 'paper', but got 'zero'"),
    ({"backend": "cuda"}, ValueError, "no backend 'cuda'"),
    ({"tasks": []}, ValueError, "at least one task"),
    ({"tasks": "edit"}, TypeError, "list of tasks"),
    ({"tasks": ["paint"]}, ValueError, "Unknown task 'paint'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_a_bad_argument_raises_one_sentence_and_spares_the_unet(settings, error, message):
    stock = stock_unet()
    before, given = snapshot(stock), rows(inputs(stock), slice(None), 4)
    expected = predict(stock, given)
    with pytest.raises(error, match=message) as caught:
        mtu.upcycle(stock, **settings)
    assert "\n" not in str(caught.value)
    assert_unchanged(stock, before)
    assert torch.equal(predict(stock, given), expected)


def test_what_is_not_a_unet_raises():
    with pytest.raises(TypeError, match=r"takes a UNet2DConditionModel.*but got Linear"):
        mtu.upcycle(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="but got PeftModel"):
        mtu.upcycle(get_peft_model(stock_unet(), LoraConfig(target_modules=["to_q"])))


def test_a_second_upcycling_raises():
    unet = mtu.upcycle(stock_unet())
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"upcycled already .*expected a stock UNet"):
        mtu.upcycle(unet)
    assert_unchanged(unet, before)


def test_a_unet_without_feed_forward_networks_raises():
    stock = stock_unet(
        SD,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match="no feed-forward networks to upcycle"):
        mtu.upcycle(stock)


@pytest.mark.parametrize("changes", [{"center_input_sample": True}, {"attention_type": "gated"}], ids=str)
def test_unets_of_another_kind_raise(changes):
    with pytest.raises(ValueError, match=r"can be upcycled|cannot be upcycled"):
        mtu.upcycle(stock_unet(SD, **changes))


@pytest.mark.parametrize("targets", [["to_q"], ["ff.net.2"], ["ff.net.0.proj", "conv_in"]], ids=str)
def test_a_unet_with_adapters_raises_and_still_works(targets):
    stock = stock_unet()
    stock.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False))
    before, given = snapshot(stock), rows(inputs(stock), slice(None), 4)
    expected = predict(stock, given)
    with pytest.raises(ValueError, match=r"[Uu]nload or fuse adapters"):
        mtu.upcycle(stock)
    assert_unchanged(stock, before)
    assert torch.equal(predict(stock, given), expected)


def test_an_editing_unet_raises():
    edits = mtu.upcycle(stock_unet()).export_task("edit")
    with pytest.raises(ValueError, match=r"text-to-image UNet with 4 input channels, but got 8"):
        mtu.upcycle(edits)


def test_a_unet_that_is_not_wholly_here_raises():
    offloaded = stock_unet()
    cpu_offload(offloaded)
    with pytest.raises(ValueError, match="upcycle"):
        mtu.upcycle(offloaded)
    cast = stock_unet()
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match="upcycle"):
        mtu.upcycle(cast)


def test_a_model_upcycled_on_meta_can_be_filled():
    filled, own = upcycled_unet(), upcycled_unet(randomised=False).to("meta")
    given = inputs(filled)
    given["task_ids"] = torch.tensor([0, 1, 2, 3, 1])
    own.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(predict(own, given), predict(filled, given))
    other = upcycled_unet(randomised=False).to("meta").to_empty(device="cpu")
    other.load_state_dict(filled.state_dict())
    assert torch.equal(predict(other, given), predict(filled, given))


def test_inference_mode():
    stock = stock_unet()
    given = inputs(stock, channels=4)
    expected = predict(stock, given)
    with torch.inference_mode():
        upcycled = mtu.upcycle(stock)
    upcycled.to("cpu")
    assert_close(predict(upcycled, given), expected)


def test_the_global_generator_is_left_alone():
    stock = stock_unet()
    state = torch.get_rng_state()
    mtu.upcycle(stock)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_pruned_export_raises():
    pruned = mtu.upcycle(stock_unet(), num_experts=2, expert_ratio=1.0).export_task("text-to-image", prune=True)
    with pytest.raises(
        ValueError, match=r"must have shape \(256, 32\) by the UNet's configuration, but got \(512, 32\)"
    ):
        mtu.upcycle(pruned)


# ------------------------------------------------------------------------------------------- meta device, the paper


def test_the_meta_device():
    with torch.device("meta"):
        stock = UNet2DConditionModel(**SD)
    unet = mtu.upcycle(stock, top_k=2, expert_ratio=1.0, norm="task_expert")
    assert all(tensor.is_meta for tensor in [*unet.parameters(), *unet.buffers()])
    given = {
        "sample": torch.empty(4, 8, 8, 8, device="meta"),
        "timestep": torch.empty(4, device="meta"),
        "encoder_hidden_states": torch.empty(4, 5, 16, device="meta"),
    }
    assert predict(unet, given, *[spec.name for spec in unet.tasks]).shape == (4, 4, 8, 8)
    exported = mtu.upcycle(UNet2DConditionModel(**SD).to("meta")).export_task("edit")
    assert exported.conv_in.weight.shape == (32, 8, 3, 3)


@pytest.mark.parametrize(
    ("config", "stock_millions", "blocks", "trained_billions", "ratio"),
    [
        pytest.param(BUILT_IN_UNET_CONFIGS["sd15"], 859.5, 16, 0.1584, 1.011, id="sd15"),
        pytest.param(BUILT_IN_UNET_CONFIGS["sdxl"], 2567.5, 70, 1.524, 1.115, id="sdxl", marks=pytest.mark.slow),
    ],
)
def test_the_papers_parameter_counts(config, stock_millions, blocks, trained_billions, ratio):
    with init_empty_weights():
        stock = UNet2DConditionModel(**config)
    count = stock.num_parameters()
    assert round(count / 1e6, 1) == stock_millions
    unet = mtu.upcycle(stock)
    trained = sum(parameter.numel() for parameter in unet.trainable_parameters())
    assert len(unet.routed_feed_forwards()) == blocks
    # The paper's figures count what is new or trained beyond the input convolution: 158.40 M, 158.49 M with it.
    without_conv_in = trained - sum(parameter.numel() for parameter in unet.conv_in.parameters())
    assert round(without_conv_in / 1e9, 4 if trained_billions < 1 else 3) == trained_billions
    assert trained == sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert unet.num_parameters() / count == pytest.approx(ratio, abs=5e-4)
    routers = sum(p.numel() for name, p in unet.named_parameters() if ".router." in name or "task_embedding" in name)
    assert (unet.num_parameters() - routers) / count < 1.001
