"""Every method of a pipeline whose UNet is in a state: the plain one's result, or one sentence before any change."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import mtu
from tests.mtu.outputs import TOLERANCE
from tests.mtu.pipelines.conftest import stock_pipeline
from tests.mtu.states import (
    State,
    adapted,
    adapted_in_plain_weights,
    cast,
    cpu_offloaded,
    disk_offloaded,
    group_offloaded,
    plain,
    quantized,
    rounded_as_cast,
)

CLOSE = 10 * TOLERANCE
TASKS = ["edit", "text-to-image"]


def compiled(unet, folder):
    return mtu.compile(unet, "eager")


def call(pipe):
    given = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    given["generator"] = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    if isinstance(pipe, mtu.MTUPipeline):
        given |= {"image": [torch.full((3, 16, 16), 0.25), None], "task": TASKS}
    return pipe(["a cat", "a dog"], **given).images


def saved(pipe, folder, lora):
    pipe.save_pretrained(folder / "whole")
    return call(mtu.MTUPipeline.from_pretrained(folder / "whole"))


def exported(pipe, folder, lora):
    stock = pipe.export_task("text-to-image")
    assert type(stock) is StableDiffusionPipeline
    return call(stock)


def with_lora(pipe, folder, lora):
    pipe.load_lora_weights(lora, adapter_name="one")
    loaded = call(pipe)
    pipe.set_adapters("one", 0.5)
    half = call(pipe)
    pipe.unload_lora_weights()
    return loaded, half, call(pipe)


def with_fused_lora(pipe, folder, lora):
    pipe.load_lora_weights(lora, adapter_name="one")
    pipe.fuse_lora(lora_scale=0.5)
    fused = call(pipe)
    pipe.unfuse_lora()
    return fused, call(pipe)


METHODS: dict[str, Any] = {
    "call": lambda pipe, folder, lora: call(pipe),
    "export_task": exported,
    "save_pretrained": saved,
    "lora": with_lora,
    "fused_lora": with_fused_lora,
}
LORA = ("lora", "fused_lora")
OFFLOADED = {"export_task": "pipeline that is not offloaded is needed"}
STATES = {
    "cpu_offload": State(cpu_offloaded, plain, OFFLOADED, LORA),
    "disk_offload": State(disk_offloaded, plain, OFFLOADED, LORA),
    "group_leaves": State(functools.partial(group_offloaded, kind="leaf_level"), refuses=OFFLOADED),
    "group_disk": State(functools.partial(group_offloaded, kind="block_level", on_disk=True), plain, OFFLOADED, LORA),
    "cast": State(
        functools.partial(cast, storage=torch.bfloat16),
        functools.partial(rounded_as_cast, storage=torch.bfloat16),
        stock_fails=LORA,
    ),
    "compiled": State(compiled),
    "adapted": State(
        adapted,
        adapted_in_plain_weights,
        dict.fromkeys(("export_task", "save_pretrained"), "Unload adapters, .* of peft"),
        LORA,
    ),
    "quantized": State(
        quantized,
        functools.partial(quantized, wrapped=False),
        dict.fromkeys(("export_task", "save_pretrained"), "needs plain tensors, but .* Rounded"),
    ),
}
EXPECTED: dict[tuple[Callable, str], Any] = {}


@pytest.fixture(scope="module")
def lora(shared_pipe, tmp_path_factory):
    """A folder with a LoRA for the UNet."""
    folder = tmp_path_factory.mktemp("lora")
    unet = copy.deepcopy(shared_pipe.unet)
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    for parameter in unet.parameters():  # values that every state can hold as they are
        parameter.data = parameter.data.bfloat16().float()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


CELLS = [
    pytest.param(name, method, marks=() if method == "call" else pytest.mark.slow)
    for name, state in STATES.items()
    for method in METHODS
    if method not in state.stock_fails
]


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_method_of_a_pipeline_in_a_state(name, method, pipe, shared_pipe, lora, tmp_path):
    state = STATES[name]
    key = state.like, method
    if method not in state.refuses and key not in EXPECTED:
        other = copy.deepcopy(shared_pipe)
        other.set_progress_bar_config(disable=True)
        state.like(other.unet, tmp_path / "like")
        EXPECTED[key] = METHODS[method](other, tmp_path / "plain", lora)
    state.put(pipe.unet, tmp_path)
    if method not in state.refuses:
        torch.testing.assert_close(METHODS[method](pipe, tmp_path, lora), EXPECTED[key], rtol=0, atol=CLOSE)
        return
    before = call(pipe)
    with pytest.raises(ValueError, match=state.refuses[method]) as caught:
        METHODS[method](pipe, tmp_path, lora)
    assert str(caught.value).endswith(".")
    assert ". " not in str(caught.value)
    assert not (tmp_path / "whole").exists()
    assert torch.equal(call(pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(name, m) for name, state in STATES.items() for m in state.stock_fails])
def test_what_is_left_out_is_what_stock_pipelines_fail_at(name, method, lora, tmp_path):
    """They raise, or adapters compute in the dtype that weights are stored in."""
    like, stock = stock_pipeline(), stock_pipeline()
    STATES[name].like(like.unet, tmp_path / "like")
    expected = METHODS[method](like, tmp_path, lora)
    STATES[name].put(stock.unet, tmp_path)
    with pytest.raises(Exception, match=r".+"):  # of any kind, as it is not ours; or the result is another
        torch.testing.assert_close(METHODS[method](stock, tmp_path, lora), expected, rtol=0, atol=CLOSE)
