"""The upcycled UNet's forward pass: tasks of a batch, its inputs, routing, modes."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

import mtu

from ..outputs import assert_close, assert_differ, assert_unchanged, predict, rows, snapshot
from ..tiny import FAMILIES, SD, inputs, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"top_k": 2, "num_experts": 4}, id="top2"),
    pytest.param({"top_k": 1, "norm": "task_expert", "num_experts": 8}, id="expert_norms_top1"),
    pytest.param({"num_experts": 2, "expert_ratio": 0.75}, id="uneven"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(config, settings):
    unet = upcycled_unet(config, **settings)
    given = inputs(unet)
    mixed = predict(unet, given, *NAMES)
    for i, name in enumerate(NAMES):
        assert_close(predict(unet, rows(given, slice(i, i + 1)), name)[0], mixed[i])
    for name in ("text-to-image", "edit"):
        assert_differ(predict(unet, given, *[name] * 5)[0], mixed[0])


def test_repeated_tasks_and_any_order():
    unet = upcycled_unet()
    given, order = inputs(unet), torch.tensor([3, 1, 0, 4, 2])
    mixed = predict(unet, given, *NAMES)
    shuffled = predict(unet, rows(given, order), *[NAMES[i] for i in order])
    assert_close(shuffled, mixed[order])
    twins = predict(unet, rows(given, torch.tensor([2, 2, 2])), "edit", "remove", "edit")
    assert_close(twins[2], twins[0])
    assert_differ(twins[1], twins[0])


def test_one_id_serves_the_batch_and_none_is_the_first_task():
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *["edit"] * 5)
    assert torch.equal(predict(unet, given, "edit"), expected)
    assert torch.equal(predict(unet, given, task_ids=unet.task_ids("edit")), expected)
    assert torch.equal(predict(unet, given), predict(unet, given, "text-to-image"))


def test_task_ids_are_int64_positions():
    unet = upcycled_unet()
    ids = unet.task_ids(NAMES)
    assert (ids.dtype, ids.tolist()) == (torch.int64, [3, 0, 1, 2, 1])
    assert unet.task_ids(NAMES, device="meta").is_meta
    assert [unet.task_index(spec.name) for spec in unet.tasks] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="Unknown task 'paint': this model has"):
        unet.task_ids(["edit", "paint"])


def test_tuples_and_dataclasses():
    unet = upcycled_unet()
    given = inputs(unet)
    assert torch.equal(unet(**given, return_dict=False)[0], unet(**given).sample)


@pytest.mark.parametrize("count", [4, 5, 6, 7, 8])
def test_missing_channels_count_as_zero(count):
    unet = upcycled_unet()
    given = inputs(unet)
    given["sample"][:, count:] = 0
    assert_close(predict(unet, rows(given, slice(None), count), *NAMES), predict(unet, given, *NAMES))


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_channels_beyond_a_tasks_own_are_ignored(junk):
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    given["sample"][NAMES.index("text-to-image"), 4:] = junk
    assert torch.equal(predict(unet, given, *NAMES), expected)


@pytest.mark.parametrize("count", [3, 9])
def test_a_wrong_number_of_channels_raises(count):
    unet = upcycled_unet()
    with pytest.raises(ValueError, match=f"sample must have 4 to 8 channels .* but got {count}"):
        predict(unet, inputs(unet, channels=count), "edit")


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (torch.zeros(5, dtype=torch.int32), r"int64 tensor of shape \(5,\), but got torch.int32"),
        (torch.zeros(5), "but got torch.float32"),
        (torch.zeros(5, 1, dtype=torch.int64), r"but got torch.int64 \(5, 1\)"),
        (torch.tensor(0), r"but got torch.int64 \(\)"),
        ([0, 1, 2, 3, 0], r"but got \[0, 1, 2, 3, 0\]"),
        (1, "but got 1"),
        (torch.zeros(4, dtype=torch.int64), "one id for each of 5 samples, but got 4"),
        (torch.zeros(0, dtype=torch.int64), "one id for each of 5 samples, but got 0"),
        (torch.tensor([0, 1, 2, 3, 4]), r"in \[0, 4\), but got 4"),
        (torch.tensor([0, 1, -1, 3, 0]), r"in \[0, 4\), but got -1"),
        (torch.tensor([4]), r"in \[0, 4\), but got 4"),
    ],
)
def test_bad_task_ids_raise(task_ids, message):
    unet = upcycled_unet()
    with pytest.raises(ValueError, match=message):
        predict(unet, inputs(unet), task_ids=task_ids)


def test_control_and_adapter_residuals_pass_through():
    unet, names = upcycled_unet(), ["edit"] * 5
    given = inputs(unet)
    exported = unet.export_task("edit")
    shapes = [(32, 8, 12), (32, 8, 12), (32, 4, 6), (64, 4, 6)]
    generator = torch.Generator().manual_seed(7)
    control = {
        "down_block_additional_residuals": tuple(torch.randn(5, *shape, generator=generator) for shape in shapes),
        "mid_block_additional_residual": torch.randn(5, 64, 4, 6, generator=generator),
    }
    expected = predict(exported, {**given, **control})
    assert_close(predict(unet, {**given, **control}, *names), expected)
    assert_differ(predict(unet, given, *names), expected)
    adapter = {"down_intrablock_additional_residuals": [torch.randn(5, 32, 8, 12), torch.randn(5, 64, 4, 6)]}
    expected = predict(exported, {**given, **copy.deepcopy(adapter)})
    assert_close(predict(unet, {**given, **copy.deepcopy(adapter)}, *names), expected)


def test_masks_and_attention_arguments_pass_through():
    unet = upcycled_unet()
    given = inputs(unet)
    mask = torch.ones(5, 5).index_fill(1, torch.tensor([3, 4]), 0)
    short = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :3]}
    kwargs = {"cross_attention_kwargs": {"scale": 1.0}}
    assert_close(predict(unet, {**given, "encoder_attention_mask": mask}, *NAMES), predict(unet, short, *NAMES))
    assert torch.equal(predict(unet, {**given, **kwargs}, *NAMES), predict(unet, given, *NAMES))
    assert set(kwargs["cross_attention_kwargs"]) == {"scale"}


@pytest.mark.parametrize("settings", SETTINGS)
def test_router_weights(settings):
    unet = upcycled_unet(**settings)
    weights = unet.router_weights()
    config = unet.expert_config
    assert weights.shape == (4, 4, config.num_experts)
    assert weights.dtype == torch.float32
    assert ((weights > 0).sum(-1) == config.num_active_experts).all()
    # A softmax sums to 1 within a rounding for each of its at most 8 terms.
    torch.testing.assert_close(weights.sum(-1), torch.full((4, 4), config.routing_scale), rtol=8 * 2**-23, atol=0)
    weights.zero_()
    assert (unet.router_weights().sum(-1) > 0).all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropping_the_routers_changes_no_bit_of_the_output(settings, dtype):
    unet = upcycled_unet(**settings).to(dtype)
    given = inputs(unet)
    expected, weights = predict(unet, given, *NAMES), unet.router_weights()
    names = {name for name, _ in unet.named_parameters() if ".router." in name or name == "task_embedding.weight"}
    unet.drop_routers_()
    assert names
    assert not names & {name for name, _ in unet.named_parameters()}
    assert torch.equal(predict(unet, given, *NAMES), expected)
    assert torch.equal(unet.router_weights(), weights)
    assert unet.config.routers_dropped
    unet.to(torch.bfloat16)
    assert torch.equal(unet.router_weights(), weights)
    assert {layer.router.weights.dtype for layer in unet.routed_feed_forwards()} == {torch.float32}


def test_dropping_the_routers_twice_raises():
    unet = upcycled_unet()
    unet.drop_routers_()
    before = snapshot(unet)
    with pytest.raises(ValueError, match="dropped already"):
        unet.drop_routers_()
    assert_unchanged(unet, before)


def test_the_routing_cache_follows_the_parameters():
    unet = upcycled_unet()
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    unet.load_state_dict(upcycled_unet(seed=3).state_dict())
    unet.task_embedding.weight.data.mul_(-2)
    cached = predict(unet, given, *NAMES)
    unet.clear_routing_cache()
    assert torch.equal(predict(unet, given, *NAMES), cached)
    assert_differ(cached, before)
    assert all(layer.router._cache is not None for layer in unet.routed_feed_forwards())
    unet.train()
    unet.clear_routing_cache()
    predict(unet, given, *NAMES)
    assert all(layer.router._cache is None for layer in unet.routed_feed_forwards())


def test_backends():
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.set_backend("reference")
    assert {layer.backend for layer in unet.routed_feed_forwards()} == {"reference"}
    assert_close(predict(unet, given, *NAMES), expected)
    with pytest.raises(ValueError, match="no backend 'fast'"):
        unet.set_backend("fast")
    assert {layer.backend for layer in unet.routed_feed_forwards()} == {"reference"}
    assert mtu.upcycle(stock_unet(), backend="eager").routed_feed_forwards()[0].backend == "eager"


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_model_is_its_configuration_and_state(settings):
    unet = upcycled_unet(**settings)
    given = inputs(unet)
    twin = mtu.MTUUNet2DConditionModel.from_config(unet.config).eval()
    twin.load_state_dict(unet.state_dict())
    assert twin.expert_config == unet.expert_config
    assert twin.tasks == unet.tasks
    assert torch.equal(predict(twin, given, *NAMES), predict(unet, given, *NAMES))


def test_a_deep_copy_is_independent():
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    twin = copy.deepcopy(unet)
    assert torch.equal(predict(twin, given, *NAMES), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.remove_task("edit")
    assert torch.equal(predict(unet, given, *NAMES), expected)


def test_the_constructor_checks_its_arguments():
    good = {**SD, "tasks": ["edit"], "num_experts": 4, "expert_ratio": 0.25, "routing_scale": 4.0, "router_width": 16}
    assert isinstance(mtu.MTUUNet2DConditionModel(**good), UNet2DConditionModel)
    for changes in ({"tasks": []}, {"num_experts": 3}, {"top_k": 9}, {"norm": "no"}, {"center_input_sample": True}):
        with pytest.raises(ValueError, match=r"must|task|can"):
            mtu.MTUUNet2DConditionModel(**{**good, **changes})
    with pytest.raises(TypeError, match="colour"):
        mtu.MTUUNet2DConditionModel(**good, colour="red")


@pytest.mark.parametrize("settings", SETTINGS)
def test_bfloat16_is_as_exact_as_stock_bfloat16(settings):
    unet = upcycled_unet(**settings)
    exported = unet.export_task("edit", prune="expert_ratio" in settings)
    given = inputs(unet)
    exact = predict(unet, given, "edit")
    low = inputs(unet.to(torch.bfloat16))
    error = (predict(unet, low, "edit").float() - exact).abs().max()
    stock_error = (predict(exported.to(torch.bfloat16), low).float() - exact).abs().max()
    assert error <= 2 * stock_error + torch.finfo(torch.bfloat16).eps * exact.abs().max()
