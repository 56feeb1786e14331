"""A run on a GPU without one: steps that stand in for its own."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_run
from benchmarks.gpu.output import FACTS, RESULTS, SUMMARY
from benchmarks.gpu.process import CommandGroup, kill_leftover
from benchmarks.gpu.stages import (
    RESERVE_SECONDS,
    GPURun,
    RunInterrupted,
    group_into_stages,
    order_steps,
    steps_that_fit,
)
from benchmarks.gpu.state import CUT, DONE, ENDED, FAILED, LATE, Outcome, State
from benchmarks.gpu.steps import GO, STEPS, Step
from benchmarks.harness.provenance import ROOT

from .run_cases import COMMIT, Folders, shell


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def runs(pid):
    """Whether a process is there and is no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------- budgets and failures


def test_results_are_out_after_each_step_and_what_is_done_is_not_run_again(folders):
    peek = f"{sys.executable} -m zipfile -l {folders.output / RESULTS} > listing.txt"
    steps = [shell("first", "echo a,b >> rows.csv; echo 'FAILED, gradients'"), shell("second", peek)]
    assert folders.call(*steps) == {"first": DONE, "second": DONE}
    packed = folders.packed()
    assert packed["first/rows.csv"] == "a,b\n"
    assert "first/rows.csv" in packed["second/listing.txt"]
    assert folders.sentence("first") == "FAILED, gradients"
    assert "| first | done | 0 | FAILED, gradients |" in (folders.output / SUMMARY).read_text()
    assert {file.name for file in folders.output.iterdir()} == {RESULTS, SUMMARY, FACTS}
    assert folders.call(*steps) == {"first": DONE, "second": DONE}
    assert folders.packed() == packed


