"""Layerwise casting: layers that the stock model casts are rounded to the storage dtype, and nothing else is."""

import copy

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

from .outputs import TOLERANCE, assert_close, predict
from .tiny import WITH_AND_WITHOUT_ROUTERS, inputs, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
# The fast tier casts in `test_states.py`.
pytestmark = pytest.mark.slow


def model(settings, dropped):
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    return unet


def rounded(unet, storage):
    """A copy with the weights of its layers in the storage dtype, and back."""
    twin = copy.deepcopy(unet)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "norm" not in name:
            module.to(storage).to(torch.float32)
    return twin


def cast_by_the_model(unet, storage, compute):
    unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)


def cast_every_layer(unet, storage, compute):
    apply_layerwise_casting(unet, storage, compute, skip_modules_pattern=None, skip_modules_classes=())


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [cast_by_the_model, cast_every_layer])
@pytest.mark.parametrize(("settings", "dropped"), WITH_AND_WITHOUT_ROUTERS)
def test_the_layers_of_the_stock_model_alone_are_rounded(settings, dropped, cast, storage):
    unet = model(settings, dropped)
    given, routing, twin = inputs(unet), unet.router_weights(), rounded(unet, storage)
    cast(unet, storage, torch.float32)
    assert torch.equal(unet.router_weights(), routing)
    for _ in range(2):
        assert_close(predict(unet, given, *NAMES), predict(twin, given, *NAMES))
    with torch.no_grad(), unet.precomputed_routing_context():
        assert_close(predict(unet, given, *NAMES), predict(twin, given, *NAMES))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("settings", "dropped"), WITH_AND_WITHOUT_ROUTERS)
def test_computing_in_low_precision(settings, dropped, own):
    """Rounding errors are at most twice those of the same weights in a bfloat16 model."""
    unet, dtype = model(settings, dropped).to(own), torch.bfloat16
    twin = rounded(copy.deepcopy(unet).float(), torch.float8_e4m3fn)
    given = inputs(twin)
    expected = predict(twin, given, *NAMES)
    low = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in given.items()}
    allowed = (predict(twin.to(dtype), low, *NAMES) - expected).abs().max() / expected.abs().max()
    cast_by_the_model(unet, torch.float8_e4m3fn, dtype)
    assert unet.dtype == dtype
    output = predict(unet, low, *NAMES)
    assert output.dtype == dtype
    assert_close(output.float(), expected, 2 * float(allowed) + TOLERANCE)


@pytest.mark.parametrize(("settings", "dropped"), WITH_AND_WITHOUT_ROUTERS)
def test_the_whole_model_at_once(settings, dropped):
    """What routes keeps its precision even then, and precomputed tables are not made from rounded values."""
    unet, dtype = model(settings, dropped), torch.float8_e4m3fn
    given = inputs(unet)
    apply_layerwise_casting(unet, dtype, torch.float32, skip_modules_pattern=None)
    output = predict(unet, given, *NAMES)
    with torch.no_grad(), unet.precomputed_routing_context():
        assert torch.equal(predict(unet, given, *NAMES), output)
    twin = model(settings, dropped)
    routing = twin.router_weights()
    assert torch.equal(unet.router_weights(), routing)
    assert_close(output, predict(twin.to(dtype).to(torch.float32), given, *NAMES))
