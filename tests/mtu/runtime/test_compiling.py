"""`mtu.compile` and `mtu.warmup`: what is prepared when, whether outputs stay those of the model, what is refused."""

import contextlib
import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import mtu
from mtu.runtime.compiling import CompiledCalls, Plan
from mtu.runtime.graphs import CudaGraphs

from ..recorded_graphs import RecordedGraphs
from ..tiny import (
    FAMILIES,
    SD,
    assert_close,
    assert_differ,
    inputs,
    predict,
    randomise_,
    rows,
    stock_unet,
    upcycled_unet,
)

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
MIXES = (NAMES, ("edit",) * 5, ("text-to-image",) * 5, ("text-to-image", "remove", "remove", "edit", "edit"))
# Fewer layers than `SD`, as tracing takes its time for each.
SMALL = {
    **SD,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
# Traced like by the shipped plans, without the minutes that generating code takes.
TRACED, GRAPHS, BOTH = Plan({"backend": "eager"}, False), Plan(None, True), Plan({"backend": "eager"}, True)
SETTINGS = [
    pytest.param("sd", {}, id="sd-dense"),
    pytest.param("sd", {"num_experts": 4, "top_k": 2, "norm": "task_expert"}, id="sd-top2-expert_norms"),
    pytest.param("sdxl", {"num_experts": 1}, id="sdxl-dense"),
]


pytestmark = pytest.mark.usefixtures("dynamo")


def compiled(unet, plan, max_sizes=8):
    """The UNet through `CompiledCalls`, and what counts its captures."""
    captures = RecordedGraphs()
    unet._compiled_call_impl = CompiledCalls(unet, plan, max_sizes, captures)
    return unet, captures


def plain(unet, given, *names, **more):
    """The output without `mtu.compile`."""
    calls, unet._compiled_call_impl = unet._compiled_call_impl, None
    try:
        return predict(unet, given, *names, **more)
    finally:
        unet._compiled_call_impl = calls


# ------------------------------------------------------------------------------------------------- tasks and sizes


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_one_size_serves_all_task_mixes(family, settings, dropped):
    unet = upcycled_unet(FAMILIES[family], **settings)
    if dropped:
        unet.drop_routers_()
    given = inputs(unet)
    outputs = [predict(unet, given, *names) for names in MIXES]
    # Tracing takes seconds: two settings show what it sees.
    for plan in (GRAPHS,) if dropped or family == "sdxl" else (TRACED, GRAPHS):
        unet, captures = compiled(unet, plan)
        for names, expected in zip(MIXES, outputs, strict=True):
            assert_close(predict(unet, given, *names), expected)
        assert len(unet._compiled_call_impl._sizes) == 1
        assert captures.count == (1 if plan.graphs else 0)
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


def test_sizes_are_announced_and_the_least_recently_used_goes_first(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS, max_sizes=2)
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


@pytest.mark.slow
def test_any_number_of_sizes_is_compiled():
    """Compilers stop at eight versions of the same code (a second one is an error here): each size has its own."""
    unet, _ = compiled(upcycled_unet(SMALL), TRACED, max_sizes=2)
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


def test_stock_unets_are_compiled_as_well():
    unet, captures = compiled(stock_unet(FAMILIES["sdxl"]), GRAPHS)
    given = inputs(unet, channels=4)
    for timestep in (3, 700.0):
        call = {**given, "timestep": timestep}
        assert_close(predict(unet, call), plain(unet, call))
    assert captures.count == 1


# -------------------------------------------------------------------------------------------------- changed models


def update_routers(unet):
    randomise_([router.linear_2.weight for router in unet.routers()], seed=9)


def load_in_place(unet):
    unet.load_state_dict(upcycled_unet(SMALL, randomised=False).state_dict())


def write_through_data(unet):
    unet.task_embedding.weight.data.mul_(-2)
    unet.invalidate_routing_cache()


@pytest.mark.parametrize("change", [update_routers, load_in_place, write_through_data])
def test_a_graph_sees_new_values_in_old_places(change):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    change(unet)
    after = predict(unet, given, *NAMES)
    assert_differ(after, before)
    assert_close(after, plain(unet, given, *NAMES))
    assert captures.count == 1


def add_a_task(unet):
    unet.add_task(mtu.TaskSpec("colorize"))
    with torch.no_grad():
        unet.conv_in.weight[2] += 1


def assign_weights(unet):
    unet.load_state_dict(upcycled_unet(SMALL, randomised=False).state_dict(), assign=True)


def drop_the_routers(unet):
    unet.drop_routers_()
    for layer in unet.routed_layers():
        layer.router.weights.mul_(2)


def replace_data(unet):
    unet.conv_out.weight.data = unet.conv_out.weight.data * 2


def choose_processors(unet):
    unet.set_attn_processor(AttnProcessor())


def choose_a_backend(unet):
    unet.set_backend("reference")


@pytest.mark.parametrize(
    "change", [add_a_task, assign_weights, drop_the_routers, replace_data, choose_processors, choose_a_backend]
)
def test_a_model_of_other_parts_is_prepared_anew(change):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    predict(unet, given, *NAMES)
    change(unet)
    assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
    assert captures.count == 2


def test_an_adapter_runs_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for scale in (1.0, 0.3):
        unet.set_adapters("default", scale)
        adapted = predict(unet, given, *NAMES)
        assert_close(adapted, plain(unet, given, *NAMES))
        assert_differ(adapted, before)
    assert captures.count == 1
    assert [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()] == [
        "Calls run uncompiled, as an adapter's strength is no tensor: fuse the adapter, then unload it."
    ]
    unet.fuse_lora()
    unet.unload_lora()
    assert_close(predict(unet, given, *NAMES), adapted)
    assert captures.count == 2


def test_autocast_runs_without_a_graph():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
    predict(unet, given, *NAMES)
    assert captures.count == 1


def test_gradients_and_training_run_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    for _ in range(2):
        unet(**given, task_ids=unet.task_ids(NAMES)).sample.sum().backward()
    assert [record.getMessage() for record in caplog.records] == [
        "Calls run uncompiled, as they may record gradients: call the UNet under torch.no_grad()."
    ]
    caplog.clear()
    unet.train()(**given, task_ids=unet.task_ids(NAMES)).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in unet.trainable_parameters())
    assert captures.count == 0
    assert not caplog.records


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
    assert captures.count == int(plan.graphs)


