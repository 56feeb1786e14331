"""Adding and removing tasks: the others keep every bit."""

import dataclasses

import pytest
import torch
from torch.nn.utils import parametrize

from mtu import TaskSpec

from ..outputs import assert_close, assert_differ, assert_unchanged, predict, rows, snapshot
from ..tiny import FAMILIES, inputs, upcycled_unet

OLD = ("text-to-image", "edit", "super-resolution", "remove", "edit")
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"top_k": 2, "num_experts": 4}, id="top2"),
]


def own_rows(unet, name):
    """What task `name` owns, and what all tasks share, by name."""
    index, channels = unet.task_index(name), 4 + unet.tasks[unet.task_index(name)].condition_channels
    own = {}
    for key, tensor in unet.state_dict().items():
        if key == "conv_in.weight":
            own[key] = tensor[index, :, :channels].clone()
        elif ".norm3." in key or key in ("conv_in.bias", "task_embedding.weight"):
            own[key] = tensor[index].clone()
        else:
            own[key] = tensor.clone()
    return own


def assert_same_rows(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("channels", [0, 2, 4, 9])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_new_task_leaves_the_others_bit_identical(config, settings, channels):
    unet = upcycled_unet(config, **settings)
    given = inputs(unet)
    before, expected = {name: own_rows(unet, name) for name in set(OLD)}, predict(unet, given, *OLD)
    assert unet.add_task(TaskSpec("depth", condition_channels=channels), init_from="edit") == 4
    assert [spec.name for spec in unet.tasks] == [*OLD[:4], "depth"]
    assert unet.conv_in.in_channels == 4 + max(4, channels)
    assert unet.config.in_channels == 4
    assert (unet.conv_in.weight[4, :, 4 + channels :] == 0).all()  # kernels are padded with zeros
    for name, tensors in before.items():
        assert_same_rows(own_rows(unet, name), tensors)
    assert_close(predict(unet, given, *OLD), expected)
    assert all(p.requires_grad for p in unet.trainable_parameters())


@pytest.mark.parametrize("channels", [4, 9])
def test_a_new_task_starts_as_the_one_it_is_made_from(channels):
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, "remove")
    unet.add_task(TaskSpec("depth", condition_channels=channels), "remove")
    wide = {**given, "sample": torch.cat([given["sample"], torch.randn(5, channels - 4, 8, 12)], dim=1)}
    assert_close(predict(unet, wide, "depth"), expected)  # new channels start at zero
    assert_close(predict(unet, wide, "remove"), expected)  # and those beyond its own do not exist for the old task
    assert_differ(predict(unet, wide, "text-to-image"), expected)
    unet.add_task(TaskSpec("sketch"))
    assert_close(predict(unet, given, "sketch"), predict(unet, rows(given, slice(None), 4), "text-to-image"))


def test_a_new_task_is_trained_alone():
    unet = upcycled_unet()
    unet.add_task(TaskSpec("depth"), "edit")
    expected = own_rows(unet, "edit")
    unet(**inputs(unet), task_ids=unet.task_ids("depth").expand(5)).sample.sum().backward()
    for name, parameter in unet.named_trainable_parameters():
        if ".ff." not in name:
            assert parameter.grad is not None
            assert parameter.grad[4].abs().max() > 0
            assert (parameter.grad[:4] == 0).all()
    assert_same_rows(own_rows(unet, "edit"), expected)


@pytest.mark.parametrize("name", ["text-to-image", "edit", "remove"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dropped", [False, True])
def test_removing_a_task_leaves_the_others_bit_identical(settings, name, dropped):
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    kept = [other for other in OLD if other != name]
    index = torch.tensor([i for i, other in enumerate(OLD) if other != name])
    given = inputs(unet)
    expected, before = predict(unet, given, *OLD)[index], unet.router_weights()
    unet.remove_task(name)
    assert [spec.name for spec in unet.tasks] == list(dict.fromkeys(kept))
    assert_close(predict(unet, rows(given, index), *kept), expected)
    others = [i for i, other in enumerate(OLD[:4]) if other != name]
    # Products of 3 and of 4 rows may be summed in another order: 16 terms of about 1.
    torch.testing.assert_close(unet.router_weights(), before[:, others], rtol=0, atol=16 * 4 * 2**-23)


def test_removing_the_widest_task_narrows_the_convolution():
    unet = upcycled_unet()
    before, given = snapshot(unet), inputs(unet)
    expected = predict(unet, given, *OLD)
    unet.add_task(TaskSpec("wide", condition_channels=9))
    unet.remove_task("wide")
    assert unet.conv_in.weight.shape == before[0]["conv_in.weight"].shape
    assert torch.equal(predict(unet, given, *OLD), expected)
    for name in ("edit", "super-resolution", "remove"):
        unet.remove_task(name)
    assert unet.conv_in.in_channels == 4
    assert_close(predict(unet, rows(given, slice(None), 4)), predict(upcycled_unet(), given, "text-to-image"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([TaskSpec("edit")], ValueError, "'edit' exists already"),
        ([TaskSpec("depth"), "paint"], ValueError, "Unknown task 'paint'"),
        (["depth"], TypeError, "takes a TaskSpec, but got str"),
        ([{"name": "depth"}], TypeError, "takes a TaskSpec, but got dict"),
    ],
)
def test_a_task_that_cannot_be_added_changes_nothing(arguments, error, message):
    unet = upcycled_unet()
    before = snapshot(unet)
    with pytest.raises(error, match=message):
        unet.add_task(*arguments)
    assert_unchanged(unet, before)


def test_no_task_can_be_added_without_routers():
    unet = upcycled_unet()
    unet.drop_routers_()
    before = snapshot(unet)
    with pytest.raises(ValueError, match="once the routers are dropped"):
        unet.add_task(TaskSpec("depth"))
    assert_unchanged(unet, before)


def test_the_last_task_and_an_unknown_one_cannot_be_removed():
    unet = upcycled_unet(tasks=["edit"])
    before = snapshot(unet)
    with pytest.raises(ValueError, match="'edit' is the only task"):
        unet.remove_task("edit")
    with pytest.raises(ValueError, match="Unknown task 'depth'"):
        unet.remove_task("depth")
    assert_unchanged(unet, before)


def test_a_changed_model_saves_and_loads(tmp_path):
    unet = upcycled_unet()
    unet.remove_task("edit")
    unet.add_task(dataclasses.replace(TaskSpec("depth"), condition_channels=6), "remove")
    given, names = inputs(unet, channels=10), ("depth", "remove", "text-to-image", "depth", "super-resolution")
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    assert loaded.tasks == unet.tasks
    assert torch.equal(predict(loaded, given, *names), predict(unet, given, *names))


def test_parametrized_modules_are_refused_before_anything_changes():
    """A parametrization makes a subclass, whose parameters no longer hold the rows."""
    unet = upcycled_unet()
    parametrize.register_parametrization(unet.conv_in, "bias", torch.nn.Identity())
    before = snapshot(unet)
    for change in (lambda: unet.add_task(TaskSpec("new")), lambda: unet.remove_task("edit")):
        with pytest.raises(ValueError, match="conv_in is wrapped in a ParametrizedTaskConvIn"):
            change()
    assert_unchanged(unet, before)
