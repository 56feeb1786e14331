"""Whole UNets: the command on tiny models, and its report."""

import csv
import functools
import gc

import pytest
import torch

from benchmarks.harness.provenance import collect_provenance
from benchmarks.harness.report import report_lines
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Setting, Workload
from benchmarks.models import unet
from benchmarks.models.deployments import Deployment, UNetCall, make_stock_call, predict_noise, rows_at_once
from benchmarks.models.unet_catalogue import CONTENDERS, ONE_BY_ONE, default_contender_names, sibling_name
from benchmarks.models.unet_contenders import BUILDERS
from benchmarks.models.unet_models import task_specs_of
from benchmarks.models.unet_targets import TABLE, TARGETS, TESTED

DENSE = Setting(4, None, 4)
PUBLISHED = Workload(model="sd15", size=512, B=4)
SOURCE = {"commit": "abc1234", "processor": "Some CPU"}
TARGET = "SD 1.5 at 512x512, four mixed tasks / the original, eager"
# Dynamo says this of diffusers' code.
COMPILING = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect():
    """Each group ends with a collection, which takes half a second where all that was imported is looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


def make_row(contender, seconds, workload=PUBLISHED, setting=DENSE, group="g", **columns):
    """A row that nobody measured."""
    columns = {
        "device": "cpu",
        "graph": False,
        "median_us": seconds * 1e6,
        "p20_us": seconds * 0.9e6,
        "p80_us": seconds * 1.2e6,
        "peak_bytes": 1000,
        "weight_bytes": 100,
        "warmup_s": None,
        "switch_us": None,
        "images_per_s": 0.5,
        **columns,
    }
    setting = CONTENDERS[contender].relevant_setting(setting)
    place = {"group": group, "contender": contender, "workload": workload, "setting": setting}
    return Row(**place, rounds=20, source=SOURCE, **columns)


def run_quickly(path, *arguments, contenders="stock,mtu-eager"):
    arguments = ["--quick", "--device", "cpu", "--contenders", contenders, "--output", str(path), *arguments]
    return unet.main(arguments), collect_provenance(f"python -m benchmarks.models.unet {' '.join(arguments)}")


# ------------------------------------------------------------------------------------------------------ the command


def test_a_run_from_start_to_report(tmp_path, capsys):
    output = tmp_path / "unet_cpu.csv"
    status, source = run_quickly(output, "--batches", "4,1", "--runs", "3")
    assert status == 0
    out = capsys.readouterr().out
    assert f"5 rows added to {output}" in out
    assert "tiny 64x64 B=4 bf16 " in out
    assert f"  {TARGET}: not measured (at most 0.97)" in out
    with output.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == (*TABLE.columns, *source)
    rows = TABLE.read_rows(output)
    assert [(row.contender, row.workload.B, row.setting) for row in rows] == [
        ("stock", 4, Setting()),
        ("mtu-eager", 4, Setting(4)),
        ("mtu-eager", 4, DENSE),
        ("stock", 1, Setting()),
        ("mtu-eager", 1, Setting(4)),
    ]
    assert [row.group == rows[0].group for row in rows] == [True] * 3 + [False] * 2
    for row in rows:
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.rounds == 3
        assert not row.graph
        assert row.peak_bytes > 0
        assert row.warmup_s is None
        assert (row.switch_us is None) == (row.contender == "stock")
        assert row.images_per_s == pytest.approx(row.workload.B * 1e6 / row.median_us / 20, rel=1e-3)
        assert row.source == source
    stock, routed = rows[:2]
    assert stock.weight_bytes < routed.weight_bytes <= 1.02 * stock.weight_bytes

    assert unet.main(["--report", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == report_lines(rows, TARGETS, TESTED)


@pytest.mark.slow
def test_settings_branches_and_the_larger_model(tmp_path):
    output = tmp_path / "rows.csv"
    arguments = ["--model", "tiny-xl", "--top-k", "dense,2", "--experts", "8", "--dtype", "fp32"]
    arguments += ["--tasks", "2", "--batches", "2", "--branches", "3", "--commit", "abc1234"]
    assert run_quickly(output, *arguments)[0] == 0
    rows = TABLE.read_rows(output)
    assert {row.workload for row in rows} == {Workload(model="tiny-xl", size=64, B=2, branches=3, dtype="fp32")}
    assert {row.source["commit"] for row in rows} == {"abc1234"}
    assert [row.setting for row in rows] == [Setting(), Setting(8, None, 2), Setting(8, 2, 2)]
    assert task_specs_of("tiny-xl")[0].num_inference_steps == 50
    assert rows[0].images_per_s == pytest.approx(2e6 / rows[0].median_us / 50, rel=1e-3)


def _spoiled(build, family, setting, contender):
    if contender.implementation.backend == "cpp":
        raise RuntimeError("The backend 'cpp' cannot run here: it is not compiled.")
    upcycled = build(family, setting, contender)
    layer = upcycled.unets[0].routed_feed_forwards()[0]
    layer.net[2].bias.data = torch.zeros_like(layer.net[2].bias)
    return upcycled


def test_contenders_that_are_missing_are_skipped_and_wrong_ones_end_in_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BUILDERS, "upcycled", functools.partial(_spoiled, BUILDERS["upcycled"]))
    output = tmp_path / "rows.csv"
    assert run_quickly(output, contenders="mtu-cpp")[0] == 0
    assert not output.exists()
    assert run_quickly(output, contenders="stock,mtu-eager,mtu-cpp")[0] == 1
    error = capsys.readouterr().err
    skipped = "skipped mtu-cpp at tiny 64x64 B=4 bf16: The backend 'cpp' cannot run here: it is not compiled."
    assert error.count(skipped) == 2
    failed = "FAILED, not timed: mtu-eager at tiny 64x64 B=4 bf16 E=4 dense tasks=4: WrongResult: the UNet's output"
    assert failed in error
    assert [row.contender for row in TABLE.read_rows(output)] == ["stock"]


def test_graphs_are_refused_off_cuda(tmp_path, capsys):
    names = [name for name, contender in CONTENDERS.items() if contender.uses_cuda_graphs]
    assert {"stock+graphs", "stock+captured", "stock-recipe+max", "mtu-triton+graphs@each", "four-unets+graphs"} <= set(
        names
    )
    assert run_quickly(tmp_path / "rows.csv", contenders=",".join(names))[0] == 0
    error = capsys.readouterr().err
    for name in names:
        assert f"skipped {name} at tiny 64x64 B=4 bf16: CUDA graphs need a CUDA device, got the device 'cpu'." in error


@COMPILING
@pytest.mark.slow
def test_compiled_contenders_are_warmed_up_once_for_all_tasks(tmp_path, monkeypatch):
    # Only tracing depends on this library; generating code takes five times as long.
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, *, mode, **options: compile(model, backend="eager", **options))
    output = tmp_path / "rows.csv"
    assert run_quickly(output, contenders="mtu-eager+compile")[0] == 0
    one, four = TABLE.read_rows(output)
    assert (one.setting.tasks, four.setting.tasks) == (1, 4)
    assert not four.graph
    # The first calls compile; those of other tasks only run.
    assert 0 <= four.warmup_s - one.warmup_s < one.warmup_s


def _specialised(family, setting, contender):
    """The original, and code behind it that is compiled anew for each task; for the first one it changes nothing."""
    unet = family.new_original()
    add = torch.compile(lambda output, task: output + task, backend="eager", fullgraph=True, dynamic=False)

    def predict(task, **inputs):
        return add(predict_noise(unet, **inputs), task)

    def parts(batch):
        (rows,) = rows_at_once(batch)
        return [UNetCall(predict, make_stock_call(unet, batch, rows).inputs | {"task": batch.task_of_row[0]}, rows)]

    return Deployment((), parts)


@pytest.mark.slow
def test_contenders_that_are_compiled_again_for_other_tasks_are_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BUILDERS, "upcycled", _specialised)
    output = tmp_path / "rows.csv"
    assert run_quickly(output, "--tasks", "4", contenders="mtu-eager+compile")[0] == 1
    assert "Recompiled: Detected recompile" in capsys.readouterr().err
    assert not output.exists()
    # One task asks for no other code. With caches, the time of compiling means nothing.
    assert run_quickly(output, "--tasks", "1", contenders="mtu-eager+compile")[0] == 0
    assert run_quickly(output, "--tasks", "1", "--warm-caches", contenders="mtu-eager+compile")[0] == 0
    cold, warm = TABLE.read_rows(output)
    assert cold.warmup_s is not None
    assert warm.warmup_s is None


@pytest.mark.slow
def test_a_group_that_is_prepared_waits_for_its_turn_and_its_kernels_are_counted(tmp_path, monkeypatch, capsys):
    go, output, kernels = tmp_path / "go", tmp_path / "rows.csv", tmp_path / "kernels.csv"
    seen = []

    def sleep(seconds):
        seen.append((go.with_name("go.ready").exists(), output.exists()))
        go.touch()

    monkeypatch.setattr("benchmarks.models.unet.time.sleep", sleep)
    assert run_quickly(output, "--wait-for", str(go), "--tasks", "4", "--kernels", str(kernels))[0] == 0
    assert seen == [(True, False)]
    assert len(TABLE.read_rows(output)) == 2
    with kernels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["contender"], row["model"], row["tasks"]) for row in rows} == {
        ("stock", "tiny", "1"),
        ("mtu-eager", "tiny", "4"),
    }
    convolutions = [int(row["count"]) for row in rows if row["kernel"] == "aten::conv2d"]
    assert len(convolutions) == 2
    assert f"stock: {sum(int(row['count']) for row in rows if row['contender'] == 'stock')} kernels" in (
        capsys.readouterr().out
    )


def test_a_process_that_waits_for_a_parent_that_is_gone_ends(tmp_path, monkeypatch):
    parents = iter((10, 10, 1))
    monkeypatch.setattr("benchmarks.models.unet.os.getppid", lambda: next(parents))
    with pytest.raises(SystemExit, match=f"The process that was to make {tmp_path / 'go'} is gone"):
        unet._wait_for(tmp_path / "go")


@pytest.mark.slow
def test_a_run_that_was_cut_off_before_its_kernels_were_counted_goes_on(tmp_path, capsys):
    output, kernels = tmp_path / "rows.csv", tmp_path / "kernels.csv"
    arguments = ["--tasks", "1", "--commit", "abc1234", "--resume"]
    assert run_quickly(output, *arguments, contenders="stock")[0] == 0
    for number in (2, 2):
        assert run_quickly(output, *arguments, "--kernels", str(kernels), contenders="stock")[0] == 0
        assert len(TABLE.read_rows(output)) == number
        assert "aten::conv2d" in kernels.read_text()
    assert f"All rows are in {output} already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut_off(tmp_path, capsys):
    output = tmp_path / "rows.csv"
    arguments = ["--batches", "2,1", "--tasks", "1", "--commit", "abc1234"]
    assert run_quickly(output, *arguments, "--minutes", "-1", contenders="stock")[0] == 0
    assert "out of time: 2 of 2 groups are left" in capsys.readouterr().err
    assert not output.exists()
    assert run_quickly(output, *arguments[2:], "--batches", "1", contenders="stock")[0] == 0
    assert run_quickly(output, *arguments, "--resume", contenders="stock")[0] == 0
    assert [row.workload.B for row in TABLE.read_rows(output)] == [1, 2]
    assert run_quickly(output, *arguments, "--resume", contenders="stock")[0] == 0
    assert len(TABLE.read_rows(output)) == 2
    # Rows of another commit are no rows of this one.
    other = [*arguments[:-1], "def5678", "--resume"]
    assert run_quickly(output, *other, contenders="stock")[0] == 0
    assert len(TABLE.read_rows(output)) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--wait-for", "go", "--batches", "1,2"], "--wait-for is for one batch of one number of branches, got "),
        (["--wait-for", "no/go"], "--wait-for must be in a folder that is there, got no/go."),
        (["--contenders", "eager"], "unknown contender 'eager': expected some of stock, stock+channels-last, "),
        (["--size", "100"], "expected a positive multiple of 8 pixels, got '100'."),
        (["--runs", "1"], "expected a whole number from 2 on, got '1'."),
        (["--batches", "0"], "expected positive whole numbers such as 1,8, got '0'."),
        (["--branches", "4"], "expected whole numbers up to 3, got '4'."),
        (["--tasks", "1,5"], "expected whole numbers up to 4, got '1,5'."),
        (["--top-k", "5"], "top_k must be at most num_experts = 4, but got 5."),
        (["--experts", "3"], "num_experts must divide the hidden width of every FFN, but 3 does not divide 128."),
        (
            ["--report", "nothing.csv"],
            "There is no nothing.csv: run `python -m benchmarks.models.unet` to measure, got no",
        ),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_quickly(tmp_path / "rows.csv", *arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_cuda_is_asked_for_in_vain(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        unet.main(["--quick", "--device", "cuda"])
    assert "--device cuda needs a CUDA device, and torch finds none." in capsys.readouterr().err


def test_a_file_of_other_columns_is_refused_before_anything_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(unet, "measure_groups", None)
    output = tmp_path / "rows.csv"
    output.write_text("model\n")
    for arguments in ((output,), (tmp_path / "new.csv", "--kernels", str(output))):
        with pytest.raises(SystemExit, match="2"):
            run_quickly(*arguments)
        assert "must have the columns" in capsys.readouterr().err
    assert output.read_text() == "model\n"


def test_contenders_that_are_measured_by_default():
    assert {*default_contender_names("cuda"), *default_contender_names("cpu")} <= {*CONTENDERS}
    assert {"stock+graphs", "mtu-triton+graphs", "mtu-triton+graphs@each", "lora-hotswap"} <= {
        *default_contender_names("cuda")
    }
    # Compiling takes minutes there.
    assert not any(CONTENDERS[name].is_compiled for name in default_contender_names("cpu"))


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_holds_four_tasks_to_the_original():
    rows = [make_row("stock", 6.0), make_row("mtu-eager", 6.6), make_row("mtu-cpp@each", 7.6)]
    rows.append(make_row("mtu-cpp", 5.7, weight_bytes=103, switch_us=570.0))
    at = "largest of 1, at sd15 512x512 B=4 bf16 E=4 dense tasks=4"
    assert report_lines(rows, TARGETS, TESTED) == [
        "mtu-cpp, bf16, Some CPU at commit abc1234",
        f"  {TARGET}: 0.950 (at most 0.97; {at})",
        f"  switching tasks / a step: 0.000 (at most 0.01; {at})",
        f"  weights of four tasks / the original's: 1.030 (at most 1.02, missed; {at})",
        f"  four tasks at once / one after another: 0.750 (no target; {at})",
    ]
    line = report_lines(rows, TARGETS, {"cpu": "mtu-eager"})[1]
    assert line == f"  {TARGET}: 1.100 (at most 0.97, missed; {at})"


def test_the_report_of_a_gpu_is_of_graphs():
    make = functools.partial(make_row, device="cuda")
    two = {"workload": PUBLISHED._replace(B=2), "setting": Setting(4, None, 2), "group": "two"}
    rows = [make("stock+graphs", 2.0), make("mtu-triton+graphs", 1.9, switch_us=1e5), make("stock", 9.0)]
    rows += [make("mtu-triton+graphs@each", 3.8), make("stock", 4.0, **two), make("mtu-triton+graphs", 2.0, **two)]
    xl = {"workload": Workload(model="sdxl", size=1024, B=8), "setting": Setting(1, None, 4), "group": "xl"}
    rows += [make("stock+graphs", 4.0, **xl), make("mtu-triton+graphs", 4.4, **xl)]
    values = [line.partition(": ")[2].split(";")[0] for line in report_lines(rows, TARGETS, TESTED)[1:]]
    assert values == [
        "0.950 (at most 1.00",
        "1.100 (at most 0.97, missed",
        "0.500 (at most 0.55",
        "0.053 (at most 0.01, missed",
        "1.000 (at most 1.02",
        "0.500 (at most 0.85",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": PUBLISHED._replace(size=64)},
        {"workload": PUBLISHED._replace(model="tiny")},
        {"setting": Setting(4, 2, 4)},
        {"setting": Setting(4)},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_other_rows_are_not_what_the_target_is_of(changes):
    rows = [make_row(name, 1.0, **changes) for name in ("stock", "mtu-cpp")]
    assert TARGETS["cpu"][0].ratios_of_rows(rows, "mtu-cpp") == []


def test_settings_that_make_no_difference_to_a_contender_are_left_out():
    for name, contender in CONTENDERS.items():
        routed = contender.implementation.source == "upcycled"
        mixed = contender.implementation.source in ("four", "swapped", "hotswap", "per-sample")
        expected = DENSE if routed else Setting(tasks=4) if mixed else Setting()
        assert contender.relevant_setting(DENSE) == expected, name


def test_names_say_the_family_the_run_and_the_variant():
    for name, contender in CONTENDERS.items():
        run = "" if contender.run_mode is None else f"+{contender.run_mode.name}"
        assert name == contender.family + run + (f"@{contender.variant}" if contender.variant else "")
        assert contender.implementation.source in BUILDERS
    assert sibling_name("mtu-cpp", run="graphs", variant=ONE_BY_ONE) == "mtu-cpp+graphs@each"
    assert sibling_name("lora-per-sample", run="graphs") == ""


def test_rows_are_compared_within_their_group_only():
    rows = [make_row("stock", 1.0, group="a"), make_row("mtu-cpp", 1.0, group="b")]
    assert "not measured" in report_lines(rows, TARGETS, TESTED)[1]


def test_rows_survive_a_file(tmp_path):
    path = tmp_path / "rows.csv"
    workload = PUBLISHED._replace(branches=3)
    rows = [make_row("mtu-cpp", 5.5), make_row("stock", 5.0, workload, warmup_s=12.5, switch_us=3.5, graph=True)]
    for row in rows:
        TABLE.append_row(path, row)
    assert TABLE.read_rows(path) == rows
    with path.open(newline="") as file:
        cells = next(csv.DictReader(file))
    assert tuple(cells) == (*TABLE.columns, *SOURCE)
    assert (cells["median_us"], cells["p20_us"], cells["p80_us"]) == ("5500000", "4950000", "6600000")
    assert (cells["K"], cells["warmup_s"], cells["branches"]) == ("dense", "", "1")
