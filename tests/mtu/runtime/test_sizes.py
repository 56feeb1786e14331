"""Which calls share a size of a compiled UNet, and which sizes are kept."""

import pytest
import torch

from ..outputs import assert_close, assert_differ, predict, rows
from ..recorded_graphs import RecordedGraphs
from ..states import SMALL
from ..tiny import FAMILIES, inputs, stock_unet, upcycled_unet
from .compiled_models import BOTH, GRAPHS, MIXES, NAMES, SETTINGS, TRACED, compiled, plain

pytestmark = pytest.mark.usefixtures("dynamo")


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_one_size_serves_all_task_mixes(family, settings, dropped):
    unet = upcycled_unet(FAMILIES[family], **settings)
    if dropped:
        unet.drop_routers_()
    given = inputs(unet)
    outputs = [predict(unet, given, *names) for names in MIXES]
    # Tracing takes seconds. Dense routing is traced in the test of schedulers, channels and layouts.
    for plan in (TRACED, GRAPHS) if "top_k" in settings and not dropped else (GRAPHS,):
        unet, captures = compiled(unet, plan)
        for names, expected in zip(MIXES, outputs, strict=True):
            assert_close(predict(unet, given, *names), expected)
        assert len(unet._compiled_call_impl._sizes) == 1
        assert captures.count == (1 if plan.uses_cuda_graphs else 0)
    assert_differ(outputs[0], outputs[1])


@pytest.mark.slow
def test_a_compiled_step_can_be_captured():
    class Step(RecordedGraphs):
        def __call__(self, step):
            return (lambda: None), step()

    unet, _ = compiled(upcycled_unet(SMALL), BOTH)
    unet._compiled_call_impl._given_capture = Step()
    given = inputs(unet)
    assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [TRACED, GRAPHS], ids=["compiled", "graphs"])
def test_schedulers_channels_and_layouts_make_no_new_size(plan):
    unet, _ = compiled(upcycled_unet(SMALL), plan)
    given = inputs(unet)
    latents = rows(given, slice(None), 4)
    calls = [
        given,
        latents,
        {**given, "timestep": 7},
        {**given, "timestep": 7.0},
        {**given, "timestep": torch.tensor(7)},
        {**given, "timestep": torch.tensor([7.0], dtype=torch.float64)},
        {**given, "class_labels": None, "cross_attention_kwargs": None},
        {**given, "sample": given["sample"].to(memory_format=torch.channels_last)},
        {**given, "sample": given["sample"].clone().requires_grad_()},
    ]
    for call in calls:
        assert_close(predict(unet, call, *NAMES), plain(unet, call, *NAMES))
    assert_close(predict(unet, latents), plain(unet, latents))
    with torch.no_grad():
        one = unet.task_ids("edit")
        assert_close(unet(**given, task_ids=one).sample, plain(unet, given, *["edit"] * 5))
        assert_close(unet(*given.values(), return_dict=False, task_ids=one)[0], plain(unet, given, *["edit"] * 5))
    assert len(unet._compiled_call_impl._sizes) == 1


@pytest.mark.slow
def test_sizes_are_announced_and_the_least_recently_used_goes_first(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS, max_cached_sizes=2)
    given = inputs(unet)

    def call(count):
        caplog.clear()
        part = rows(given, slice(0, count))
        assert_close(predict(unet, part, *NAMES[:count]), plain(unet, part, *NAMES[:count]))
        return [record.getMessage() for record in caplog.records]

    (message,) = call(1)
    assert message == (
        "New size, 1 rows of 8×12 latents with 5 text tokens in float32: it is prepared now; mtu.warmup does so "
        "beforehand."
    )
    assert len(call(2)) == 1
    assert call(1) == call(2) == call(1) == []
    (message,) = call(3)
    assert "in the place of another of at most 2" in message
    assert call(1) == []
    assert len(call(2)) == 1
    assert captures.count == 4
    assert len(unet._compiled_call_impl._sizes) == 2


