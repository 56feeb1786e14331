"""Times calls interleaved: by CUDA graphs and events on a GPU, by the clock on a CPU."""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)

MIN_ROUNDS = 20
MAX_ROUNDS = 1000
# Rounds that do not count, while clocks, caches and page tables reach a steady state.
WARM_ROUNDS = 2
# The device sleeps while the host issues a graph; a host that waits for the device is not waited for in turn.
_CALIBRATION_CYCLES = 1_000_000
_ISSUES = 5
_MOST_SLEEP_US = 20_000.0
_BURST = 20
_BURSTS = 5


class Timing(NamedTuple):
    """Times of one call in µs, over the rounds.

    Attributes:
        graph: whether CUDA graphs were replayed; without them the time includes the host's part.
    """

    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    graph: bool


def summarize_times(times_us: Sequence[float], graph: bool) -> Timing:
    """Median and the 20th and 80th percentile, interpolated between the two nearest times."""
    deciles = statistics.quantiles(times_us, n=10, method="inclusive")
    return Timing(deciles[4], deciles[1], deciles[7], len(times_us), graph)


def capture_stream(device: torch.device) -> AbstractContextManager[Any]:
    """The context of a new stream on a GPU: graphs cannot be captured on the default one."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def time_each(
    calls: Mapping[Key, Sequence[Call]], device: torch.device, seconds: float, at_least: int = MIN_ROUNDS
) -> dict[Key, Timing]:
    """Times contenders interleaved, by name; a CUDA graph can hold each of them."""
    timings = time_interleaved(list(calls.values()), [True] * len(calls), device, seconds, at_least)
    return dict(zip(calls, timings, strict=True))


def time_interleaved(
    contenders: Sequence[Sequence[Call]],
    capturable: Sequence[bool],
    device: torch.device,
    seconds: float,
    at_least: int = MIN_ROUNDS,
    after_round: Call = lambda: None,
    replaying: Sequence[bool] | None = None,
) -> list[Timing]:
    """Times contenders round robin, so that all of them run at the same clocks and beside the same neighbours.

    On a GPU each contender runs through all its calls in a round, captured in one CUDA graph: the calls then share the
    gap before a graph, and none finds its inputs in the cache. The current stream must not be the default one.
    Contenders that replay graphs are timed without the host's part, which is issued while the device is kept busy.
    Those that launch kernels one by one are timed with it, in rounds of their own: after them the device would wait
    for the next graph. On a CPU each contender runs one call in a round, and its next call in the next round.

    Args:
        contenders: for each one its calls, on one set of inputs each; warmed up already.
        capturable: for each one whether a CUDA graph can hold it.
        device: where the calls run.
        seconds: time for each contender; 1000 rounds are run at most.
        at_least: rounds that are run however long they take.
        after_round: called after each round, also the first ones, which do not count.
        replaying: for each one whether its calls replay CUDA graphs of their own; by default none does.
    """
    if device.type != "cuda":
        turns = [itertools.cycle(calls) for calls in contenders]
        times = _rounds(
            lambda: [_clocked(next(turn)) for turn in turns], seconds * len(contenders), at_least, after_round
        )
        return [summarize_times(column, graph=False) for column in zip(*times, strict=True)]
    graphs, runs = _captured_runs(contenders, capturable)
    if replaying is not None:
        graphs = [captured or replays for captured, replays in zip(graphs, replaying, strict=True)]
    timings: dict[int, Timing] = {}
    for kind in (True, False):
        places = [place for place, graph in enumerate(graphs) if graph == kind]
        if places:
            chosen, counts = [runs[place] for place in places], [len(contenders[place]) for place in places]
            sleeps = _sleeps(chosen) if kind else [0] * len(places)
            measure = functools.partial(_events_round, chosen, counts, sleeps)
            times = _rounds(measure, seconds * len(places), at_least, after_round)
            columns = zip(*times, strict=True)
            timings |= {place: summarize_times(column, kind) for place, column in zip(places, columns, strict=True)}
    return [timings[place] for place in range(len(contenders))]


def _rounds(measure: Callable[[], list[float]], seconds: float, at_least: int, after_round: Call) -> list[list[float]]:
    for _ in range(WARM_ROUNDS):
        measure()
        after_round()
    rounds = []
    end = time.perf_counter() + seconds
    while len(rounds) < at_least or (time.perf_counter() < end and len(rounds) < MAX_ROUNDS):
        rounds.append(measure())
        after_round()
    return rounds


def _clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _in_turn(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured_runs(contenders: Sequence[Sequence[Call]], capturable: Sequence[bool]) -> tuple[list[bool], list[Call]]:
    """For each contender whether it was captured, and a call that runs all its calls."""
    # Graphs share their memory: they run one after the other, and nothing reads their results.
    pool = torch.cuda.graph_pool_handle()
    graphs, runs = [], []
    # Collecting a CUDA object breaks the capture that it happens in. `torch.cuda.graph` would collect before each of
    # hundreds of captures, and empty the allocator's cache.
    gc.collect()
    gc.disable()
    try:
        for calls, can in zip(contenders, capturable, strict=True):
            graph = _captured(calls, pool) if can else None
            graphs.append(graph is not None)
            runs.append(_in_turn(calls) if graph is None else graph.replay)
    finally:
        gc.enable()
    return graphs, runs


def _captured(calls: Sequence[Call], pool: Any) -> torch.cuda.CUDAGraph | None:
    """One graph of all calls; None where they cannot be captured.

    A failed capture leaves torch's own random generator unusable, so calls that are known to fail should not be tried.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        # The backward pass runs in a thread of its own, whose calls a capture may forbid.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            _in_turn(calls)()
        finally:
            graph.capture_end()
    except RuntimeError:
        # A capture that failed still claims the pool, and the next one would find it taken.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        return None
    return graph


