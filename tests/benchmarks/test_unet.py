"""Whole UNets: the command on a tiny model, its check, its report."""

import csv

import pytest
import torch

from benchmarks import unet
from benchmarks.correctness import WrongResult
from benchmarks.provenance import provenance
from benchmarks.report import pairs_of, report
from benchmarks.rows import append_row
from benchmarks.sweeps import Setting, heeded
from benchmarks.unet_models import build_original, build_upcycled, draw_inputs, make_yardstick
from benchmarks.unet_rows import COLUMNS, TARGETS, Row, Workload

DENSE, TOP_2 = Setting(4, None, 4), Setting(4, 2, 4)
PUBLISHED = Workload("sd15", 512, 4, "bf16")
SOURCE = {"commit": "abc1234", "processor": "Some CPU"}
TARGET = "whole SD 1.5 UNet at 512x512, bf16, four mixed tasks / the original, eager"


def make_row(contender, seconds, workload=PUBLISHED, setting=DENSE, group="g"):
    """A row that nobody measured."""
    times = (seconds * 1e6, seconds * 0.9e6, seconds * 1.2e6)
    return Row(group, contender, "cpu", workload, heeded(contender, setting), False, *times, 20, 1000, SOURCE)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_quickly(path, *arguments, contenders="stock-eager,mtu-eager"):
    arguments = ["--quick", "--contenders", contenders, "--output", str(path), *arguments]
    return unet.main(arguments), provenance(f"python -m benchmarks.unet {' '.join(arguments)}")


# ------------------------------------------------------------------------------------------------------ the command


def test_a_run_from_start_to_report(tmp_path, capsys):
    output = tmp_path / "unet_cpu.csv"
    status, source = run_quickly(output, "--batches", "4,1", "--runs", "3")
    assert status == 0
    out = capsys.readouterr().out
    assert f"4 rows added to {output}" in out
    assert "tiny 64x64 B=4 bf16 " in out
    assert f"  {TARGET}: not measured (at most 0.97)" in out
    cells = read(output)
    assert tuple(cells[0]) == (*COLUMNS, *source)
    assert [(row["contender"], row["B"], row["E"], row["K"], row["tasks"]) for row in cells] == [
        ("stock-eager", "4", "1", "dense", "1"),
        ("mtu-eager", "4", "4", "dense", "4"),
        ("stock-eager", "1", "1", "dense", "1"),
        ("mtu-eager", "1", "4", "dense", "1"),
    ]
    assert [row["group"] == cells[0]["group"] for row in cells] == [True, True, False, False]
    for row in cells:
        assert 0 < int(row["p20_us"]) <= int(row["median_us"]) <= int(row["p80_us"])
        assert row["rounds"] == "3"
        assert int(row["peak_bytes"]) > 0
        assert {name: row[name] for name in source} == source


def test_top_k_and_float32(tmp_path):
    output = tmp_path / "rows.csv"
    assert run_quickly(output, "--top-k", "2", "--experts", "8", "--dtype", "fp32")[0] == 0
    assert [(row["E"], row["K"], row["dtype"]) for row in read(output)] == [("1", "dense", "fp32"), ("8", "2", "fp32")]


def test_contenders_that_are_missing_are_skipped_and_wrong_ones_end_in_an_error(tmp_path, capsys, monkeypatch):
    def build(model, dtype, setting, backend):
        if backend == "cpp":
            raise RuntimeError("The backend 'cpp' cannot run here: it is not compiled.")
        upcycled = build_upcycled(model, dtype, setting, backend)
        upcycled.routed_layers()[0].net[2].bias.zero_()
        return upcycled

    monkeypatch.setattr(unet, "build_upcycled", build)
    output = tmp_path / "rows.csv"
    assert run_quickly(output, contenders="mtu-cpp")[0] == 0
    assert not output.exists()
    assert run_quickly(output, contenders="stock-eager,mtu-eager,mtu-cpp")[0] == 1
    error = capsys.readouterr().err
    skipped = "skipped mtu-cpp at tiny 64x64 B=4 bf16: The backend 'cpp' cannot run here: it is not compiled."
    assert error.count(skipped) == 2
    failed = "FAILED, not timed: mtu-eager at tiny 64x64 B=4 bf16 E=4 dense tasks=4: WrongResult: the UNet's output"
    assert failed in error
    assert [row["contender"] for row in read(output)] == ["stock-eager"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contenders", "eager"], "unknown contender 'eager': expected some of stock-eager, mtu-eager, mtu-cpp."),
        (["--size", "100"], "expected a positive multiple of 8 pixels, got '100'."),
        (["--runs", "1"], "expected a whole number from 2 on, got '1'."),
        (["--batches", "0"], "expected positive whole numbers such as 1,8, got '0'."),
        (["--top-k", "5"], "top_k must be at most num_experts = 4, but got 5."),
        (["--experts", "3"], "num_experts must divide the hidden width of every FFN, but 3 does not divide 128."),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_quickly(tmp_path / "rows.csv", *arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_other_columns_is_refused_before_anything_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(unet, "run", None)
    output = tmp_path / "rows.csv"
    output.write_text("model\n")
    with pytest.raises(SystemExit, match="2"):
        run_quickly(output)
    assert "must have the columns" in capsys.readouterr().err
    assert output.read_text() == "model\n"


# -------------------------------------------------------------------------------------------------- models and check


def test_all_unets_get_the_same_numbers():
    workload = Workload("tiny", 64, 6, "bf16")
    original, upcycled = build_original("tiny", "bf16"), build_upcycled("tiny", "bf16", DENSE, "eager")
    again = build_original("tiny", "bf16").parameters()
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), again, strict=True))
    stock, routed = draw_inputs(original, workload, 1), draw_inputs(upcycled, workload, 4)
    assert stock["sample"].shape == (6, 4, 8, 8)
    assert routed["sample"].shape == (6, 8, 8, 8)
    assert torch.equal(stock["sample"], routed["sample"][:, :4])
    assert torch.equal(stock["encoder_hidden_states"], routed["encoder_hidden_states"])
    assert "task_ids" not in stock
    assert routed["task_ids"].tolist() == [0, 1, 2, 3, 0, 1]