def test_tensors_of_another_dtype_are_of_another_size():
    """A graph would cast them to the dtype of the first call."""
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    for dtype in (torch.int64, torch.float32, torch.int64):
        mask = torch.tensor([1, 1, 1, 1, 0], dtype=dtype).expand(5, 5)
        call = {**given, "encoder_attention_mask": mask}
        assert_close(predict(unet, call, *NAMES), plain(unet, call, *NAMES))
    assert captures.count == 2


@pytest.mark.slow
def test_any_number_of_sizes_is_compiled():
    """Compilers stop at eight versions of the same code (a second one is an error here): each size has its own."""
    unet, _ = compiled(upcycled_unet(SMALL), TRACED, max_cached_sizes=2)
    given = inputs(unet, batch=1)
    for tokens in (1, 2, 3):
        call = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :1].repeat(1, tokens, 1)}
        assert_close(predict(unet, call, "edit"), plain(unet, call, "edit"))


def test_a_kept_output_is_not_overwritten():
    unet, _ = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    first = predict(unet, given, *NAMES)
    before = first.clone()
    predict(unet, inputs(unet, seed=5), *MIXES[1])
    assert torch.equal(first, before)


def test_a_graph_in_bfloat16_computes_what_the_model_does():
    unet, captures = compiled(upcycled_unet(SMALL).to(torch.bfloat16), GRAPHS)
    given = inputs(unet)
    for names in MIXES:
        assert torch.equal(predict(unet, given, *names), plain(unet, given, *names))
    assert captures.count == 1


def test_inference_mode_and_no_grad_are_told_apart():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    expected = plain(unet, given, *NAMES)
    for _ in range(2):
        with torch.inference_mode():
            assert_close(unet(**given, task_ids=unet.task_ids(NAMES)).sample, expected)
        assert_close(predict(unet, given, *NAMES), expected)
    assert captures.count == 2


@pytest.mark.slow
def test_stock_unets_are_compiled_as_well():
    unet, captures = compiled(stock_unet(FAMILIES["sdxl"]), GRAPHS)
    given = inputs(unet, channels=4)
    for timestep in (3, 700.0):
        call = {**given, "timestep": timestep}
        assert_close(predict(unet, call), plain(unet, call))
    assert captures.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("plan", [TRACED, GRAPHS], ids=["compiled", "graphs"])
def test_residuals_of_adapters(plan):
    """The stock forward takes the residuals of a T2I-Adapter out of their list."""
    unet, captures = compiled(upcycled_unet(), plan)
    given = inputs(unet)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        residuals = [torch.randn(shape, generator=generator) for shape in ((5, 32, 8, 12), (5, 64, 4, 6))]
        expected = plain(unet, given, *NAMES, down_intrablock_additional_residuals=[*residuals])
        assert_differ(plain(unet, given, *NAMES), expected)
        assert_close(predict(unet, given, *NAMES, down_intrablock_additional_residuals=[*residuals]), expected)
    assert captures.count == int(plan.uses_cuda_graphs)


def test_a_call_that_fails_takes_no_place():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS, max_cached_sizes=1)
    given = inputs(unet)
    predict(unet, given, *NAMES)
    wrong = {**given, "encoder_hidden_states": given["encoder_hidden_states"][..., :7]}
    with pytest.raises(RuntimeError):
        predict(unet, wrong, *NAMES)
    predict(unet, given, *NAMES)
    assert captures.count == 2  # that of the failed call began


def test_arguments_without_a_size_run_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    expected = plain(unet, given, *NAMES)
    assert_close(predict(unet, given, *NAMES, cross_attention_kwargs={}), expected)
    assert captures.count == 1
    caplog.clear()
    unet.register_to_config(unused=None)
    with torch.no_grad():
        unet(**given, task_ids=unet.task_ids(NAMES), class_labels={1})
    assert "an argument holds a set" in caplog.text
