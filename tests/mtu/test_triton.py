"""Upcycled UNets on the backend "triton": what they compute, how they learn, and what they leave to the modules."""

from typing import cast

import pytest
import torch
from peft import LoraConfig

import mtu
from mtu_kernels import available_backends

from .outputs import TOLERANCE, assert_close, predict
from .tiny import FAMILIES, SD, SDXL, inputs, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image")
SETTINGS = [
    pytest.param(SD, {}, id="sd-dense"),
    pytest.param(SDXL, {"num_experts": 1}, id="sdxl-dense", marks=pytest.mark.slow),
    pytest.param(
        SDXL, {"num_experts": 4, "top_k": 2, "norm": "task_expert"}, id="sdxl-top2-expert_norms", marks=pytest.mark.slow
    ),
]
MID = "UNetMidBlock2DCrossAttn"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="Triton is not installed")


def operators_of(function):
    """Names of the operators of `mtu_kernels` that a call runs, each as often as it runs."""
    with torch.profiler.profile() as profile:
        result = function()
    names = [event.name for event in profile.events() or ()]
    return [name.removeprefix("mtu_kernels::") for name in names if name.startswith("mtu_kernels::")], result


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def few_tokens(unet, channels=8):
    """Inputs of two samples, of 24 tokens at most, as the interpreter takes its time for each tile."""
    given = inputs(unet, batch=2, channels=channels)
    given["sample"] = given["sample"][..., :4, :6]
    return given


def on(device, given):
    return {k: on(device, v) if isinstance(v, dict) else v.to(device) for k, v in given.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "settings"), SETTINGS)
def test_a_mixed_batch(config, settings, device):
    unet = upcycled_unet(config, **settings)
    given = few_tokens(unet)
    unet.set_backend("eager")
    expected = predict(unet, given, *NAMES)
    unet.set_backend("triton")
    names, actual = operators_of(lambda: predict(unet.to(device), on(device, given), *NAMES))
    assert names == ["moe_ffn_triton"] * len(unet.routed_feed_forwards())
    assert_close(actual.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointing"])
def test_training(checkpointing, device):
    """Both families, dense and top-k, with and without checkpointing, in the fewest models: the interpreter is slow."""
    config, settings = cast(tuple[dict, dict], SETTINGS[2 if checkpointing else 0].values)
    # Two transformer blocks.
    config = {**config, "up_block_types": ("UpBlock2D", "UpBlock2D"), "mid_block_type": None if checkpointing else MID}
    gradients = []
    for backend in ("eager", "triton"):
        unet = upcycled_unet(config, **settings).train().to(device)
        unet.set_backend(backend)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        given = on(device, few_tokens(unet.cpu()))
        unet.to(device)

        def step(unet=unet, given=given):
            unet(**given, task_ids=unet.task_ids(NAMES)).sample.square().mean().backward()

        names, _ = operators_of(step)
        layers = len(unet.routed_feed_forwards())
        if backend == "triton":
            assert names.count("moe_ffn_triton_backward") == layers
            assert names.count("moe_ffn_triton_train") == layers * (2 if checkpointing else 1)
        gradients.append([p.grad.cpu() for p in unet.trainable_parameters()])
    for expected, actual in zip(*gradients, strict=True):
        # Forward and backward: twice the depth of a prediction.
        assert (actual - expected).abs().max() <= 2 * TOLERANCE * max(1e-2, expected.abs().max())


@pytest.mark.slow
def test_the_output_is_the_originals_right_after_upcycling(device):
    for config in FAMILIES.values():
        stock = stock_unet(config).to(device)
        given = on(device, few_tokens(stock.cpu(), channels=4))
        expected = predict(stock.to(device), given)
        assert_close(predict(mtu.upcycle(stock, backend="triton"), given, "edit", "remove"), expected)


def test_adapted_layers_are_called_themselves(device):
    unet = upcycled_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"], init_lora_weights=False))
    given = few_tokens(unet)
    unet.set_backend("eager")
    expected = predict(unet, given, *NAMES)
    unet.set_backend("triton")
    names, actual = operators_of(lambda: predict(unet.to(device), on(device, given), *NAMES))
    assert names == []
    assert_close(actual.cpu(), expected)


@pytest.mark.slow
def test_one_compilation_serves_all_task_mixes(device):
    torch.compiler.reset()
    unet = upcycled_unet().to(device)
    unet.set_backend("triton")
    given = on(device, few_tokens(unet.cpu()))
    compiled = torch.compile(unet.to(device), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for names in (NAMES, ("edit",) * 2):
            actual = compiled(**given, task_ids=unet.task_ids(names)).sample
            assert_close(actual, predict(unet, given, *names))
    torch.compiler.reset()


def test_a_gpu_backend_may_be_chosen_before_moving_there():
    """Only the call asks where the tensors are: bfloat16 on the CPU is served by no Triton."""
    unet = mtu.upcycle(stock_unet().bfloat16(), backend="triton")
    with pytest.raises(RuntimeError, match=r"The backend 'triton' cannot serve this call: .*\."):
        predict(unet, inputs(unet, batch=1), "edit")