def test_a_model_comes_back_in_parts_that_make_one_file(folders, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.output._PART_BYTES", 1000)
    train = "mkdir -p output/model/unet; head -c 2500 /dev/urandom > output/model/unet/weights"
    assert folders.call(shell("icons", train)) == {"icons": DONE}
    parts = sorted(folders.output.glob("icons-model.zip*"))
    assert [(part.name, part.stat().st_size <= 1000) for part in parts] == [
        (f"icons-model.zip.{number:03d}", True) for number in range(3)
    ]
    assert "`cat icons-model.zip.* > icons-model.zip; unzip icons-model.zip`" in (folders.output / SUMMARY).read_text()
    with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        assert len(archive.read("unet/weights")) == 2500
    assert "icons/output/model/unet/weights" not in folders.packed()


def test_a_step_that_left_something_out_is_tried_again(folders):
    assert folders.call(shell("one", "echo 'skipped x: no room'; echo 1 row")) == {"one": FAILED}
    assert folders.sentence("one") == "Something is missing: skipped x: no room"
    assert folders.call(shell("one", "echo 2 rows")) == {"one": DONE}


@pytest.mark.slow
def test_a_step_that_hangs_or_crashes_costs_no_other(folders):
    child = "(trap '' TERM; sleep 60) & echo $! > child.txt"
    steps = [
        shell("hangs", f"{child}; sleep 60", seconds=0.5),
        shell("crashes", "echo begun; kill -SEGV $$"),
        shell("fails", "echo 'FAILED, not timed: eager'; echo 1 row; exit 3"),
        shell("absent", "no-such-program"),
        shell("works", "echo 1 > rows.csv"),
    ]
    statuses = {"hangs": ENDED, "crashes": FAILED, "fails": FAILED, "absent": FAILED, "works": DONE}
    assert folders.call(*steps) == statuses
    assert folders.sentence("hangs").startswith("It still ran after ")
    assert folders.sentence("crashes") == "Signal SIGSEGV ended it: begun"
    assert folders.sentence("fails") == "It returned 3: FAILED, not timed: eager"
    assert folders.sentence("absent").startswith("It returned 127: ")
    assert not runs(int(folders.packed()["hangs/child.txt"]))
    # Failed steps run again, after those that have not run yet.
    again = [shell("fails", "echo right; date +%s%N > rows.csv"), shell("new", "date +%s%N > rows.csv")]
    assert folders.call(*again) == {"fails": DONE, "new": DONE}
    assert folders.sentence("fails") == ""
    assert folders.packed()["fails/log.txt"] == "FAILED, not timed: eager\n1 row\nright\n"
    assert folders.packed()["new/rows.csv"] < folders.packed()["fails/rows.csv"]


def test_steps_that_fill_the_time_come_after_failed_ones_and_tuning_is_the_last_failed_one():
    names = ["smoke", "tune", "ffn", "unet", "icons", "new", "cut", "done"]
    steps = [shell(name, "true", decides_run=name == "smoke", fills_time=name == "icons") for name in names]
    before = {"smoke": FAILED, "tune": ENDED, "ffn": FAILED, "unet": ENDED, "cut": CUT, "icons": LATE, "done": DONE}
    todo = order_steps(steps, {name: Outcome(status, 1) for name, status in before.items()})
    assert [step.name for step in todo] == ["smoke", "new", "cut", "ffn", "unet", "tune", "icons"]
    assert [step.name for step in STEPS if step.fills_time] == ["icons"]


@pytest.mark.slow
def test_the_run_ends_in_time_and_the_next_call_goes_on(folders):
    steps = [
        shell("long", "echo x >> rows.csv; test $(wc -l < rows.csv) = 2 || sleep 60"),
        shell("late", "true", least_seconds=5),
    ]
    start = time.monotonic()
    assert folders.call(*steps, seconds=1) == {"long": CUT, "late": LATE}
    assert time.monotonic() - start < 1 + RESERVE_SECONDS
    assert folders.packed()["long/rows.csv"] == "x\n"
    assert folders.call(*steps) == {"long": DONE, "late": DONE}
    assert folders.packed()["long/rows.csv"] == "x\nx\n"


@pytest.mark.slow
def test_steps_that_do_not_stop_are_waited_for_together(folders, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.process.GRACE_SECONDS", 1.0)
    steps = [shell(name, "trap '' TERM; sleep 60; sleep 60", runs_alone=False) for name in "abcde"]
    start = time.monotonic()
    assert set(folders.call(*steps, seconds=0.5).values()) == {CUT}
    assert time.monotonic() - start < 4


def test_a_run_that_is_told_to_end_notes_what_it_cut(folders, monkeypatch):
    steps = shell("one", "true"), shell("two", "echo x > rows.csv; sleep 60")
    file = folders.state / f"commit-{COMMIT}" / "steps" / "two" / "rows.csv"

    def interrupt():
        if file.exists():
            raise RunInterrupted

    monkeypatch.setattr("benchmarks.gpu.stages.sleep_briefly", interrupt)
    with pytest.raises(RunInterrupted):
        folders.call(*steps)
    assert folders.sentence("two") == "The run was told to end."
    assert folders.packed()["two/rows.csv"] == "x\n"


def test_nothing_is_measured_before_the_first_step_is_right(folders, capsys):
    steps = [shell("smoke", "echo 'y must be within 1'; exit 1", decides_run=True), shell("other", "true")]
    assert folders.call(*steps) == {"smoke": FAILED}
    assert "The rest of the time is kept" in capsys.readouterr().out
    again = steps[0]._replace(make_command=lambda place: ["true"])
    assert folders.call(again, steps[1]) == {
        "smoke": DONE,
        "other": DONE,
    }


@pytest.mark.slow
def test_steps_that_compile_do_so_beside_others_and_are_timed_alone(folders):
    clock = "date +%s%N >"
    hold = f"touch {GO}.ready; while ! test -e {GO}; do sleep 0.02; done; {clock} begin.txt; sleep 0.2; {clock} end.txt"
    steps = [
        shell("one", f"sleep 0.3; {hold}", runs_alone=False, seconds_alone=5),
        shell("two", hold, runs_alone=False, seconds_alone=5, seconds=0.2),
        shell("beside", f"sleep 0.5; {clock} end.txt", runs_alone=False),
        shell("stuck", "sleep 60", runs_alone=False, seconds_alone=5, seconds=0.4),
    ]
    assert folders.call(*steps) == {"one": DONE, "two": DONE, "beside": DONE, "stuck": ENDED}
    times = {name: int(text) for name, text in folders.packed().items() if name.endswith(("begin.txt", "end.txt"))}
    assert times["beside/end.txt"] < times["one/begin.txt"] < times["one/end.txt"] < times["two/begin.txt"]


def test_only_steps_that_follow_each_other_run_together():
    a, b, c, d, e = (shell(name, "true", runs_alone=name in "ad") for name in "abcde")
    assert list(group_into_stages([a, b, c, d, e])) == [[a], [b, c], [d], [e]]


def test_the_times_of_steps_that_are_timed_alone_add_up():
    a, b, c = (Step(name, "", lambda place: [], 100, 40, runs_alone=False, seconds_alone=20) for name in "abc")
    beside = Step("beside", "", lambda place: [], 100, 30, runs_alone=False)
    stage = [a, b, c, beside]
    assert [steps_that_fit(stage, left) for left in (100, 99, 60, 59, 29)] == [
        stage,
        [a, b, beside],
        [a, beside],
        [beside],
        [],
    ]


@pytest.mark.slow
def test_compiling_leaves_time_for_timing(folders):
    hold = f"touch {GO}.ready; while ! test -e {GO}; do sleep 0.02; done; sleep 0.5; echo x > rows.csv"
    steps = (
        shell("one", hold, runs_alone=False, seconds_alone=1),
        shell("stuck", "sleep 60", runs_alone=False, seconds_alone=1),
    )
    # Its budget was not over: the next call begins with it.
    assert folders.call(*steps, seconds=3) == {"one": DONE, "stuck": CUT}
    assert folders.packed()["one/rows.csv"] == "x\n"


# ------------------------------------------------------------------------------------------------- killed at any moment

RUNNER = """
import sys
from pathlib import Path
from tests.benchmarks.gpu.test_gpu_run import Folders, interrupted_steps
Folders(Path(sys.argv[1])).call(*interrupted_steps())
"""


def interrupted_steps():
    first = shell("first", "echo x >> rows.csv")
    return first, shell("second", "echo $$ > process.txt; echo x >> rows.csv; test $(wc -l < rows.csv) = 2 || sleep 60")


@pytest.mark.slow
def test_a_run_that_is_killed_loses_nothing_and_what_it_left_is_ended(folders):
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(folders.state.parent)], cwd=ROOT)
    file = folders.state / f"commit-{COMMIT}" / "steps" / "second" / "rows.csv"
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.02)
    runner.kill()
    runner.wait()
    left = int(file.with_name("process.txt").read_text())
    assert runs(left)
    assert folders.packed()["first/rows.csv"] == "x\n"
    assert folders.call(*interrupted_steps()) == {"first": DONE, "second": DONE}
    assert not runs(left)
    assert folders.packed()["first/rows.csv"] == "x\n"
    assert folders.packed()["second/rows.csv"] == "x\nx\n"


