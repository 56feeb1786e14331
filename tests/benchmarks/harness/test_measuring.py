"""Times, memory, and the sweeps."""

import pytest
import torch

from benchmarks.ffn.inputs import draw_shared_inputs, number_of_input_sets
from benchmarks.ffn.peers import CONTENDERS
from benchmarks.ffn.sweeps import DEFAULT_SWEEPS, QUICK, Sweep
from benchmarks.harness.memory import measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.timing import (
    MIN_ROUNDS,
    WARM_ROUNDS,
    measure_host_us,
    summarize_times,
    time_interleaved,
    warm_up,
)
from benchmarks.harness.workloads import DENSE, Entry, Setting, Workload

CPU = torch.device("cpu")


def test_summary_of_times():
    # Of 0, 10, …, 100 the p-th percentile is p.
    timing = summarize_times([float(t) for t in range(100, -1, -10)], graph=True)
    assert timing == (50.0, 20.0, 80.0, 11, True)


def test_contenders_are_timed_in_turn_on_the_next_inputs_each_round():
    log = []
    calls = [[lambda name=name, s=s: log.append((name, s)) for s in range(2)] for name in "ab"]
    timings = time_interleaved(calls, [True, True], CPU, seconds=0)
    rounds = len(log) // 2
    assert log == [(name, r % 2) for r in range(rounds) for name in "ab"]
    assert [timing.rounds for timing in timings] == [MIN_ROUNDS, MIN_ROUNDS]
    assert all(0 < t.p20_us <= t.median_us <= t.p80_us and not t.graph for t in timings)
    assert rounds > MIN_ROUNDS, "The first rounds must not count."


def test_calls_that_take_long_are_timed_as_often_as_asked():
    rounds = []
    (timing,) = time_interleaved([[lambda: None]], [False], CPU, 0, at_least=3, after_round=lambda: rounds.append(0))
    assert timing.rounds == 3
    assert len(rounds) == WARM_ROUNDS + 3


def test_a_cpu_has_no_host_time():
    assert measure_host_us(lambda: None, CPU) is None


def test_saved_bytes_count_each_storage_once_and_no_input():
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(4, 6, requires_grad=True)

    def forward():
        z = x @ weight  # saves inputs only
        a, b = z.chunk(2, dim=1)  # views of z, (10, 6) float32
        h = (a * b).exp()  # saves a and b, and the result, (10, 3) float32
        return h @ weight[:3]  # saves the result again, and a view of an input

    assert measure_saved_bytes(forward, [x, weight]) == 10 * 6 * 4 + 10 * 3 * 4
    assert measure_saved_bytes(forward, [weight]) == 10 * 6 * 4 + 10 * 3 * 4 + 10 * 4 * 4
    with torch.no_grad():
        assert measure_saved_bytes(forward, []) == 0


def test_peak_bytes_of_a_call():
    x = torch.zeros(1024)

    def call():
        y = x + 1
        z = y + 1  # y and z are held at once, and then z and the result
        del y
        return z + 1

    # The number 1 is a tensor of a few bytes on its way.
    assert 2 * x.nbytes <= measure_peak_bytes(call, CPU) < 2 * x.nbytes + 64


def test_sets_of_inputs_exceed_the_cache_together():
    workload = Workload(16, 1024, 8, "fp32", "forward")
    shared = draw_shared_inputs(workload, CPU, 0)
    assert number_of_input_sets(shared, workload) == 32
    large = shared._replace(x=torch.ones(1).expand(2**25))
    assert number_of_input_sets(large, workload) == 1
    assert number_of_input_sets(shared, workload._replace(direction="backward")) == 2


def test_warm_up_calls_the_first():
    log = []
    warm_up([lambda: log.append(0), lambda: log.append(1)], CPU)
    assert log == [0]


def test_entries_of_a_group_differ():
    sweep = Sweep(("products", "eager", "mtu-eager"), ((8, 4),), (1, 2), experts=(1, 4), top_k=(DENSE, 2), tasks=(1, 4))
    one, two = sweep.groups("bf16")
    routed = [Setting(1), Setting(4), Setting(4, 2)]
    assert [entry.setting for entry in one.entries if entry.contender == "mtu-eager"] == routed
    assert Entry("mtu-eager", Setting(4, 2, 4)) in two.entries
    assert not any(entry.setting.K == 2 and entry.setting.E == 1 for entry in two.entries)
    for group in (one, two):
        assert len(set(group.entries)) == len(group.entries)
        assert [entry.setting for entry in group.entries if entry.contender == "eager"] == [Setting()]
        assert [entry.setting for entry in group.entries if entry.contender == "products"] == [Setting(), Setting(4, 2)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eager", Setting()),
        ("compile-folded-max", Setting()),
        ("products", Setting(8, 2)),
        ("loop", Setting(8, 2, 4)),
        ("mtu-eager", Setting(8, 2, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "setting",
)
def test_settings_that_make_no_difference_are_left_out(name, expected):
    assert CONTENDERS[name].relevant_setting(Setting(8, 2, 4)) == expected


def test_sweeps_name_contenders_that_exist():
    for sweep in (*DEFAULT_SWEEPS["cuda"], *DEFAULT_SWEEPS["cpu"], QUICK):
        assert set(sweep.contenders) <= set(CONTENDERS)
        assert list(sweep.groups("bf16"))


class Device:
    """Stands for a GPU: a queue whose entries begin when the host has issued them and those before are done (µs)."""

    def __init__(self):
        self.host = self.free = 0.0
        self.order = []

    def enqueue(self, duration):
        self.free = max(self.free, self.host) + duration

    def call(self, name, host, *kernels):
        """A call for which the host works, then launches kernels one after the other."""

        def run():
            self.order.append(name)
            for kernel in kernels:
                self.host += host / len(kernels)
                self.enqueue(kernel)

        return run

    def synchronize(self, device=None):
        self.host = max(self.host, self.free)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.time = device, None

    def record(self):
        self.device.host += 1
        self.device.enqueue(0)
        self.time = self.device.free

    def elapsed_time(self, end):
        return (end.time - self.time) / 1e3


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    # Two cycles a microsecond.
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.enqueue(cycles / 2))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("benchmarks.harness.timing.time.perf_counter", lambda: device.host / 1e6)
    return device


def test_a_device_that_was_idle_sleeps_long_enough_at_the_clocks_that_work_has(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.enqueue(cycles / (2 if device.order else 0.35)))
    (timing,) = time_interleaved([[device.call("short", 900, 100)]], [False], torch.device("cuda"), 0, replaying=[True])
    assert timing.median_us == pytest.approx(100)


def test_graphs_are_timed_without_the_host_and_apart_from_what_is_launched_one_by_one(device):
    # A graph that the host takes longer to issue than the one before it runs, after kernels that wait for the host.
    calls = [device.call("eager", 3000, *[10] * 10), device.call("short", 20, 100), device.call("long", 900, 700)]
    timings = time_interleaved(
        [[call] for call in calls], [False] * 3, torch.device("cuda"), 0, replaying=[False, True, True]
    )
    assert [timing.graph for timing in timings] == [False, True, True]
    assert [timing.median_us for timing in timings[1:]] == pytest.approx([100, 700])
    # Kernels that are launched one by one take as long as the host does, with its event.
    assert timings[0].median_us == pytest.approx(3001)
    first = device.order.index("eager")
    assert "eager" not in device.order[:first]
    assert set(device.order[first:]) == {"eager"}
