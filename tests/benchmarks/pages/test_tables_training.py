"""The tables of training: their cells, ratios of one run alone, and the last run where that is what counts."""

import pytest

from benchmarks.harness.rows import Row, append_cells
from benchmarks.harness.workloads import Workload
from benchmarks.pages import tables_training
from benchmarks.training import data_time, memory, resume, step_ratio

from ..rows_cases import SOURCE


def body(lines):
    return [line for line in lines if line.startswith("|")][2:]


def test_the_memory_of_a_step_names_settings_and_card(tmp_path):
    row = memory.compute_rows(memory.CASES[:1])[0]
    other = {**row, "model": "sdxl", "size": 1024, "autocast": "bf16", "frozen": "bf16", "checkpointing": 1}
    other |= {"optimizer": "adamw8bit", "average_bytes": 0, "processes": 8, "sharded": 1, "card_gib": ""}
    for cells in (row, other):
        append_cells(tmp_path / memory.FILE, {name: str(value) for name, value in {**cells, **SOURCE}.items()})
    first, second = body(tables_training.step_memory_table(tmp_path))
    assert first.startswith("| SD 1.5, 512² | fp32 | 1 | 3.48 GB | 0.634 GB | 1.27 GB | 0.634 GB | ")
    settings = "bf16 autocast, checkpointing, frozen weights bf16, 8-bit AdamW, no average, 8 processes, sharded"
    assert second.startswith(f"| SDXL, 1024² | {settings} | 1 | ")
    assert second.endswith("| – |")


def test_a_step_is_compared_within_its_own_run(tmp_path):
    def row(contender, median, group):
        workload = Workload(B=4, dtype="bf16", model="sd15", size=256)
        times = {"median_us": median, "p20_us": median, "p80_us": median, "rounds": 10}
        return Row(contender=contender, group=group, device="cpu", workload=workload, source=SOURCE, **times)

    path = tmp_path / step_ratio.FILE.format(device="cpu")
    for made in (row("mtu", 9e6, "a"), row("stock", 2e6, "b"), row("stock-norms", 1e6, "a"), row("mtu", 2.1e6, "b")):
        step_ratio.TABLE.append_row(path, made)
    assert body(tables_training.step_ratio_table(tmp_path, "cpu")) == ["| SD 1.5, 256², bf16 | 4 | 2.10 s | 1.05 | – |"]


def test_a_resume_has_a_line_for_each_contender_of_the_last_run(tmp_path):
    for group, factor in (("old", 9), ("new", 1)):
        for step, seconds in ((0, 2.0), (10_000, 2.1)):
            for part in resume.PARTS:
                median = factor * seconds * 1e6
                times = {"median_us": median, "p20_us": median, "p80_us": median, "rounds": 3}
                row = Row(group=group, contender="mtu, cached", part=part, source=SOURCE, **times)
                resume.TABLE.append_row(tmp_path / resume.FILE, resume_at(row, step))
    lines = tables_training.resume_table(tmp_path)
    assert "process: at 10,000" in lines[0]
    assert body(lines) == ["| `mtu, cached` | 2.00 s | 2.10 s | 1.05 | 2.00 s | 2.10 s | 1.05 |"]


def resume_at(row, step):
    return Row(**{**vars(row), "workload": Workload(steps=step)})


def test_waiting_for_data_is_that_of_the_last_run(tmp_path):
    for group, waits in (("old", 9e4), ("new", 3.2e3)):
        values = (group, "sd15", "disk", 2, 16, 320000, waits, waits / 320000, 40)
        cells = dict(zip(data_time.COLUMNS, map(str, values), strict=True))
        append_cells(tmp_path / data_time.FILE, {**cells, **SOURCE})
    assert body(tables_training.data_time_table(tmp_path)) == ["| `sd15` | disk | 16 | 2 | 320 ms | 3.20 ms | 0.01 |"]


@pytest.mark.parametrize("make", [tables_training.resume_table, tables_training.data_time_table])
def test_files_that_are_missing_are_not_measured(make, tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m benchmarks\.training\."):
        make(tmp_path)
