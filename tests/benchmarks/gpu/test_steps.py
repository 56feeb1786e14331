"""The steps of a run on a GPU, without one: their commands, and all of them on the tiny model."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_run
from benchmarks.ffn import moe_ffn
from benchmarks.gpu.output import FACTS
from benchmarks.gpu.stages import group_into_stages
from benchmarks.gpu.state import DONE, FAILED
from benchmarks.gpu.steps import STEPS, StepContext, find_test_paths
from benchmarks.harness.provenance import ROOT
from benchmarks.kernels import tune
from benchmarks.models import unet

from .run_cases import COMMIT, Folders, shell


def test_a_dry_run_says_when_each_step_begins_and_how_to_make_it(tmp_path, capsys):
    arguments = ["--dry-run", "--state", str(tmp_path / "state"), "--output", str(tmp_path / "output")]
    assert gpu_run.main([*arguments, "--commit", COMMIT, "--skip", "icons"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("   0 s  smoke: 10 to 40 s, alone: ")
    assert [line.split(":")[0].split()[-1] for line in lines[:-1:2]] == [step.name for step in STEPS[:-1]]
    # The second batch of compiled UNets does not slow the first one down.
    beside = [[step.name for step in stage] for stage in group_into_stages(STEPS) if len(stage) > 1]
    assert beside == [["unet-sdxl-b4", "unet-sd15-b4", "tests"], ["unet-sd15-b8", "unet-sd15-b2"]]
    assert all(f" -m {'pytest' if ' pytest ' in line else 'benchmarks.'}" in line for line in lines[1:-1:2])
    assert lines[-1].endswith("s at most, of 540; 8 s are kept for the end.")
    assert not list(tmp_path.iterdir())


def test_the_tests_are_those_with_a_gpu_and_give_way_to_what_compiles(tmp_path):
    command = next(step for step in STEPS if step.name == "tests").make_command(
        StepContext(tmp_path, COMMIT, False, True, 100)
    )
    assert command[:3] == ["nice", "-n", "15"]
    assert "--continue-on-collection-errors" in command
    assert command[command.index("-k") + 1].endswith(" and not persistent")
    assert [path for path in command if path.startswith("tests/")] == find_test_paths()
    assert all((ROOT / path).exists() for path in find_test_paths())
    assert {"tests/benchmarks/test_gpu.py", "tests/benchmarks/kernels/test_tune.py"} < set(find_test_paths())


def test_steps_in_a_copy_of_the_tree_find_the_packages_that_the_run_finds_and_share_the_cores(tmp_path, monkeypatch):
    folders = Folders(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"wheels{os.pathsep}/abs{os.pathsep}")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    say = 'echo "$PYTHONPATH $TORCHINDUCTOR_COMPILE_THREADS" > said.txt'
    steps = shell("a", say, runs_alone=False), shell("b", say, runs_alone=False), shell("c", say)
    folders.call(*steps)
    paths = f"{Path.cwd() / 'wheels'}{os.pathsep}/abs"
    said = [folders.packed()[f"{name}/said.txt"] for name in "abc"]
    assert said == [f"{paths} 8\n", f"{paths} 8\n", f"{paths} 16\n"]


_OTHERS = {"smoke", "machine", "tests", "profile", "icons"}
_WITH_ROWS = {step.name for step in STEPS} - _OTHERS


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("step", [s for s in STEPS if s.name in _WITH_ROWS], ids=lambda step: step.name)
def test_commands_for_a_gpu_are_understood(step, quick, tmp_path):
    place = StepContext(tmp_path, COMMIT, quick, True, step.budget_seconds)
    python, flag, module, *arguments = step.make_command(place)
    assert (python, flag) == (sys.executable, "-m")
    modules = {known.__name__: known for known in (moe_ffn, unet, tune)}
    options = modules[module]._parser().parse_args(arguments)
    assert options.commit == COMMIT
    if module != "benchmarks.kernels.tune":
        assert options.device == "cuda"
        assert options.output.name in ("moe_ffn_cuda.csv", "unet_cuda.csv")
        assert options.resume
    # Steps that are timed alone wait for their turn; all others stop by themselves.
    assert bool(step.seconds_alone) == (getattr(options, "wait_for", None) is not None)
    assert step.seconds_alone or 60 * options.minutes == pytest.approx(step.budget_seconds, abs=0.5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_commands_on_the_tiny_model(tmp_path):
    """Those that differ from others in a few options, which are understood, are left out."""
    skipped = "unet-sdxl-b4,unet-sd15-b8,unet-sd15-b2,captured-sdxl,ffn-compiled,persistent"
    folders = Folders(tmp_path)
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--quick", "--skip", skipped, "--commit", COMMIT]
    command += ["--output", str(folders.output), "--state", str(folders.state)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    outcomes = json.loads((folders.output / FACTS).read_text())["steps"]
    expected = {step.name: DONE for step in STEPS if step.name not in skipped.split(",")}
    # Only a GPU has anything to tune.
    expected |= {"tune": FAILED}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == expected, ended.stdout
    assert ended.returncode == 1
    assert "error: Tiles are measured on a CUDA device, and torch finds none." in folders.sentence("tune")
    packed = folders.packed()
    rows = {name: list(csv.DictReader(io.StringIO(text))) for name, text in packed.items() if name.endswith(".csv")}
    assert {name: len(found) for name, found in rows.items() if "kernels" not in name} == {
        "ffn/moe_ffn_cpu.csv": 3,
        "machine/machine.csv": 2,
        "unet-sd15-b4/unet_cpu.csv": 2,
        "captured-sd15/unet_cpu.csv": 2,
        "training/moe_ffn_cpu.csv": 3,
        # Of the products and the upcycled feed-forward with both routings, the original without.
        "top-2/moe_ffn_cpu.csv": 5,
    }
    assert {row["commit"] for found in rows.values() for row in found} == {COMMIT}
    for name in ("unet-sd15-b4", "captured-sd15"):
        kernels = {row["contender"] for row in rows[f"{name}/step_kernels_cpu.csv"] if row["kernel"] == "aten::conv2d"}
        assert kernels == {"stock", "mtu-eager"}
    assert "test_shapes_of_stable_diffusion" in packed["tests/log.txt"]
    assert "expert_in 16x16 B=2 dense E=4 F=16 fp16: TileConfig(" in packed["profile/log.txt"]
    assert "TFLOP/s" in packed["profile/log.txt"]