def enable_freeu(unet):
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def change_freeu(unet):
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=3.0)


def hook_a_block(unet):
    unet.conv_out.register_forward_hook(lambda module, inputs, output: output + 1)


def replace_a_forward(unet):
    forward = unet.conv_out.forward
    unet.conv_out.forward = lambda sample: forward(sample) + 1


def scale_a_processor(unet):
    processor = AttnProcessor()
    processor.scale = [1.0]
    unet.set_attn_processor(processor)


@pytest.mark.parametrize(
    "change", [enable_freeu, change_freeu, hook_a_block, replace_a_forward, scale_a_processor], ids=lambda f: f.__name__
)
def test_switches_are_heeded(change):
    unet = upcycled_unet()
    if change is change_freeu:
        enable_freeu(unet)
    unet, captures = compiled(unet, GRAPHS)
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    change(unet)
    after = predict(unet, given, *NAMES)
    assert_close(after, plain(unet, given, *NAMES))
    if change is not scale_a_processor:
        assert_differ(after, before)
    assert captures.count == (2 if "freeu" in change.__name__ else 1)


def test_what_takes_a_hook_off_leaves_the_models_own_forward():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    unet.conv_out.forward = unet.conv_out.forward
    given = inputs(unet)
    assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
    assert captures.count == 1


def test_threads_wait_for_each_other():
    unet, _ = compiled(upcycled_unet(SMALL), GRAPHS)
    calls = [inputs(unet, seed=seed) for seed in range(4)]
    expected = [plain(unet, given, *NAMES) for given in calls]
    predict(unet, calls[0], *NAMES)

    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda i: predict(unet, calls[i], *NAMES), [0, 1, 2, 3] * 5))
    for i, actual in enumerate(outputs):
        assert_close(actual, expected[i % 4])