@pytest.fixture(scope="module", params=[DENSE, TOP_2], ids=["dense", "top2"])
def case(request):
    """A setting, and the yardstick of its contenders."""
    return request.param, make_yardstick(Workload("tiny", 64, 4, "bf16"), request.param)


def _no_bias(upcycled):
    upcycled.routed_layers()[0].net[2].bias.zero_()


def _no_affine_of_one_task(upcycled):
    for block in upcycled.routed_blocks().values():
        block.norm3.weight[3], block.norm3.bias[3] = 1, 0


def _heavy_routing(upcycled):
    for layer in upcycled.routed_layers():
        layer.router.routing_scale *= 1.2


def _nan(upcycled):
    upcycled.conv_out.bias[0] = torch.nan


def _other_dtype(upcycled):
    upcycled.conv_out.register_forward_hook(lambda module, inputs, output: output.float())


@pytest.mark.parametrize("spoil", [_no_bias, _no_affine_of_one_task, _heavy_routing, _nan, _other_dtype])
def test_what_is_computed_wrongly_is_not_timed(case, spoil):
    setting, yardstick = case
    upcycled = build_upcycled("tiny", "bf16", setting, "eager")
    yardstick.check(upcycled)
    spoil(upcycled)
    upcycled.invalidate_routing_cache()
    with pytest.raises(WrongResult, match=r"the UNet's output must be torch.bfloat16 within .* of float32, got"):
        yardstick.check(upcycled)


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_holds_four_tasks_to_the_original():
    rows = [make_row("stock-eager", 6.0), make_row("mtu-eager", 6.6), make_row("mtu-cpp", 5.7)]
    at = "largest of 1, at sd15 512x512 B=4 bf16 E=4 dense tasks=4"
    head = "mtu-cpp, bf16, Some CPU at commit abc1234"
    assert report(rows, targets=TARGETS) == [head, f"  {TARGET}: 0.950 (at most 0.97; {at})"]
    line = report(rows, "mtu-eager", TARGETS)[1]
    assert line == f"  {TARGET}: 1.100 (at most 0.97, missed; {at})"


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": PUBLISHED._replace(size=64)},
        {"workload": PUBLISHED._replace(model="tiny")},
        {"workload": PUBLISHED._replace(dtype="fp32")},
        {"setting": TOP_2},
        {"setting": Setting(4)},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_other_rows_are_not_what_the_target_is_of(changes):
    rows = [make_row(name, 1.0, **changes) for name in ("stock-eager", "mtu-cpp")]
    (target,) = TARGETS["cpu"]
    assert pairs_of(target, rows, "mtu-cpp") == []


def test_rows_are_compared_within_their_group_only():
    rows = [make_row("stock-eager", 1.0, group="a"), make_row("mtu-cpp", 1.0, group="b")]
    assert "not measured" in report(rows, targets=TARGETS)[1]


def test_rows_have_the_columns_that_files_are_checked_for(tmp_path):
    path = tmp_path / "rows.csv"
    append_row(path, make_row("mtu-cpp", 5.5))
    (cells,) = read(path)
    assert tuple(cells) == (*COLUMNS, *SOURCE)
    assert (cells["median_us"], cells["p20_us"], cells["p80_us"]) == ("5500000", "4950000", "6600000")
