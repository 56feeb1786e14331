"""The roofs of a machine, and a feed-forward under them."""

import pytest
import torch

from benchmarks.ffn import machine
from benchmarks.ffn.roofline import forward_cost, read_roofline_points, roofline_points
from benchmarks.harness.provenance import collect_provenance
from benchmarks.harness.timing import Timing
from benchmarks.harness.workloads import Setting, Workload

from ..page_cases import make_roofs, write_rows
from ..rows_cases import make_row

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Calls take as long as the test says: milliseconds in the order that they are timed."""
    times = []

    def timed(calls, device, seconds, rounds):
        for (call,) in calls.values():
            call()
        medians = {name: times.pop(0) * 1e3 for name in calls}
        return {name: Timing(us, us, us, rounds, False) for name, us in medians.items()}

    monkeypatch.setattr(machine, "time_each", timed)
    return times


def test_roofs_are_the_best_of_the_medians(clock):
    # Products of edges 8, 16, 32 at 1 ms each: the largest one is the fastest. Then a copy and a triad of 4 KiB arrays.
    clock += [1, 1, 1, 2, 2.5]
    roofs = machine.measure_roofs(CPU, "fp32", {"commit": "abc"}, (8, 16, 32), 4096, rounds=7)
    assert (roofs.device, roofs.workload.dtype, roofs.matrix, roofs.rounds) == ("cpu", "fp32", 32, 7)
    assert roofs.flops_per_s == pytest.approx(2 * 32**3 / 1e-3)
    assert (roofs.part, roofs.array_bytes) == ("triad", 4096)
    assert roofs.bytes_per_s == pytest.approx(3 * 4096 / 2.5e-3)
    clock += [1, 1, 9, 2, 4]
    roofs = machine.measure_roofs(CPU, "fp32", {}, (8, 16, 32), 4096)
    assert (roofs.matrix, roofs.part) == (16, "copy")


def test_a_quick_run_and_reading_back(tmp_path, capsys):
    output = tmp_path / "machine.csv"
    arguments = ["--quick", "--device", "cpu", "--output", str(output)]
    for _ in range(2):
        assert machine.main(arguments) == 0
    assert f"2 rows added to {output}" in capsys.readouterr().out
    roofs = machine.read_roofs(output)
    assert list(roofs) == [("cpu", "bf16"), ("cpu", "fp32")]
    for known in roofs.values():
        assert known.flops_per_s > 0
        assert known.bytes_per_s > 0
        assert known.source == collect_provenance(f"python -m benchmarks.ffn.machine {' '.join(arguments)}")
    assert len(output.read_text().splitlines()) == 1 + 4


def test_roofs_survive_a_file(tmp_path):
    path = tmp_path / "machine.csv"
    write_rows(path, [make_roofs(flops_per_s=1e12), make_roofs(), make_roofs("cpu", "fp32")])
    assert machine.read_roofs(path) == {("cuda", "bf16"): make_roofs(), ("cpu", "fp32"): make_roofs("cpu", "fp32")}


def test_files_of_other_columns_are_refused(tmp_path, capsys):
    path = tmp_path / "machine.csv"
    with pytest.raises(ValueError, match=r"There is no .*machine\.csv"):
        machine.read_roofs(path)
    path.write_text("device,dtype\ncpu,bf16\n")
    with pytest.raises(ValueError, match=r"must have the columns .* got none named matrix, flops_per_s,"):
        machine.read_roofs(path)
    with pytest.raises(SystemExit, match="2"):
        machine.main(["--quick", "--device", "cpu", "--output", str(path)])
    assert "must have the columns" in capsys.readouterr().err


@pytest.mark.gpu
def test_roofs_of_a_gpu(tmp_path):
    output = tmp_path / "machine.csv"
    assert machine.main(["--device", "cuda", "--output", str(output)]) == 0
    roofs = machine.read_roofs(output)
    # No GPU that the kernels run on is slower; none reads faster than it computes.
    assert all(known.flops_per_s > 1e12 and 1e11 < known.bytes_per_s < known.flops_per_s for known in roofs.values())
    assert roofs["cuda", "bf16"].flops_per_s > roofs["cuda", "fp32"].flops_per_s


def test_the_cost_of_a_feed_forward():
    D, L, B = 320, 4096, 2
    dense = forward_cost(Workload(D, L, B, "bf16", "forward"), Setting(4))
    # Two products of B·L rows: D by 2·H, and H by D, where H = 4·D.
    assert dense.flops == 2 * B * L * D * 8 * D + 2 * B * L * 4 * D * D
    weights = 8 * D * D + 8 * D + 4 * D * D + D
    assert dense.bytes == 2 * (2 * B * L * D + weights)
    half = forward_cost(Workload(D, L, B, "fp32", "forward"), Setting(8, 4))
    assert half.flops * 2 == dense.flops
    assert half.bytes == 4 * (2 * B * L * D + (weights - D) // 2 + D)


def test_which_roof_binds():
    roofs = make_roofs(flops_per_s=1000.0, bytes_per_s=10.0)
    light, heavy = (forward_cost(Workload(1280, L, 1, "bf16", "forward"), Setting()) for L in (64, 1024))
    assert light.intensity < 100 < heavy.intensity
    assert (light.name_of_lower_roof(roofs), light.attainable_flops_per_s(roofs)) == ("memory", light.intensity * 10)
    assert (heavy.name_of_lower_roof(roofs), heavy.attainable_flops_per_s(roofs)) == ("products", 1000)


def test_marks_are_dense_rows_of_known_shapes_and_one_batch():
    rows = [make_row(name, time) for name, time in (("products", 90), ("eager", 200), ("mtu-triton", 100))]
    rows += [make_row("mtu-triton", 60), make_row("mtu-triton", 50, setting=Setting(8, 2))]
    rows += [make_row("mtu-triton", 10, B=1), make_row("mtu-triton", 1, shape=(96, 100))]
    drawn = roofline_points(rows, {("cuda", "bf16"): make_roofs()})
    assert {(mark.measured.contender, mark.measured.median_us) for mark in drawn} == {
        ("eager", 200),
        ("mtu-triton", 60),
    }
    (tested,) = (mark for mark in drawn if mark.measured.contender == "mtu-triton")
    assert tested.flops_per_s == pytest.approx(24 * 8 * 4096 * 320**2 / 60e-6)
    assert tested.share_of_roof == pytest.approx(tested.flops_per_s / 8e14)
    assert roofline_points(rows, {("cpu", "bf16"): make_roofs("cpu")}) == []


def test_marks_of_files(tmp_path):
    write_rows(tmp_path / "machine.csv", [make_roofs()])
    with pytest.raises(ValueError, match=r"There are no rows of cuda in .* that have roofs"):
        read_roofline_points(tmp_path, "cuda")
    write_rows(tmp_path / "scaling_cuda.csv", [make_row("mtu-triton", 70), make_row("eager", 90, shape=(640, 1024))])
    write_rows(tmp_path / "moe_ffn_cuda.csv", [make_row("mtu-triton", 60)])
    assert [mark.measured.median_us for mark in read_roofline_points(tmp_path, "cuda")] == [60, 90]
