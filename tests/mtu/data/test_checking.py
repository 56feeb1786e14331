"""Checks of image folders: every bad row with its line, and nothing is changed."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mtu.data import checking
from mtu.data.checking import Problem, check_image_folder, report_on_image_folder
from mtu.data.image_folder import ImageFolder
from mtu.tasks import EDIT, SUPER_RESOLUTION, TEXT_TO_IMAGE
from tests.mtu.data.folders import SIZE, edit, write_edits, write_image, write_rows
from tests.mtu.data.test_image_folder import state_of


def messages(problems: list[Problem], severity: str = "error") -> dict[int | None, list[str]]:
    """The messages of one severity by line."""
    found: dict[int | None, list[str]] = {}
    for problem in problems:
        if problem.severity == severity:
            found.setdefault(problem.line, []).append(problem.message)
    return found


@pytest.fixture
def spoilt(tmp_path):
    """A folder with one bad row of each kind on lines 2 to 8."""
    folder = write_edits(tmp_path / "edit", 9)
    rows = [edit(number) for number in range(9)]
    (folder / "after/1.png").unlink()
    (folder / "before/2.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    Image.fromarray(noise).save(folder / "after/3.png")
    (folder / "after/3.png").write_bytes((folder / "after/3.png").read_bytes()[:-2000])
    rows[4]["prompt"] = "  "
    rows[5]["condition_file_name"] = "../edit/before/5.png"
    write_image(folder / "before/6.png", size=(SIZE[0], SIZE[1] + 3))
    return write_rows(folder, [*rows[:7], b'{"target_file_name": ', *rows[7:]])


def test_every_bad_row_is_named_with_its_line_and_nothing_is_changed(spoilt):
    before = state_of(spoilt)
    report = report_on_image_folder(spoilt, EDIT, num_threads=3)
    found = messages(report.problems)
    patterns = {
        2: r"There is no file .*after/1\.png",
        3: r"before/2\.png is no image in a format that Pillow knows",
        4: r"after/3\.png cannot be decoded: .*truncated",
        5: "The row has an empty prompt",
        6: "The row must name a file inside the folder by 'condition_file_name'",
        7: r"before/6\.png \(12×11\) and its target after/6\.png \(12×8\) must have one aspect ratio",
        8: "The row is not JSON",
    }
    assert found.keys() == patterns.keys()
    assert all(len(found[line]) == 1 and re.search(patterns[line], found[line][0]) for line in patterns)
    assert (report.rows, report.bad_rows, report.variants, report.prompts) == (10, 7, 3, 3)
    assert (report.smallest, report.largest) == (SIZE, (12, 11))
    assert str(report.problems[0]).startswith(f"{spoilt}/metadata.jsonl, line 2: There is no file")
    assert state_of(spoilt) == before


def test_without_decoding_images_need_only_exist(spoilt, monkeypatch):
    monkeypatch.setattr(checking, "open_image", None)
    assert messages(check_image_folder(spoilt, EDIT, decode=False)).keys() == {2, 5, 6, 8}


def test_what_a_check_accepts_can_be_loaded(tmp_path):
    folder = write_edits(tmp_path / "edit", 3)
    assert check_image_folder(folder, EDIT, resolution=SIZE[1]) == []
    data = ImageFolder(folder, EDIT)
    assert [data.load_images(row, 0).target.size for row in range(3)] == [SIZE] * 3


def test_a_bad_file_spoils_each_row_that_names_it(tmp_path):
    folder = write_edits(tmp_path / "edit", 3)
    (folder / "before/0.png").write_bytes(b"")
    write_rows(folder, [{**edit(number), "condition_file_name": "before/0.png"} for number in range(3)])
    assert messages(check_image_folder(folder, EDIT)).keys() == {1, 2, 3}


def test_warnings_leave_rows_good(tmp_path):
    folder = write_edits(tmp_path / "edit", 4)
    write_image(folder / "after/2.png", (1, 2, 3, 4), mode="RGBA")
    listed = {"target_file_names": ["after/3.png"], "condition_file_name": "before/3.png", "prompts": ["x"]}
    write_rows(folder, [edit(0), edit(1), edit(0), edit(2), listed])
    write_image(folder / "after/0.png", size=(120, 80))
    write_image(folder / "before/0.png", size=(60, 40))
    report = report_on_image_folder(folder, EDIT, resolution=20)
    assert report.bad_rows == 0
    found = messages(report.problems, "warning")
    small = r"after/\d\.png \(12×8\) is smaller than the resolution of 20"
    patterns = {
        2: [small],
        3: ["The row repeats line 1"],
        4: [r"after/2\.png is partly transparent", small],
        5: ["The row and line 1 differ in their keys or types", small],
    }
    assert {line: len(texts) for line, texts in found.items()} == {line: len(texts) for line, texts in patterns.items()}
    for line, texts in patterns.items():
        assert all(any(re.search(text, message) for message in found[line]) for text in texts)
    assert "line 3: warning: The row repeats line 1." in "\n".join(map(str, report.problems))


@pytest.mark.parametrize(
    ("target", "condition", "fits"),
    [
        ((100, 50), (50, 25), True),
        ((101, 67), (50, 33), True),  # rounded down
        ((2041, 1530), (510, 383), True),  # rounded up
        ((50, 25), (100, 50), True),
        ((100, 50), (50, 50), False),
        ((100, 50), (50, 100), False),
        ((512, 512), (512, 500), False),
        ((1, 1), (2, 1), True),
    ],
)
def test_aspect_ratios_are_compared_up_to_whole_pixels(tmp_path, target, condition, fits):
    write_image(tmp_path / "a.png", size=target)
    write_image(tmp_path / "b.png", size=condition)
    write_rows(tmp_path, [{"target_file_name": "a.png", "condition_file_name": "b.png"}])
    assert (messages(check_image_folder(tmp_path, SUPER_RESOLUTION)) == {}) == fits


def test_what_training_would_change_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    names = {"point": (1, 1), "large": (30, 30), "good": (20, 20)}
    for name, size in names.items():
        write_image(tmp_path / f"{name}.png", size=size)
    rows = [{"file_name": f"{name}.png", "text": name} for name in names]
    write_rows(tmp_path, [*rows, {"file_name": "good.png", "text": "word " * 78}])
    problems = check_image_folder(tmp_path, TEXT_TO_IMAGE)
    assert messages(problems) == {}
    assert messages(problems, "warning") == {
        1: ["point.png (1×1) has an edge of less than 8 pixels, and is enlarged."],
        2: ["large.png (30×30) has more pixels than Pillow expects, and takes long to load."],
        4: ["A prompt has 78 words: training sees its first 77 tokens, about 60 words, alone."],
    }


def test_a_folder_without_rows_is_bad_as_a_whole(tmp_path):
    for make, message in [
        (lambda: None, "has no metadata.jsonl."),
        (lambda: write_rows(tmp_path, []), "The file has no rows."),
    ]:
        make()
        report = report_on_image_folder(tmp_path, EDIT)
        assert report.bad_rows == 1
        (problem,) = report.problems
        assert problem.line is None
        assert message in str(problem)


def test_many_files_are_decoded_in_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "_FILES_AT_ONCE", 7)
    rows = []
    for number in range(40):
        write_image(tmp_path / f"{number}.png", size=(number + 1, 4))
        rows.append({"file_name": f"{number}.png", "text": json.dumps(number)})
    (tmp_path / "23.png").write_bytes(b"")
    report = report_on_image_folder(write_rows(tmp_path, rows), TEXT_TO_IMAGE, num_threads=4, show_progress=True)
    assert messages(report.problems).keys() == {24}
    assert (report.smallest, report.largest) == ((1, 4), (40, 4))
