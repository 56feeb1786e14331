"""Ratios and targets, from rows that nobody measured."""

import dataclasses

import pytest

from benchmarks.ffn.moe_ffn import main
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.targets import TARGETS, TESTED, paired_rows
from benchmarks.harness.report import Target, geometric_mean, make_ratios, report_lines
from benchmarks.harness.workloads import Setting

from ..rows_cases import make_row

TRITON = "mtu-triton"


def values(rows, to, figure="median_us", divisor=None, **changed):
    """Ratios of the contender under test to another one."""
    return [ratio.value for ratio in make_ratios(paired_rows(rows, TRITON, to, **changed), figure, divisor)]


def of_target(what, rows):
    (target,) = (target for target in TARGETS["cuda"] if target.description == what)
    return [ratio.value for ratio in target.ratios_of_rows(rows, TRITON)]


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_rows_are_compared_within_their_group_only():
    rows = [make_row("products", 100, group="a"), make_row(TRITON, 150, group="b")]
    assert values(rows, "products") == []
    assert values([*rows, make_row("products", 120, group="b")], "products") == [1.25]


def test_the_last_of_several_measurements_counts():
    times = [("a", "products", 100), ("a", TRITON, 300), ("b", TRITON, 150), ("b", "products", 100)]
    rows = [make_row(name, time, group=group) for group, name, time in times]
    assert values(rows, "products") == [1.5]


def test_contenders_without_routing_are_compared_with_any_setting():
    rows = [make_row("eager", 100), *(make_row(TRITON, time, setting=Setting(E)) for E, time in ((1, 50), (4, 60)))]
    assert values(rows, "eager") == [0.5, 0.6]


def test_settings_are_compared_with_each_other():
    settings = {Setting(8): 100, Setting(8, 2): 30, Setting(8, 2, 4): 33, Setting(4): 90}
    rows = [make_row(TRITON, time, setting=setting) for setting, time in settings.items()]
    assert of_target("top-2 of 8 / dense of 8, D <= 640 and L >= 1024", rows) == [0.3]
    assert of_target("top-2 of 8 / dense of 8, other shapes", rows) == []
    rows.append(make_row(TRITON, 99, setting=Setting(4, None, 4)))
    assert of_target("four mixed tasks / one task", rows) == [1.1, 1.1]


def test_bytes_are_compared_where_both_are_known():
    rows = [
        make_row(name, 1, direction="forward+backward", saved_bytes=saved)
        for name, saved in (("eager", 200), (TRITON, 50), ("products", None))
    ]
    assert of_target("bytes saved for backward / eager", rows) == [0.25]
    assert values(rows, "products", "saved_bytes") == []
    recomputing = make_row("mtu-triton-recompute", 1, direction="forward+backward", peak_bytes=500)
    assert of_target("the same with recompute", [*rows, recomputing]) == [0.5]


def test_two_columns_of_one_row_may_be_compared():
    rows = [make_row(TRITON, 200, host_us=10.0), make_row(TRITON, 100, B=1, host_us=None)]
    assert values(rows, TRITON, "host_us", "median_us") == [0.05]


def test_a_ratio_without_a_target_is_said():
    rows = [make_row("eager", 100), make_row(TRITON, 300)]
    chosen = {
        "cuda": [
            Target(f"to {to}", None, lambda rows, tested, to=to: make_ratios(paired_rows(rows, tested, to)))
            for to in ("eager", "products")
        ]
    }
    at = "largest of 1, at 320x4096 B=8 bf16 forward E=4 dense tasks=1"
    assert report_lines(rows, chosen, TESTED)[1:] == [
        f"  to eager: 3.000 (no target; {at})",
        "  to products: not measured (no target)",
    ]


def test_the_table_says_what_was_measured_and_what_was_not():
    rows = [make_row("products", 100), make_row("eager", 200), make_row(TRITON, 120)]
    rows += [make_row("products", 50, B=1), make_row(TRITON, 50, B=1)]
    lines = report_lines(rows, TARGETS, TESTED)
    assert lines[0] == "mtu-triton, bf16, Some GPU at commit abc1234"
    assert len(lines) == 1 + len(TARGETS["cuda"])
    assert "  forward / two bare products, B >= 2: 1.200 (at most 1.10, missed; geometric mean of 1)" in lines
    worst = "largest of 2, at 320x4096 B=8 bf16 forward E=4 dense tasks=1"
    assert f"  forward / two bare products, any shape: 1.200 (at most 1.15, missed; {worst})" in lines
    assert "  forward / eager: 0.600 (at most 0.82; geometric mean of 1)" in lines
    assert "  four mixed tasks / one task: not measured (at most 1.03)" in lines


def test_another_contender_may_be_tested():
    rows = [make_row("eager", 100), make_row("loop", 300), make_row(TRITON, 50)]
    assert any(
        "forward / eager: 3.000 (at most 0.82, missed" in line for line in report_lines(rows, TARGETS, {"cuda": "loop"})
    )


def test_targets_of_one_shape_or_dtype_are_of_no_other():
    rows = [make_row(name, 100, (1280, 64)) for name in ("eager", TRITON)]
    assert of_target("forward / eager", rows) == [1.0]
    assert of_target("forward / eager at 320x4096", rows) == []
    (target,) = (target for target in TARGETS["cpu"] if target.dtype == "fp32")
    assert target.ratios_of_rows(rows, TRITON) == []
    assert TESTED.keys() == TARGETS.keys()


def test_rows_survive_a_file(tmp_path, capsys):
    rows = [make_row("products", 100.25), make_row(TRITON, 120.5, setting=Setting(8, 2, 4), direction="backward")]
    rows.append(make_row("eager", 7.0, host_us=None, graph=False))
    path = tmp_path / "deep" / "rows.csv"
    for row in rows:
        TABLE.append_row(path, row)
    rounded = [{name: round(getattr(row, name), 2) for name in ("p20_us", "p80_us")} for row in rows]
    assert TABLE.read_rows(path) == [
        dataclasses.replace(row, **times) for row, times in zip(rows, rounded, strict=True)
    ]
    assert main(["--report", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == report_lines(rows, TARGETS, TESTED)


def test_files_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("group,contender\na,b\n")
    with pytest.raises(ValueError, match=r"must have the columns group, contender, device.* got group,"):
        TABLE.append_row(path, make_row("eager", 1))
    with pytest.raises(ValueError, match=r"must have the columns .*, got none named device, D,"):
        TABLE.read_rows(path)
    with pytest.raises(ValueError, match=r"There is no .*nothing\.csv"):
        TABLE.read_rows(tmp_path / "nothing.csv")
