"""The first step after a resume: the data that both trainers read, the step that is timed, and the report."""

import argparse
import json
import subprocess
import sys
import traceback
import types

import pytest
import torch

import mtu
from benchmarks.training import first_step, peer_first_step, resume
from benchmarks.training.icon_folder import write_icon_folder
from mtu.data.image_folder import ImageFolder
from mtu.training.checkpoints import read_newest_checkpoint

from ..rows_cases import SOURCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("icons") / "data"
    write_icon_folder(path, rows=5, images=2)
    return path


def test_rows_take_turns_at_the_images(folder):
    icons = ImageFolder(folder, mtu.tasks.EDIT)
    assert len(icons) == 5
    assert sum(path.suffix == ".png" for path in folder.iterdir()) == 4
    assert icons.image_digest(0, 0) == icons.image_digest(2, 0) != icons.image_digest(1, 0)
    images = icons.load_images(0, 0)
    assert images.condition is not None


def test_our_training_ends_after_one_step_and_goes_on_from_any_number(folder, tmp_path, capsys):
    places = ["--data", str(folder), "--run", str(tmp_path / "run"), "--cache-folder", str(tmp_path / "cache")]
    assert first_step.main([*places, "--checkpoint-at", "10000"]) == 0
    step, _, state = read_newest_checkpoint(tmp_path / "run")
    assert step == 10_000
    assert state["seconds"] > 0
    assert first_step.main([*places, "--resume"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [{"end", "loop"}] * 2
    assert lines[0]["end"] < lines[1]["end"]
    # It writes no checkpoint of its own, so that the next process goes on from the same.
    assert read_newest_checkpoint(tmp_path / "run").step == 10_000


def test_the_peer_runs_until_its_first_log_with_the_transforms_that_it_needs(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from torchvision import transforms\n"
        "from accelerate import Accelerator\n"
        "crop = transforms.Compose([transforms.CenterCrop(2), transforms.Lambda(lambda x: x)])\n"
        "import torch\n"
        "assert crop(torch.arange(16.).view(1, 4, 4)).tolist() == [[[5, 6], [9, 10]]]\n"
        "assert transforms.RandomCrop(3)(torch.zeros(2, 3, 4)).shape == (2, 3, 3)\n"
        "assert sys.argv[1:] == ['--seed=0']\n"
        "accelerator = Accelerator(cpu=True)\n"
        "accelerator.init_trackers('x')\n"
        "accelerator.log({'loss': 1})\n"
    )
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("init_trackers", "log"):
        monkeypatch.setattr(peer_first_step.Accelerator, name, getattr(peer_first_step.Accelerator, name))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    site = tmp_path / "site"
    arguments = ["--script", str(script), "--site", str(site), "--keep-going", "--", "--seed=0"]
    assert peer_first_step.main(arguments) == 0
    assert sys.path[-1] == str(site)
    assert set(json.loads(capsys.readouterr().out)) == {"end", "loop"}


def test_the_report_divides_the_medians_of_one_run(monkeypatch):
    trainings = argparse.Namespace(cases=[resume.CASES[0], resume.CASES[-1]])
    # Ours takes as long when it is resumed, and the peer ten times as long.
    trainings.measure = lambda number, is_resumed: resume.FirstStepTimes(
        2.0, 0.5 * (10 if number and is_resumed else 1)
    )
    rows = resume.measure_rows(trainings, 10_000, 3, SOURCE)
    assert len(rows) == 8
    ratios = {(one.contender, one.part): one.ratio for one in resume.compare(rows)}
    assert ratios == {
        ("mtu, cached", "process"): 1.0,
        ("mtu, cached", "loop"): 1.0,
        (resume.PEER, "process"): 1.0,
        (resume.PEER, "loop"): 10.0,
    }
    lines = resume.report_lines(rows)
    assert lines[0] == "mtu, cached, process: resumed 2.00 s / first 2.00 s = 1.000 (at most 1.10)"
    assert lines[-1] == f"{resume.PEER}, loop: resumed 5.00 s / first 0.50 s = 10.000"


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    def run_here(command, **settings):
        # A new interpreter would take seconds for its imports.
        assert command[:3] == [sys.executable, "-m", "benchmarks.training.first_step"]
        try:
            first_step.main(command[3:])
        except ValueError:
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(resume.subprocess, "run", run_here)
    trainings = resume.Trainings(tmp_path, 3, None, None)
    assert all(not case.is_peer for case in trainings.cases)
    with pytest.raises(RuntimeError, match=r"first_step ended with 1: ValueError: There is no folder"):
        trainings.measure(0, is_resumed=False)


def test_the_peer_needs_its_libraries(capsys):
    with pytest.raises(SystemExit, match="2"):
        resume.main(["--peer", "script.py"])
    assert "--peer and --peer-site go together" in capsys.readouterr().err


def test_the_stand_in_flips_half_of_the_images(monkeypatch):
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    peer_first_step.install_transforms()
    flip = sys.modules["torchvision.transforms"].RandomHorizontalFlip()
    image = torch.arange(2.0)
    assert {tuple(flip(image).tolist()) for _ in range(40)} == {(0, 1), (1, 0)}
