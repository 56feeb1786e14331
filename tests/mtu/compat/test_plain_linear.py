"""Which linear layers are their weight and bias, and which have to be called."""

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from mtu.compat.plain_linear import is_plain_linear
from mtu.models.ffn import why_not_upcyclable

from ..outputs import assert_close, predict
from ..tiny import inputs, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def take_the_tensors_away(linear):
    """As LyCORIS does: another forward, and tensors that are held elsewhere."""
    weight, bias = linear.weight, linear.bias
    del linear.weight, linear.bias
    linear.forward = lambda x: nn.functional.linear(x, weight, bias)


def replace_the_forward(linear):
    linear.forward = functools.partial(nn.Linear.forward, linear)


def old_weight_norm(linear):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(linear)


CHANGES = [
    take_the_tensors_away,
    replace_the_forward,
    lambda linear: linear.register_parameter("bias", None),
    lambda linear: delattr(linear, "bias"),
    lambda linear: delattr(linear, "weight"),
    lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
    parametrizations.weight_norm,
    old_weight_norm,
    lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    lambda linear: linear.to(torch.float8_e4m3fn),
    lambda linear: setattr(linear, "weight", nn.Parameter(TwoTensor(*[linear.weight.detach()] * 2))),
    lambda linear: add_hook_to_module(linear, ModelHook()),
    lambda linear: linear.register_forward_hook(lambda *_: None),
    lambda linear: linear.register_full_backward_hook(lambda *_: None),
]
NAMES_OF_CHANGES = [
    *("tensors taken away", "forward", "bias=None", "no bias", "no weight", "parametrized", "weight_norm"),
    *("old weight_norm", "pruned", "float8", "subclass", "offloaded", "forward hook", "backward hook"),
]


@pytest.mark.parametrize("change", CHANGES, ids=NAMES_OF_CHANGES)
def test_a_linear_that_is_more_than_its_tensors_is_not_plain(change):
    linear = nn.Linear(4, 4)
    assert is_plain_linear(linear)
    change(linear)
    assert not is_plain_linear(linear)
    block = next(iter(upcycled_unet().routed_blocks_by_name().values()))
    change(block.ff.net[2])
    block.norm3 = nn.LayerNorm(32)
    assert "ff.net.2 is a " in why_not_upcyclable(block)


def test_a_linear_whose_hook_was_taken_off_is_plain_again():
    linear = nn.Linear(4, 4)
    add_hook_to_module(linear, ModelHook())
    remove_hook_from_module(linear)
    assert is_plain_linear(linear)
    assert is_plain_linear(linear.to("meta"))


@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "norm": "task_expert"}], ids=["dense", "top2-expert_norms"])
@pytest.mark.parametrize("change", [take_the_tensors_away, nn.utils.parametrizations.weight_norm])
def test_a_network_of_such_layers_calls_them(change, settings):
    unet = upcycled_unet(**settings)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    for layer in unet.routed_feed_forwards():
        change(layer.net[0].proj)
        change(layer.net[2])
    assert_close(predict(unet, given, *NAMES), expected)


def test_a_network_without_biases():
    unet = upcycled_unet()
    given = inputs(unet)
    for layer in unet.routed_feed_forwards():
        nn.init.zeros_(layer.net[0].proj.bias)
        nn.init.zeros_(layer.net[2].bias)
    expected = predict(unet, given, *NAMES)
    for layer in unet.routed_feed_forwards():
        layer.net[0].proj.register_parameter("bias", None)
        layer.net[2].register_parameter("bias", None)
    assert_close(predict(unet, given, *NAMES), expected)
