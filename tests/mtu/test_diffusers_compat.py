"""What mtu relies on beyond the public interfaces of diffusers is still so: a test for each entry, by its name."""

import inspect

import pytest
from diffusers import UNet2DConditionModel

import mtu
from mtu.diffusers_compat import PRIVATE_WAYS, expand_block_scales
from tests.mtu.tiny import SD, stock_unet, upcycled_unet


@pytest.mark.parametrize("name", PRIVATE_WAYS)
def test_each_private_way_has_a_test(name):
    assert callable(globals().get(f"test_{name}"))


def test_block_scales():
    (scales,) = expand_block_scales(stock_unet(SD), [{"down": 0.5, "up": {"block_1": [0.1, 0.2]}}])
    attentions = {"down_blocks.0": [0.5], "mid_block": [1.0], "up_blocks.1": [0.1, 0.2]}
    assert scales == {f"{name}.attentions.{i}": v for name, values in attentions.items() for i, v in enumerate(values)}
    assert expand_block_scales(stock_unet(SD), [None, 0.3]) == [1.0, 0.3]


def test_constructor_signature():
    own, stock = (
        set(inspect.signature(cls.__init__).parameters) for cls in (mtu.MTUUNet2DConditionModel, UNet2DConditionModel)
    )
    assert stock < own
    assert (own - {"self"}) <= set(upcycled_unet(SD).config)
