"""A stock UNet in every state, upcycled: one sentence before anything changes, or the model that it makes in memory."""

import functools

import pytest
import torch

import mtu

from .states import (
    SMALL,
    adapted,
    cast,
    compiled,
    compiled_blocks,
    cpu_offloaded,
    disk_offloaded,
    dispatched,
    group_offloaded,
    quantized,
    without_values,
    wrapped_by_compiler,
)
from .tiny import stock_unet

LAYERS = "cannot be upcycled: .* not a plain nn.Linear"
PLACE = "wholly in one place, before offloading"
COMPILED = "takes a UNet that is not compiled"
STATES = {
    "cpu_offload": (cpu_offloaded, LAYERS),
    "disk_offload": (disk_offloaded, LAYERS),
    "dispatched": (dispatched, LAYERS),
    "group_blocks": (functools.partial(group_offloaded, kind="block_level"), PLACE),
    "group_leaves": (functools.partial(group_offloaded, kind="leaf_level"), LAYERS),
    "group_disk": (functools.partial(group_offloaded, kind="block_level", on_disk=True), PLACE),
    "cast": (functools.partial(cast, storage=torch.bfloat16), LAYERS),
    "quantized": (quantized, LAYERS),
    "adapted": (adapted, LAYERS),
    "mtu.compile": (compiled, COMPILED),
    "compiled_blocks": (compiled_blocks, COMPILED),
    "unet.compile": (lambda unet, folder: (unet.compile(backend="eager"), unet)[1], COMPILED),
    "torch.compile": (wrapped_by_compiler, "takes a UNet2DConditionModel, but got OptimizedModule"),
}
MAKING = {
    "upcycle": lambda unet, folder: mtu.upcycle(unet, ["edit", "remove"], num_experts=2),
    "load_trained": mtu.load_trained,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    MAKING["upcycle"](stock_unet(SMALL), None).save_trained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", MAKING)
@pytest.mark.parametrize("name", STATES)
def test_a_stock_unet_in_a_state(name, verb, trained, tmp_path):
    put, message = STATES[name]
    unet = put(stock_unet(SMALL), tmp_path)
    parts, config = [*unet.parameters(), *unet.modules()], dict(unet.config)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        MAKING[verb](unet, trained)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert ". " not in sentence
    assert dict(unet.config) == config
    assert all(now is then for now, then in zip([*unet.parameters(), *unet.modules()], parts, strict=True))


@pytest.mark.parametrize("verb", MAKING)
def test_a_stock_unet_without_values(verb, trained, tmp_path):
    made = MAKING[verb](without_values(stock_unet(SMALL), tmp_path), trained)
    assert [spec.name for spec in made.tasks] == ["edit", "remove"]
    assert all(parameter.is_meta for parameter in made.parameters())