def _sleeps(runs: Sequence[Call]) -> list[int]:
    """For each run the cycles that the device must be kept busy for, while the host issues the run.

    An event on an idle device happens at once, and then the host's work would count: 1 to 3 ms where a whole UNet's
    inputs are prepared for its graph.
    """
    issued = [statistics.median(_issued_us(run) for _ in range(_ISSUES)) for run in runs]
    # After work, when the clocks are those of the rounds: an idle device's are lower, and cycles take longer.
    cycles_per_us = _cycles_per_us()
    # Hosts are slower at times, and events are issued, too.
    return [int(cycles_per_us * min(_MOST_SLEEP_US, 2 * us + 20)) for us in issued]


def _issued_us(run: Call) -> float:
    torch.cuda.synchronize()
    return _clocked(run)


def _cycles_per_us() -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The first one loads the kernel.
    for _ in range(2):
        start.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
    torch.cuda.synchronize()
    return _CALIBRATION_CYCLES / (start.elapsed_time(end) * 1e3)


def _events_round(runs: Sequence[Call], counts: Sequence[int], sleeps: Sequence[int]) -> list[float]:
    # This call does not count: it precedes the first contender as in any other turn, and lets the host get ahead.
    runs[-1]()
    events = []
    for run, sleep in zip(runs, sleeps, strict=True):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if sleep:
            torch.cuda._sleep(sleep)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / count for (start, end), count in zip(events, counts, strict=True)]


def warm_up(calls: Sequence[Call], device: torch.device) -> None:
    """Runs the first call, which compiles, tunes and loads; on a GPU all of them, as captures need it."""
    for call in [calls[0], *(calls if device.type == "cuda" else ())]:
        call()
    synchronize(device)


def time_repeatedly(call: Call, device: torch.device, count: int) -> Timing:
    """Times of a call by itself, each until the device is done with it."""

    def complete() -> None:
        call()
        synchronize(device)

    complete()
    return summarize_times([_clocked(complete) for _ in range(count)], graph=False)


def measure_burst_us(call: Call, device: torch.device, burst: int = _BURST, bursts: int = _BURSTS) -> float:
    """Time that the host takes to issue a call, in µs: the median over bursts of the mean over a burst.

    A burst of the default length fits into the queue of the device at any shape.
    """
    times = []
    for _ in range(bursts):
        synchronize(device)
        times.append(_clocked(_in_turn([call] * burst)) / burst)
    synchronize(device)
    return statistics.median(times)


def measure_host_us(call: Call, device: torch.device) -> float | None:
    """Time that the host takes to issue a call, in µs; None on a CPU, where a call has no other time."""
    return measure_burst_us(call, device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
