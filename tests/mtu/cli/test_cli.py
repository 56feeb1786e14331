"""The command `mtu` as a whole: its surface, its exit codes, and how errors end it."""

import errno
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mtu.inspection
from mtu.cli import app, main

ROOT = Path(__file__).parents[3]

# A change of this list changes what scripts of users can rely on.
SURFACE = {
    "mtu": ["--debug", "--install-completion", "--show-completion", "--version"],
    "mtu inspect": [
        *["--budget", "--expert-ratio", "--json", "--norm", "--num-experts", "--size", "--sweep", "--top-k", "model"]
    ],
    "mtu data": [],
    "mtu data check": ["--json", "--resolution", "--task", "directory"],
    "mtu train": [
        *["--accept-changes", "--backend", "--batch-size", "--betas", "--cache-directory", "--checkpoint-every"],
        *["--checkpoints-total-limit", "--conditioning-dropout-prob", "--data", "--dry-run", "--ema-decay", "--epochs"],
        *["--epsilon", "--frozen-dtype", "--fully-shard", "--gradient-accumulation-steps", "--gradient-checkpointing"],
        *["--latent-cache", "--latent-sampling", "--learning-rate", "--log-every", "--loss-threads", "--loss-weights"],
        *["--max-grad-norm", "--max-inverse-snr", "--max-minutes", "--model", "--no-fully-shard"],
        *["--no-gradient-checkpointing", "--no-random-flip", "--no-rescale-betas-zero-snr", "--no-tensorboard"],
        *["--num-workers", "--optimizer", "--output", "--overwrite", "--precision", "--prediction-type"],
        *["--random-flip", "--rescale-betas-zero-snr", "--resolution", "--resume", "--schedule", "--seed", "--shares"],
        *["--snr-gamma", "--steps", "--tasks", "--tensorboard", "--text-cache", "--upcycle", "--validate-every"],
        *["--validation", "--warmup-steps", "--weight-decay", "config"],
    ],
}


def commands_by_name(command: Any, name: str = "mtu") -> dict[str, Any]:
    """A command, and all commands below it."""
    below = getattr(command, "commands", {}).items()
    return {name: command} | {k: v for word, sub in below for k, v in commands_by_name(sub, f"{name} {word}").items()}


COMMANDS = commands_by_name(get_command(app))


def test_the_commands_and_options_are_these():
    found = {
        name: sorted(flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts))
        for name, command in COMMANDS.items()
    }
    assert found == SURFACE


def test_the_installed_command_is_this_one():
    (command,) = entry_points(group="console_scripts", name="mtu")
    assert command.value == "mtu.cli:main"
    assert command.load() is main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(run_mtu, tmp_path, monkeypatch, command):
    ended = run_mtu(*command.split()[1:], "--help")
    assert ended.code == 0
    assert ended.err == ""
    assert "Examples" in ended.out
    examples = re.findall(r"^ +(mtu .+?) *$", ended.out, re.MULTILINE)
    assert len(examples) >= 3
    for folder in ("data/edit", "photos"):  # which examples name
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        words = [word for word in example.partition(" > ")[0].split() if word != "--debug"]
        # The context of a command is made of its arguments, and refuses those that it does not know.
        name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)
        assert COMMANDS[name].make_context(name, words[len(name.split()) :]).params


def test_help_documents_the_exit_codes(run_mtu):
    text = run_mtu("--help").out
    assert all(re.search(rf"^ +{code}  +The command", text, re.MULTILINE) for code in (0, 1, 2, 130))


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], ["inspect", "--nonsense"]])
def test_command_lines_that_do_not_parse_exit_with_2(run_mtu, arguments):
    assert run_mtu(*arguments).code == 2


def test_neither_help_nor_version_loads_pytorch():
    code = f"""
import runpy, sys
commands = ("--help", "inspect --help", "inspect --budget 1B", "data check --help", "train --help", "train --steps x")
for arguments in (*commands, "--version"):
    sys.argv = ["mtu", *arguments.split()]
    try:
        runpy.run_module("mtu", run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code)
print([name for name in {("torch", "diffusers", "transformers", "numpy")} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"ended with (\d)", result.stdout) == ["0", "0", "2", "0", "0", "2", "0"]
    assert re.search(r"^mtu \d+\.\d+\.\d+", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------------------------ errors


def raise_in_inspect(monkeypatch, error: BaseException) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(mtu.inspection, "compare_with_original", fail)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("This [bold]is[/] wrong:\n  " + "a long reason, " * 20), "This [bold]is[/] wrong: a long reason, "),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.json"), "No such file or directory: 'a.json'"),
    ],
    ids=["ValueError", "OSError"],
)
def test_errors_of_the_library_are_one_line(run_mtu, monkeypatch, error, line):
    raise_in_inspect(monkeypatch, error)
    ended = run_mtu("inspect")
    assert ended.code == 1
    assert ended.out == ""
    assert ended.err.startswith("mtu inspect: error: ")
    assert line in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.slow
def test_an_error_is_all_that_a_process_writes_on_stderr():
    command = [sys.executable, "-m", "mtu", "inspect", "no/such/folder"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"mtu inspect: error: There is no folder 'no/such/folder'.*\n", result.stderr)


def test_errors_are_red_on_a_terminal(run_mtu, monkeypatch):
    raise_in_inspect(monkeypatch, ValueError("Wrong."))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run_mtu("inspect").err == "\x1b[31mmtu inspect: error: Wrong.\x1b[0m\n"


def test_debug_raises_the_error_itself(monkeypatch):
    raise_in_inspect(monkeypatch, ValueError("Wrong."))
    with pytest.raises(ValueError, match=r"^Wrong\.$"):
        main(["--debug", "inspect"])


def test_errors_that_are_faults_of_the_program_are_raised(monkeypatch):
    raise_in_inspect(monkeypatch, KeyError("a fault"))
    with pytest.raises(KeyError, match="a fault"):
        main(["inspect"])


def test_an_interrupted_command_exits_with_130(run_mtu, monkeypatch):
    raise_in_inspect(monkeypatch, KeyboardInterrupt())
    ended = run_mtu("inspect")
    assert (ended.code, ended.out, ended.err) == (130, "", "Interrupted.\n")


def test_a_closed_pipe_ends_the_command_without_a_word(run_mtu, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # typer replaces them
    raise_in_inspect(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    ended = run_mtu("inspect")
    assert (ended.code, ended.out, ended.err) == (1, "", "")
