"""Timing by CUDA graphs, and memory of a GPU."""

import pytest
import torch

from benchmarks import moe_ffn
from benchmarks.memory import peak_bytes
from benchmarks.rows import read_rows
from benchmarks.timing import host_us, time_interleaved, warm_up

pytestmark = pytest.mark.gpu
N = 2048


@pytest.fixture
def cuda():
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield device
    torch.cuda.synchronize()


def test_graphs_are_replayed_and_what_waits_for_the_host_is_timed_without(cuda):
    x = torch.randn(N, N, device=cuda, dtype=torch.bfloat16)
    runs = torch.zeros((), device=cuda)

    def once():
        runs.add_(1)
        return x @ x

    def four_times():
        return x @ x @ x @ x @ x

    def waits():
        return x @ x if x.sum().item() else None

    contenders = [[once, once], [four_times], [waits]]
    for calls in contenders:
        warm_up(calls, cuda)
    before = runs.item()
    one, four, waiting = timings = time_interleaved(contenders, [True, True, False], cuda, seconds=0.05)
    assert [timing.graph for timing in timings] == [True, True, False]
    assert 3 < four.median_us / one.median_us < 5
    assert waiting.median_us > one.median_us
    assert runs.item() > before + 2 * one.rounds
    assert 0 < host_us(once, cuda) < 1e4


def test_peak_of_a_call(cuda):
    x = torch.randn(N, N, device=cuda)
    assert peak_bytes(lambda: (x + 1) + 1, cuda) == 2 * x.nbytes


def test_a_quick_run(tmp_path):
    output = tmp_path / "rows.csv"
    arguments = ["--quick", "--seconds", "0", "--device", "cuda", "--shapes", "64x64", "--output", str(output)]
    assert moe_ffn.main([*arguments, "--contenders", "products,eager,loop,mtu-eager,mtu-triton"]) == 0
    rows = read_rows(output)
    assert {row.contender for row in rows} == {"products", "eager", "loop", "mtu-eager", "mtu-triton"}
    for row in rows:
        assert row.graph == (row.contender != "loop" or row.setting.K is None)
        assert row.host_us > 0
        assert row.source["processor"] == torch.cuda.get_device_name()
