"""The memory that CUDA graphs share is used by one caller after the other."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mtu
from mtu.runtime.graphs import CudaGraphCapture

from ..outputs import assert_close, predict, rows
from ..states import SMALL
from ..tiny import inputs, upcycled_unet
from .compiled_models import GRAPHS, NAMES, compiled, plain, replace_data

pytestmark = pytest.mark.usefixtures("dynamo")


@pytest.mark.slow
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
    unet, captures = compiled(upcycled_unet(SMALL), GRAPHS, max_cached_sizes=1)
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
    pools = [CudaGraphCapture("pool"), CudaGraphCapture("another")]
    for stream in (*streams, streams[0]):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        with contextlib.suppress(RuntimeError), pools[0].exclusive_use():
            order.append("work")
            raise RuntimeError
    pools[0].synchronize()
    event = order[0][2]
    assert order == [
        step
        for name in ("first", "second", "first")
        for step in ((name, "waits for", event), "work", (name, "records", event))
    ] + [("host", "waits for", event)]
    with pools[1].exclusive_use():
        assert order[-1][2] is not event


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