class StaticTensors(TorchDispatchMode):
    """Adds to the order of events when a graph's inputs are written and its output is read."""

    def __init__(self, unet, order):
        super().__init__()
        graphs = unet._compiled_call_impl._sizes.values()
        self.inputs = [tensor for graph in graphs for tensor in graph._tensors]
        self.outputs = [graph._output for graph in graphs]
        self.order = order

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and any(args[0] is tensor for tensor in self.inputs):
            self.order.append("copy")
        if func is torch.ops.aten.clone.default and any(args[0] is tensor for tensor in self.outputs):
            self.order.append("clone")
        return func(*args, **(kwargs or {}))


def test_memory_of_graphs_is_used_in_turns():
    """The graphs of a pool share memory, and the lock keeps callers apart on the host alone."""
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    sizes = (rows(given, slice(0, 2)), rows(given, slice(2, 5)))
    for part in sizes:
        predict(unet, part, "edit")
    captures.order.clear()
    # sample, timestep, text and task ids
    call = ["wait", *["copy"] * 4, "replay", "clone", "record"]
    with StaticTensors(unet, captures.order):
        for part in (*sizes, *sizes):
            predict(unet, part, "edit")
        assert captures.order == call * 4
        captures.order.clear()
        graph = next(iter(unet._compiled_call_impl._sizes.values()))
        replay = graph._replay

        def fails():
            replay()
            raise RuntimeError("device is lost")

        graph._replay = fails
        with pytest.raises(RuntimeError, match="device is lost"):
            predict(unet, sizes[0], "edit")
        predict(unet, sizes[1], "edit")
        # Of what failed, a part may be under way.
        assert captures.order == [*call[:-2], "record", *call]


def test_the_host_waits_before_a_graphs_memory_is_given_back():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS, max_sizes=1)
    given = inputs(unet)
    for count, change in ((2, None), (3, None), (3, replace_data)):
        captures.order.clear()
        if change is not None:
            change(unet)
        predict(unet, rows(given, slice(0, count)), "edit")
        assert ("host waits" in captures.order) == (count == 3)


def test_callers_on_other_streams_wait_for_each_other(monkeypatch):
    order = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            order.append((self.name, "waits for", event))

        def record_event(self, event):
            order.append((self.name, "records", event))

    class Event:
        def synchronize(self):
            order.append(("host", "waits for", self))

    streams = [Stream("first"), Stream("second")]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    pools = [CudaGraphs("pool"), CudaGraphs("another")]
    for stream in (*streams, streams[0]):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        with contextlib.suppress(RuntimeError), pools[0].turn():
            order.append("work")
            raise RuntimeError
    pools[0].wait()
    event = order[0][2]
    assert order == [
        step
        for name in ("first", "second", "first")
        for step in ((name, "waits for", event), "work", (name, "records", event))
    ] + [("host", "waits for", event)]
    with pools[1].turn():
        assert order[-1][2] is not event


def test_a_call_that_fails_takes_no_place():
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS, max_sizes=1)
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


def test_a_model_that_left_the_gpu_runs_without_graphs(caplog):
    unet = upcycled_unet(SMALL)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet._compiled_call_impl = CompiledCalls(unet, GRAPHS, 2)
    for _ in range(2):
        assert_close(predict(unet, given, *NAMES), expected)
    assert "Calls run without a CUDA graph, as the UNet is on cpu now." in caplog.text


def test_offloading_runs_uncompiled(caplog):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    caplog.clear()
    accelerate.cpu_offload(unet, execution_device="cpu")
    assert_close(predict(unet, given, *NAMES), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Calls run uncompiled, as the forward of a MTUUNet2DConditionModel was replaced, as offloading and caching do."
    ]
    assert captures.count == 1


def test_copies_and_saved_models_are_plain(tmp_path):
    unet, _ = compiled(upcycled_unet(SMALL), GRAPHS)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.save_pretrained(tmp_path)
    for other in (copy.deepcopy(unet), mtu.MTUUNet2DConditionModel.from_pretrained(tmp_path)):
        assert other._compiled_call_impl is None
        assert_close(predict(other, given, *NAMES), expected)


# ----------------------------------------------------------------------------------------------- modes and messages


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
        ({"max_sizes": 0}, r"max_sizes must be an integer ≥ 1, but got 0\."),
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
    with pytest.raises(
        ValueError, match=r"A UNet2DConditionModel or a pipeline with one is needed, but got a Linear\."
    ):
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


