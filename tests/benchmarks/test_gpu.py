"""Timing by CUDA graphs, memory of a GPU, and whole UNets on it."""

import pytest
import torch

from benchmarks.ffn import moe_ffn
from benchmarks.ffn.rows import TABLE
from benchmarks.harness.memory import measure_peak_bytes
from benchmarks.harness.timing import measure_host_us, time_interleaved, warm_up
from benchmarks.models import unet, unet_targets
from benchmarks.models.unet_catalogue import CONTENDERS

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
    issued = measure_host_us(once, cuda)
    assert issued is not None
    assert 0 < issued < 1e4


def test_peak_of_a_call(cuda):
    x = torch.randn(N, N, device=cuda)
    assert measure_peak_bytes(lambda: (x + 1) + 1, cuda) == 2 * x.nbytes


def test_a_quick_run(tmp_path):
    output = tmp_path / "rows.csv"
    arguments = ["--quick", "--seconds", "0", "--device", "cuda", "--shapes", "64x64", "--output", str(output)]
    assert moe_ffn.main([*arguments, "--contenders", "products,eager,loop,mtu-eager,mtu-triton"]) == 0
    rows = TABLE.read_rows(output)
    assert {row.contender for row in rows} == {"products", "eager", "loop", "mtu-eager", "mtu-triton"}
    for row in rows:
        assert row.graph == (row.contender != "loop" or row.setting.K is None)
        assert row.host_us is not None
        assert row.host_us > 0
        assert row.source["processor"] == torch.cuda.get_device_name()


# Dynamo says this of diffusers' code.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("model", ["tiny", "tiny-xl"])
def test_whole_unets(model, tmp_path, capfd):
    names = ["stock", "stock+graphs", "stock-recipe+compile", "stock-recipe+graphs", "mtu-eager+graphs", "mtu-triton"]
    names += ["stock+captured", "mtu-triton+captured"]
    names += ["mtu-triton+graphs", "mtu-triton+graphs@each", "mtu-triton+graphs@routers", "mtu-triton-folded+graphs"]
    names += ["four-unets", "swapped-unets", "swapped-unets+graphs", "lora-hotswap+graphs", "lora-per-sample"]
    output = tmp_path / "rows.csv"
    arguments = ["--quick", "--device", "cuda", "--model", model, "--tasks", "4", "--warm-caches"]
    arguments += ["--contenders", ",".join(names), "--output", str(output)]
    assert unet.main(arguments) == 0
    rows = {row.contender: row for row in unet_targets.TABLE.read_rows(output)}
    assert list(rows) == names
    assert "without a CUDA graph" not in capfd.readouterr().err
    for name, row in rows.items():
        assert row.graph == CONTENDERS[name].uses_cuda_graphs
        assert row.peak_bytes > 0
        assert row.source["processor"] == torch.cuda.get_device_name()
    # Sources of the swap are in the host's memory.
    assert rows["swapped-unets"].weight_bytes == rows["stock"].weight_bytes
    assert rows["mtu-triton+graphs"].weight_bytes <= 1.02 * rows["stock"].weight_bytes


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_several_sizes_and_settings_of_captured_unets(tmp_path):
    output = tmp_path / "rows.csv"
    arguments = ["--quick", "--device", "cuda", "--batches", "2,1", "--branches", "1,2", "--top-k", "dense,2"]
    arguments += ["--contenders", "stock+graphs,mtu-triton+graphs", "--output", str(output)]
    assert unet.main(arguments) == 0
    rows = unet_targets.TABLE.read_rows(output)
    # Of two pictures with one task and two, of one picture with one; each dense and with top-2.
    assert len(rows) == 2 * (1 + 4) + 2 * (1 + 2)
    assert all(row.graph and row.warmup_s for row in rows)