def test_a_command_runs_also_where_its_note_cannot_be_written(tmp_path):
    log = tmp_path / "log.txt"
    group = CommandGroup(["echo", "here"], tmp_path / "no" / "note", log, tmp_path, {"PATH": os.environ["PATH"]})
    while group.exit_status is None:
        time.sleep(0.01)
    group.stop_or_kill()
    assert log.read_text().endswith("here\n")


def test_a_process_that_got_a_number_anew_is_left_alone(tmp_path):
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        note = tmp_path / "note"
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        line = Path(f"/proc/{other.pid}/stat").read_text()
        fields = line.split()
        fields[21] = str(int(fields[21]) - 1)
        for text in (boot + " ".join(fields), f"another boot\n{line}", boot, ""):
            note.write_text(text)
            assert not kill_leftover(note)
            assert not note.exists()
        assert other.poll() is None
        note.write_text(boot + line)
        assert kill_leftover(note)
        assert other.wait() == -signal.SIGKILL
    finally:
        other.kill()


def test_a_note_or_an_outcome_that_is_only_half_there_is_none(folders):
    assert folders.call(shell("one", "echo x >> rows.csv")) == {"one": DONE}
    (folders.state / f"commit-{COMMIT}" / "outcomes" / "one").write_text('{"status": "do')
    assert folders.call(shell("one", "echo x >> rows.csv")) == {"one": DONE}
    assert folders.packed()["one/rows.csv"] == "x\nx\n"


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("option", ["--state", "--output"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    given = {"--state": str(tmp_path / "state"), "--output": str(tmp_path / "output")}
    given[option] = str(tmp_path / "file" / "folder")
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main([part for pair in given.items() for part in pair] + ["--commit", COMMIT])
    expected = f"{option} must be a folder that can be written, got {given[option]}: Not a directory."
    assert expected in capsys.readouterr().err
    # The output folder is looked at first.
    assert option == "--state" or not (tmp_path / "state").exists()


def test_one_call_at_a_time_uses_a_state_folder(folders):
    state = State(folders.state, COMMIT)
    with pytest.raises(ValueError, match=f"--state must be of this call alone, but another one uses {folders.state}"):
        folders.call()
    state.release()
    assert folders.call() == {}


def test_results_that_cannot_be_copied_out_stay_and_the_rest_goes_on(folders, capsys):
    swap = f"rm -r {folders.output}; touch {folders.output}; echo 1 > rows.csv"
    steps = shell("one", swap), shell("two", "echo 2 > rows.csv")
    assert folders.call(*steps) == {"one": DONE, "two": DONE}
    assert "The results cannot be copied out now, and stay in the state folder" in capsys.readouterr().out
    folders.output.unlink()
    folders.call(*steps)
    assert {"one/rows.csv", "two/rows.csv"} <= folders.packed().keys()


def test_steps_of_another_commit_do_not_count(folders):
    assert folders.call(shell("one", "true")) == {"one": DONE}
    state = State(folders.state, "def5678+tuned/../x")
    assert state.read_outcome("one") is None
    assert state.folder.parent == folders.state.resolve()
    state.release()


def test_a_smoke_test_does_nothing_for_a_run_of_the_same_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(State, "copy_source_tree", lambda state: state.tree.mkdir(exist_ok=True))
    for options in ([], ["--quick"], []):
        monkeypatch.setattr(gpu_run, "STEPS", (shell("smoke", f"echo {options} > said.txt"),))
        command = ["--state", str(tmp_path / "state"), "--output", str(tmp_path / "output"), "--commit", COMMIT]
        assert gpu_run.main([*command, *options]) == 0
        assert json.loads((tmp_path / "output" / FACTS).read_text())["quick"] == bool(options)
    assert {path.name for path in (tmp_path / "state").glob("commit-*")} == {
        f"commit-{COMMIT}",
        f"commit-{COMMIT}+quick",
    }


def test_only_a_copy_of_the_tree_that_fails_is_told_as_one(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise BrokenPipeError

    command = ["--state", str(tmp_path / "state"), "--output", str(tmp_path / "output"), "--commit", COMMIT]
    monkeypatch.setattr(GPURun, "run_steps", refuse)
    monkeypatch.setattr(State, "copy_source_tree", lambda state: None)
    with pytest.raises(BrokenPipeError):
        gpu_run.main(command)
    monkeypatch.setattr(State, "copy_source_tree", refuse)
    assert gpu_run.main(command) == 1
    assert "The copy of the tree cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "dinner"], "unknown step 'dinner': expected some of smoke, tune, "),
        (["--commit", ""], "--commit must name a commit, got ''."),
        (["--minutes", "0.1"], "--minutes must be more than the 8 s at the end, got 0.1."),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main(arguments)
    assert words in capsys.readouterr().err