# ---------------------------------------------------------------------------------------------------------- warm-up


def test_warm_up_prepares_sizes_quietly(caplog, capsys):
    caplog.set_level(logging.WARNING)
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    # Two branches of text guidance, three of dual guidance, one without guidance.
    batches = [2, ["text-to-image", "edit", "super-resolution"], ("super-resolution",)]
    seconds = mtu.warmup(unet, batches, height=8, width=12, text_tokens=5)
    assert list(seconds) == [2, ("text-to-image", "edit", "super-resolution"), ("super-resolution",)]
    assert all(value > 0 for value in seconds.values())
    assert "warm-up: 100%" in capsys.readouterr().err
    assert captures.count == 3
    given = inputs(unet, batch=6)
    for count in (1, 2, 6):
        predict(unet, rows(given, slice(0, count)), *["edit"] * count)
    assert captures.count == 3
    assert not caplog.records
    predict(unet, rows(given, slice(0, 3)), *["edit"] * 3)
    assert captures.count == 4
    assert len(caplog.records) == 1


def test_warm_up_of_models_that_are_not_compiled_runs_them():
    assert mtu.warmup(upcycled_unet(FAMILIES["sdxl"]), [1], text_tokens=3)[1] > 0
    assert mtu.warmup(stock_unet(), [1])[1] > 0


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([0], {}, r"A batch has at least one row, but got 0\."),
        ([[]], {}, r"A batch has at least one row, but got \(\)\."),
        ([["paint"]], {}, r"Unknown task 'paint'"),
        (["paint"], {}, r"Unknown task 'paint'"),
        ([1], {"height": 0}, r"height and width must be positive multiples of 1, but got 0 and 8\."),
        (range(2, 10), {}, r"At most max_sizes = 8 sizes are kept, but got 9 to warm up\."),
    ],
    ids=["no rows", "no tasks", "unknown tasks", "unknown task", "no height", "too many"],
)
def test_warm_up_refuses(batches, options, message):
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS)
    with pytest.raises(ValueError, match=message):
        mtu.warmup(unet, [1, *batches], **options)
    assert captures.count == 0


def test_models_in_training_are_not_warmed_up():
    with pytest.raises(ValueError, match="A UNet in eval mode is needed"):
        mtu.warmup(upcycled_unet(SMALL).train(), [1])


def test_stock_unets_have_no_tasks_to_warm_up():
    with pytest.raises(ValueError, match="Names of tasks are for upcycled UNets"):
        mtu.warmup(stock_unet(), [["edit"]])


# -------------------------------------------------------------------------------------------------------- on a GPU


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
    mtu.compile(unet, mode, max_sizes=2)
    outputs = [predict(unet, given, *names) for names in MIXES]
    assert len(unet._compiled_call_impl._sizes) == 1
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted)
    for count in (1, 2, 3, 1):
        part = rows(given, slice(0, count))
        assert_close(predict(unet, part, *NAMES[:count]), plain(unet, part, *NAMES[:count]))
    if unet.expert_config.is_dense and family == "sd":
        update_routers(unet)
        assert_close(predict(unet, given, *NAMES), plain(unet, given, *NAMES))
        assert_differ(predict(unet, given, *NAMES), expected[0])
    assert mtu.compile(unet)._compiled_call_impl.plan.graphs


@pytest.mark.gpu
def test_a_replay_on_another_stream_leaves_inputs_and_outputs_alone():
    unet = upcycled_unet(SMALL).to("cuda")
    calls = [{name: value.to("cuda") for name, value in inputs(unet, seed=seed).items()} for seed in range(2)]
    expected = [predict(unet, given, *NAMES) for given in calls]
    mtu.compile(unet, "cudagraphs")
    predict(unet, calls[0], *NAMES)
    torch.cuda.synchronize()
    streams, outputs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream, given in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            if stream is streams[0]:
                # The first call is far behind the host when the second one is made.
                torch.cuda._sleep(10**9)
            outputs.append(predict(unet, given, *NAMES))
    torch.cuda.synchronize()
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted)
