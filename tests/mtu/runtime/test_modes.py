"""The modes of `mtu.compile`: which one is the best, what they compute, and what is refused."""

import accelerate
import pytest
import torch

import mtu

from ..outputs import assert_close, assert_differ, predict, rows
from ..states import SMALL
from ..tiny import FAMILIES, inputs, upcycled_unet
from .compiled_models import GRAPHS, MIXES, NAMES, SETTINGS, TRACED, compiled, plain, update_routers

pytestmark = pytest.mark.usefixtures("dynamo")


def test_on_a_cpu_the_best_mode_is_channels_last_and_nothing_else():
    unet = upcycled_unet(SMALL)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    assert mtu.compile(unet) is unet
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert unet._compiled_call_impl is None
    assert_close(predict(unet, given, *NAMES), expected)


@pytest.mark.slow
def test_generated_code_gives_the_same_outputs_and_is_taken_back():
    """The one test that generates code."""
    unet = mtu.compile(upcycled_unet(SMALL), "default")
    given = inputs(unet, batch=4)
    seconds = mtu.warmup(unet, [4], height=8, width=12, text_tokens=5)
    assert list(seconds) == [4]
    with torch.compiler.set_stance("fail_on_recompile"):
        for names in MIXES:
            assert_close(predict(unet, given, *names[:4]), plain(unet, given, *names[:4]))
    mtu.compile(unet, "eager")
    assert unet._compiled_call_impl is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, r"mode must be one of auto, default, .*, eager, but got 'fast'\."),
        (
            {"mode": "reduce-overhead"},
            r"mode='reduce-overhead' needs a UNet on a CUDA device, but this one is on cpu\.",
        ),
        ({"mode": "cudagraphs"}, r"mode='cudagraphs' needs a UNet on a CUDA device, but this one is on cpu\."),
        ({"max_cached_sizes": 0}, r"max_cached_sizes must be an integer ≥ 1, but got 0\."),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_wrong_arguments_change_nothing(arguments, message):
    unet = upcycled_unet(SMALL)
    with pytest.raises(ValueError, match=message):
        mtu.compile(unet, **arguments)
    assert unet._compiled_call_impl is None
    assert not unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match=r"Expected a UNet2DConditionModel or a pipeline with one, but got a Linear\."):
        mtu.compile(torch.nn.Linear(2, 2))
    unet = upcycled_unet(SMALL)
    accelerate.cpu_offload(unet, execution_device="cpu")
    with pytest.raises(ValueError, match="but this UNet is offloaded"):
        mtu.compile(unet)


@pytest.mark.parametrize("plan", [TRACED, GRAPHS], ids=["compiled", "graphs"])
def test_calls_are_checked_before_they_are_compiled(plan):
    unet, captures = compiled(upcycled_unet(SMALL), plan)
    given = inputs(unet)
    with pytest.raises(ValueError, match="sample must have 4 to 8 channels"):
        predict(unet, rows(given, slice(None), 3), *NAMES)
    with pytest.raises(ValueError, match=r"task_ids must be in \[0, 4\), but got 7\."):
        unet(**given, task_ids=torch.tensor([0, 1, 7, 0, 0]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"task_ids must be in \[0, 4\), but got 7\."):
        unet(**given, task_ids=torch.tensor([0, 1, 7, 0, 0]))
    with pytest.raises(ValueError, match="one id for each of 5 samples"):
        predict(unet, given, "edit", "edit")
    assert captures.count == 0
    assert not unet._compiled_call_impl._sizes


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cudagraphs", "reduce-overhead"])
@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_cuda_graphs(family, settings, mode):
    unet = upcycled_unet(FAMILIES[family], **settings).to("cuda")
    given = {
        name: {k: t.to("cuda") for k, t in value.items()} if isinstance(value, dict) else value.to("cuda")
        for name, value in inputs(unet).items()
    }
    expected = [predict(unet, given, *names) for names in MIXES]
    mtu.compile(unet, mode, max_cached_sizes=2)
    outputs = [predict(unet, given, *names) for names in MIXES]
    assert len(unet._compiled_call_impl._sizes) == 1
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted)
    for count in (1, 2, 3, 1):
        part = rows(given, slice(0, count))
        assert_close(predict(unet, part, *NAMES[:count]), plain(unet, part, *NAMES[:count]))
    if unet.expert_config.has_dense_routing and family == "sd":
        update_routers(unet)
        assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
        assert_differ(predict(unet, given, *NAMES), expected[0])
    assert mtu.compile(unet)._compiled_call_impl.plan.uses_cuda_graphs
