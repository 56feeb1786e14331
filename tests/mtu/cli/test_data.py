"""`mtu data check`: what it prints, and its exit codes."""

import json

import pytest

from tests.mtu.data.folders import SIZE, edit, write_edits, write_image, write_rows


def test_good_data_are_summed_up(run_mtu, tmp_path):
    write_edits(tmp_path / "edit")
    write_image(tmp_path / "text-to-image/a.png", size=(40, 20))
    write_rows(tmp_path / "text-to-image", [{"file_name": "a.png", "text": ["a", "b"]}])
    (tmp_path / "notes").mkdir()
    ended = run_mtu("data", "check", str(tmp_path))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "edit: 3 rows, 3 variants, 3 prompts, images from 12×8 to 12×8 pixels; 0 bad rows.",
        "text-to-image: 1 row, 1 variant, 2 prompts, images from 40×20 to 40×20 pixels; 0 bad rows.",
    ]


def test_every_bad_row_is_a_line_and_the_exit_code_is_1(run_mtu, tmp_path):
    folder = write_edits(tmp_path / "edit", 4)
    write_rows(folder, [edit(0), {**edit(1), "prompt": ""}, b"{", edit(2), edit(3)])
    (folder / "after/3.png").write_bytes(b"")
    ended = run_mtu("data", "check", str(folder), "--resolution", "9")
    assert ended.code == 1
    *lines, summary = ended.out.splitlines()
    assert [line.split(": ")[0] for line in lines if "warning" not in line] == [
        f"{folder}/metadata.jsonl, line {number}" for number in (2, 3, 5)
    ]
    assert sum("is smaller than the resolution of 9" in line for line in lines) == 2
    assert summary == "edit: 5 rows, 2 variants, 2 prompts, images from 12×8 to 12×8 pixels; 3 bad rows."
    assert run_mtu("data", "check", str(folder), "--task", "text-to-image").code == 1


def test_json_has_all_of_it(run_mtu, tmp_path):
    folder = write_edits(tmp_path / "data/edit", 30)
    write_rows(folder, [edit(0), *(edit(number) for number in range(30)), {}])
    arguments = ["data", "check", str(folder.parent), "--resolution", "100"]
    (report,) = json.loads(run_mtu(*arguments, "--json").out)
    assert (report["folder"], report["task"], report["rows"], report["bad_rows"]) == (str(folder), "edit", 32, 1)
    assert (report["smallest"], report["largest"]) == ([*SIZE], [*SIZE])
    severities = [problem["severity"] for problem in report["problems"]]
    assert (severities.count("error"), severities.count("warning")) == (3, 32)
    assert report["problems"][-1]["line"] == 32
    # Of many warnings, the text shows the first ones.
    lines = run_mtu(*arguments).out.splitlines()
    assert sum(": warning: " in line for line in lines) == 20
    assert "12 more warnings, all of which --json lists." in lines
    assert sum("lacks the key" in line for line in lines) == 3


def test_a_task_of_ones_own_is_checked_as_its_first_row_is(run_mtu, tmp_path):
    folder = write_edits(tmp_path / "colorize")
    write_rows(folder, [edit(0), {"target_file_name": "after/1.png", "prompt": "b"}])
    ended = run_mtu("data", "check", str(tmp_path))
    assert ended.code == 1
    assert "line 2: The row lacks the key 'condition_file_name': the task 'colorize' takes an image." in ended.out
    assert "colorize (a task with an image, like its first row): 2 rows" in ended.out


def test_a_folder_named_after_a_task_needs_rows(run_mtu, tmp_path):
    (tmp_path / "remove").mkdir()
    ended = run_mtu("data", "check", str(tmp_path))
    assert ended.code == 1
    assert ended.out.startswith(f"{tmp_path}/remove/metadata.jsonl: {tmp_path}/remove has no metadata.jsonl.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        (["empty"], "holds neither a metadata.jsonl nor folders with one"),
        (["photos"], "not named after a built-in task: give --task with one of text-to-image, edit, "),
        (["photos", "--task", "edti"], "expected one of text-to-image, edit, super-resolution, remove, but got 'edti'"),
        (["photos", "--task", "edit", "--resolution", "0"], "Invalid value for '--resolution'"),
        (["capitals"], "The folder capitals/Edit is not named after a task."),
        ([], "Missing argument 'DIR'"),
    ],
)
def test_a_wrong_command_line_exits_with_2(run_mtu, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_edits(tmp_path / "photos")
    write_edits(tmp_path / "capitals/Edit")
    ended = run_mtu("data", "check", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in " ".join(ended.err.replace("│", " ").split())
