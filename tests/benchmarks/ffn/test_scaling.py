"""The scaling of a feed-forward: its sweeps, and the rows that make a line."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.ffn import scaling
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.scaling_lines import make_panels, us_per_token
from benchmarks.pages import plot_scaling

from ..page_cases import grown
from ..rows_cases import make_row


def test_panels_are_told_apart_by_what_varies():
    drawn = {panel.name: panel for panel in make_panels(grown())}
    assert list(drawn) == ["tokens", "batch", "tasks", "experts"]
    lines = {
        name: {(line.contender, line.K): line.row_by_value for line in panel.lines} for name, panel in drawn.items()
    }
    assert {name: set(found) for name, found in lines.items()} == {
        "tokens": {("mtu-triton", None), ("products", None)},
        "batch": {("mtu-triton", None), ("eager", None)},
        "tasks": {("mtu-triton", None), ("mtu-triton", 2), ("eager", None), ("products", 2)},
        "experts": {("mtu-triton", None), ("mtu-triton", 2), ("products", 2)},
    }
    # At 1024 tokens there is a row of the experts' group, too, without the products.
    assert list(lines["tokens"]["products", None]) == [256, 512, 1024]
    assert [us_per_token(row) for row in lines["batch"]["mtu-triton", None].values()] == [51 / 64, 52 / 128, 54 / 256]
    # The same row at each number of tasks, as the original knows none.
    assert [row.median_us for row in lines["tasks"]["eager", None].values()] == [500, 500, 500]
    assert {E: row.median_us for E, row in lines["experts"]["products", 2].items()} == {2: 150, 4: 75, 8: 37.5}
    assert drawn["tasks"].fixed_text == "width 640, 256 tokens, B = 8, 8 experts, bf16"
    assert drawn["experts"].fixed_text == "width 640, 1024 tokens, B = 1, bf16"


def test_one_point_is_no_line():
    assert make_panels([make_row("eager", 1), make_row("mtu-triton", 1)]) == []
    with pytest.raises(ValueError, match=r"scaling\.png needs rows of two token counts, .* got none\."):
        plot_scaling.write_plot([make_row("eager", 1)], Path("scaling.png"))


def test_a_quick_run(tmp_path):
    output = tmp_path / "scaling_cpu.csv"
    assert scaling.main(["--quick", "--seconds", "0", "--device", "cpu", "--output", str(output)]) == 0
    rows = TABLE.read_rows(output)
    assert {row.contender for row in rows} == {"products", "eager", "mtu-eager"}
    assert {row.workload.L for row in rows} == {16, 32}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sweeps_vary_all_four_quantities(device):
    groups = [group for sweep in scaling.scaling_sweeps(device) for group in sweep.groups("bf16")]
    rows = [
        make_row(entry.contender, 1, group.workload[:2], group.workload.B, entry.setting, group=str(number))
        for number, group in enumerate(groups)
        for entry in group.entries
    ]
    found = make_panels([dataclasses.replace(row, device=device) for row in rows])
    assert [panel.name for panel in found] == ["tokens", "batch", "tasks", "experts"]
    assert all(len({x for line in panel.lines for x in line.row_by_value}) >= 4 for panel in found)
    # Each of them beside the original and the bare products.
    assert all({"eager", "products"} < {line.contender for line in panel.lines} for panel in found)
