"""`mtu train`: its flags, its exit codes and what it prints."""

import os
import signal
import threading

import pytest
import yaml

from mtu.cli import main
from mtu.training.runs import run
from mtu.training.runs.run_config import settings_by_key
from tests.mtu.training.processes import run_in_processes
from tests.mtu.training.runs.small_runs import run_command, small_base, small_settings

__all__ = ["small_base"]


@pytest.fixture
def settings_file(small_base, tmp_path):
    """A YAML file of a small training into the folder `run` beside it."""
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(small_settings(small_base, tmp_path / "run")))
    return path


def assert_refused(ended, message, code=2):
    """Raise unless a command ended with a code and one sentence on stderr that has a message."""
    lines = [line for line in ended.err.splitlines() if line.startswith("mtu train: error: ")]
    assert ended.code == code
    assert len(lines) == 1, ended.err
    assert message in lines[0]
    assert lines[0].endswith(".")


def test_a_training_from_a_file_and_flags(run_mtu, settings_file, small_base):
    output = settings_file.parent / "run"
    flags = ["--steps", "1", "--data", "remove=", "--no-tensorboard", "--upcycle", "num_experts=2"]
    data = small_base.parent / "data"
    flags[3] += str(data / "remove")
    ended = run_mtu("train", str(settings_file), *flags)
    assert ended.code == 0, ended.err
    assert f"The trained pipeline is in {output / 'model'}." in ended.out
    resolved = yaml.safe_load((output / "config.yaml").read_text())
    assert (resolved["steps"], resolved["upcycle"]["num_experts"], sorted(resolved["data"])) == (
        1,
        2,
        ["edit", "remove"],
    )
    assert_refused(run_mtu("train", str(output)), "holds the checkpoint of a training: continue it with --resume")
    assert run_mtu("train", str(output / "config.yaml"), "--resume").code == 0
    assert_refused(run_mtu("train", str(output), "--resume", "--seed", "1"), "seed")


def test_two_processes_train_one_pipeline_and_part(settings_file):
    arguments = ("train", str(settings_file), "--steps", "1")
    assert run_in_processes(2, run_command, *arguments) == [(0, False)] * 2
    assert (settings_file.parent / "run" / "model" / "model_index.json").is_file()


def test_a_dry_run_prints_tables_and_writes_nothing(run_mtu, settings_file):
    ended = run_mtu("train", str(settings_file), "--dry-run")
    assert ended.code == 0, ended.err
    for words in ("edit", "3 steps of 4 examples", "activations", "one checkpoint", "That fits."):
        assert words in ended.out
    assert not (settings_file.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.yaml"], "There is no file 'no.yaml'"),
        (["--steps", "3"], "'model' is missing"),
        (["icons"], "'output' is missing"),
        (["icons", "--output", "x", "--learning-rate", "fast"], "--learning-rate must be a number, but got 'fast'"),
        (["icons", "--output", "x", "--data", "edit"], "--data must be TASK=FOLDER, but got 'edit'"),
        (["icons", "--output", "x", "--data", "edit=a", "--data", "edit=b"], "--data gives 'edit' twice"),
        (["icons", "--output", "x", "--steps", "1", "--epochs", "1"], "both give the length"),
        (["icons", "--output", "x", "--resume", "--overwrite"], "expected one of them"),
        (["icons", "--output", "x/y", "--resume"], "does not exist"),
    ],
)
def test_bad_command_lines_and_settings_exit_with_2(run_mtu, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_mtu("train", *arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_launcher_that_is_not_supported_is_refused_once(run_mtu, settings_file, monkeypatch, rank, lines):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("LOCAL_RANK", rank)
    ended = run_mtu("train", str(settings_file))
    assert (ended.code, ended.err.count("error: Processes launched with FSDP")) == (2, lines)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FloatingPointError("The loss of step 3 is nan."), 1),
        (OSError("The checkpoint of step 3 cannot be written (No space left on device)."), 2),
        (ValueError("The batch cannot be split."), 2),
    ],
)
def test_errors_of_a_training_are_one_line(run_mtu, settings_file, monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(run, "run_training", fail)
    assert_refused(run_mtu("train", str(settings_file)), str(error), code)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_has_its_exit_code(run_mtu, settings_file, monkeypatch, number, code):
    output = settings_file.parent / "run"
    take_step = run.Trainer._step

    def step_with_signal(self, running):
        os.kill(os.getpid(), number)
        return take_step(self, running)

    monkeypatch.setattr(run.Trainer, "_step", step_with_signal)
    assert threading.current_thread() is threading.main_thread()
    ended = run_mtu("train", str(settings_file))
    assert ended.code == code
    assert "The training ended after step 1, which is saved; --resume continues it." in ended.err
    assert (output / "checkpoints" / "step-00000001.json").is_file()
    monkeypatch.undo()
    assert run_mtu("train", str(settings_file), "--resume").code == 0


def test_help_shows_each_flag_whole_on_a_narrow_terminal(run_mtu, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = run_mtu("train", "--help")
    for setting in settings_by_key().values():
        assert f" {setting.flag} " in ended.out


def test_switches_can_be_turned_off(run_mtu, settings_file):
    settings_file.write_text(settings_file.read_text() + "\ntensorboard: true\n")
    assert run_mtu("train", str(settings_file), "--no-tensorboard", "--steps", "1").code == 0
    assert not (settings_file.parent / "run" / "tensorboard").exists()
    both = ["--tensorboard", "--no-tensorboard"]
    assert_refused(run_mtu("train", str(settings_file), *both), "--tensorboard and --no-tensorboard contradict")


def test_debug_raises_the_error_itself(settings_file):
    settings_file.write_text("lerning_rate: 1")
    with pytest.raises(ValueError, match="'lerning_rate'"):
        main(["--debug", "train", str(settings_file)])
