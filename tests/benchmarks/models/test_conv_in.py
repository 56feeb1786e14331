"""The command that times input convolutions: its rows, its ratios, and that both convolutions compute the same."""

import csv

import pytest
import torch

from benchmarks.harness.provenance import collect_provenance
from benchmarks.models import conv_in


@pytest.mark.slow
def test_rows_and_ratios(tmp_path, capsys):
    output = tmp_path / "rows.csv"
    assert conv_in.main(["--device", "cpu", "--batches", "1,2", "--seconds", "0", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratios = [line.rpartition(" ")[0] for line in lines[-8:-6]]
    assert ratios == ["bf16 B=1: task / stock-4", "bf16 B=1: task / stock-8"]
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dtype"], row["B"], row["contender"]) for row in rows[:6]] == [
        ("bf16", B, name) for B in "12" for name in ("task", "stock-4", "stock-8")
    ]
    assert len({row["group"] for row in rows}) == 4
    assert all(0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows)
    assert set(collect_provenance("")) < set(rows[0])


def test_the_timed_convolutions_have_the_size_of_stable_diffusion():
    calls = conv_in.contender_calls(3, torch.float32, torch.device("cpu"))
    assert {name: call().shape for name, call in calls.items()} == dict.fromkeys(calls, (3, 320, 64, 64))
    assert not any(call().requires_grad for call in calls.values())
