"""The commands, from their arguments to their files."""

import csv
import subprocess
import sys

import pytest
import torch

from benchmarks.ffn import moe_ffn
from benchmarks.ffn.peers import CONTENDERS, Implementation
from benchmarks.ffn.rows import TABLE
from benchmarks.ffn.sweeps import DEFAULT_SWEEPS, QUICK
from benchmarks.harness.contenders import ALL, Contender
from benchmarks.harness.provenance import ROOT, collect_provenance
from benchmarks.harness.workloads import Setting
from benchmarks.pages import plot, plot_ffn

from ..rows_cases import make_row

# Without the interpreter of Triton, which takes its time.
NAMES = "products,eager,loop,mtu-eager,compile-folded"
QUICKLY = ["--quick", "--seconds", "0", "--device", "cpu"]


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling takes seconds; the code around it is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.slow
def test_a_run_from_start_to_picture(tmp_path, capsys, no_compiler):
    output = tmp_path / "moe_ffn_cpu.csv"
    arguments = [*QUICKLY, "--output", str(output), "--contenders", NAMES, "--pass", "forward,forward+backward"]
    assert moe_ffn.main(arguments) == 0
    out = capsys.readouterr().out
    assert "mtu-cpp, bf16, " in out
    assert "forward / compile-folded: not measured (at most 0.90)" in out
    rows = TABLE.read_rows(output)
    # products, loop and mtu-eager dense and with top-2; the others once; for two passes.
    assert len(rows) == 2 * (3 * 2 + 2)
    assert f"{len(rows)} rows added" in out
    assert len({row.group for row in rows}) == 2
    for row in rows:
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.rounds == 20
        assert not row.graph
        assert row.source == collect_provenance(f"python -m benchmarks.ffn.moe_ffn {' '.join(arguments)}")
        training = row.workload.direction == "forward+backward" and row.contender != "products"
        assert (row.saved_bytes is not None) == training

    assert moe_ffn.main([*arguments, "--top-k", "dense", "--pass", "forward"]) == 0
    with output.open(newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 1 + len(rows) + 5
    assert len({line[0] for line in lines[1:]}) == 3

    images = tmp_path / "images"
    assert plot.main(["--results", str(tmp_path), "--output", str(images)]) == 0
    assert (images / "moe_ffn_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_was_cut_off(tmp_path, capsys):
    output = tmp_path / "rows.csv"
    arguments = [*QUICKLY, "--output", str(output), "--contenders", "products", "--pass", "forward,backward"]
    assert moe_ffn.main([*arguments, "--minutes", "-1"]) == 0
    assert "out of time: 2 of 2 groups are left" in capsys.readouterr().err
    assert not output.exists()
    assert moe_ffn.main([*arguments[:-1], "backward"]) == 0
    assert moe_ffn.main([*arguments, "--resume"]) == 0
    assert [row.workload.direction for row in TABLE.read_rows(output)] == ["backward"] * 2 + ["forward"] * 2
    assert moe_ffn.main([*arguments, "--resume"]) == 0
    assert "0 rows added" in capsys.readouterr().out


def test_refusals_are_said_once_and_failures_end_in_an_error(tmp_path, capsys, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("Nothing of the kind runs here.\nAnd more.")

    def halve(x, *arguments):
        return x / 2

    def crash(*arguments):
        raise KeyError("tile")

    for name, function in (("mtu-cpp", refuse), ("loop", halve), ("mtu-eager", crash)):
        monkeypatch.setitem(CONTENDERS, name, Contender("broken", Implementation(function), ALL))
    output = tmp_path / "rows.csv"
    arguments = [*QUICKLY, "--output", str(output), "--contenders", "products,mtu-cpp,loop,mtu-eager"]
    assert moe_ffn.main([*arguments, "--pass", "forward"]) == 1
    error = capsys.readouterr().err
    refusal = "skipped mtu-cpp at 32x16 B=2 bf16 forward: Nothing of the kind runs here. And more."
    assert error.count(refusal) == 1
    assert "FAILED, not timed: loop at 32x16 B=2 bf16 forward E=4 dense tasks=1: WrongResult: y must be" in error
    assert "FAILED, not timed: mtu-eager at 32x16 B=2 bf16 forward E=4 top-2 tasks=1: KeyError: 'tile'" in error
    assert {row.contender for row in TABLE.read_rows(output)} == {"products"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contenders", "eager,magic"], "unknown contender 'magic': expected some of products, eager, loop, "),
        (
            ["--shapes", "sd15,3by4"],
            "unknown shape '3by4': expected DxL as in 320x4096, or one of sd15, sdxl, cpu.",
        ),
        (["--shapes", "0x4"], "unknown shape '0x4'"),
        (["--pass", "sideways"], "unknown pass 'sideways': expected some of forward, backward, forward+backward."),
        (["--batch", "1,none"], "expected positive whole numbers such as 1,8, got '1,none'."),
        (["--top-k", "sparse"], "expected positive whole numbers such as 1,8, got 'sparse'."),
        (["--experts", "1", "--top-k", "2"], "There is nothing to measure: "),
        (["--report", "nothing.csv"], "There is no nothing.csv"),
    ],
    ids=["contender", "shape", "no_width", "pass", "batch", "top_k", "nothing", "report"],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        moe_ffn.main(["--device", "cpu", *arguments])
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_other_columns_is_refused_before_anything_is_measured(tmp_path, capsys):
    output = tmp_path / "rows.csv"
    output.write_text("model\n")
    with pytest.raises(SystemExit, match="2"):
        moe_ffn.main([*QUICKLY, "--output", str(output)])
    assert "must have the columns" in capsys.readouterr().err
    assert output.read_text() == "model\n"


def test_arguments_choose_between_the_default_sweep_and_all_combinations():
    def sweeps(arguments, device="cuda"):
        return moe_ffn.sweeps_from_options(moe_ffn._parser().parse_args(arguments), device)

    assert sweeps([]) == DEFAULT_SWEEPS["cuda"]
    assert sweeps(["--quick"]) == (QUICK,)
    (sweep,) = sweeps(["--shapes", "sdxl,8x4", "--top-k", "dense,2", "--tasks", "1,4", "--pass", "all"])
    assert sweep.shapes == ((640, 4096), (1280, 1024), (8, 4))
    assert sweep.top_k == (None, 2)
    assert sweep.passes == ("forward", "backward", "forward+backward")
    assert (sweep.batches, sweep.experts) == ((8,), (4,))
    assert "compile-folded" in sweep.contenders
    assert "compile-folded-max" not in sweep.contenders
    (sweep,) = sweeps(["--contenders", "all", "--quick"], "cpu")
    assert sweep == QUICK._replace(contenders=tuple(CONTENDERS))
    (sweep,) = sweeps(["--experts", "8"], "cpu")
    assert sweep.shapes[0] == (320, 8192)
    assert sweep.batches == (1,)


@pytest.mark.slow
def test_measuring_needs_neither_diffusers_nor_matplotlib_nor_the_installed_package():
    code = (
        "import sys; sys.modules['diffusers'] = sys.modules['matplotlib'] = sys.modules['mtu'] = None; "
        "import benchmarks.gpu_run, benchmarks.gpu.smoke, benchmarks.ffn.moe_ffn, benchmarks.kernels.tune; "
        "import benchmarks.harness.provenance; "
        "print(benchmarks.harness.provenance.collect_provenance('x')['commit'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == collect_provenance("x")["commit"]


def test_provenance(monkeypatch, tmp_path):
    source = collect_provenance("make it", commit="abc")
    assert source["command"] == "make it"
    assert source["commit"] == "abc"
    assert source["torch"] == torch.__version__
    assert all(source.values())
    # Neither git nor the packages: a bare copy of the tree on another machine.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.version", _not_there)
    source = collect_provenance("make it")
    assert source["commit"] == "unknown"
    assert source["triton"] == source["diffusers"] == "absent"


def _not_there(package):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(package)


def test_the_commit_of_a_changed_tree_is_marked(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    monkeypatch.setattr("benchmarks.harness.provenance.ROOT", tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "new.csv").write_text("1")
    clean = collect_provenance("x")["commit"]
    assert len(clean) >= 7
    assert clean.isalnum()
    (tmp_path / "file").write_text("2")
    assert collect_provenance("x")["commit"] == f"{clean}-dirty"


def test_pictures_need_results(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        plot.main(["--results", str(tmp_path)])
    assert f"error: There is no moe_ffn_*.csv in {tmp_path}" in capsys.readouterr().err
    TABLE.append_row(tmp_path / "moe_ffn_cuda.csv", make_row("eager", 1))
    with pytest.raises(SystemExit, match="2"):
        plot.main(["--results", str(tmp_path), "--output", str(tmp_path)])
    assert "needs rows of products and of other contenders at B = 8, got none." in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_points_are_the_routing_asked_for_over_the_products():
    rows = [make_row("products", 100), make_row("eager", 200)]
    rows += [make_row("mtu-triton", time, setting=Setting(E)) for E, time in ((1, 120), (4, 110), (8, 300))]
    rows += [make_row("mtu-triton", 50, setting=Setting(4, 2)), make_row("eager", 10, B=1)]
    drawn = plot_ffn.last_relative_times(rows, batch=8, experts=4)
    assert {name: point.median for (name, _), point in drawn.items()} == {"eager": 2.0, "mtu-triton": 1.1}
    assert [
        plot_ffn.last_relative_times(rows, 8, experts)["mtu-triton", rows[0].workload].median for experts in (1, 8)
    ] == [
        1.2,
        3.0,
    ]
