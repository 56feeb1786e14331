"""`ImageFolder`: rows, variants and images of a folder, which never changes."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from mtu.data.image_digests import ImageDigests
from mtu.data.image_folder import ImageFolder
from mtu.tasks import EDIT, TEXT_TO_IMAGE
from tests.mtu.data.folders import edit, write_edits, write_image, write_rows


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The times and contents of all files of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_rows_have_prompts_images_and_a_place(tmp_path):
    folder = write_edits(tmp_path / "edits")
    before = state_of(folder)
    for data in (ImageFolder(folder, EDIT), pickle.loads(pickle.dumps(ImageFolder(str(folder), EDIT)))):
        assert len(data) == 3
        assert data.prompts(2) == [("edit 2",)]
        target, condition = data.load_images(2, 0)
        assert (target.mode, np.asarray(target)[0, 0].tolist()) == ("RGB", [2, 0, 0])
        assert np.asarray(condition)[0, 0].tolist() == [0, 2, 0]
        assert data.describe_row(1) == f"{folder}/metadata.jsonl, line 2"
    assert state_of(folder) == before


def test_variants_are_alternatives_of_a_row(tmp_path):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", (ord(name), 0, 0))
    rows = [{"target_file_names": ["a.png", "b.png"], "condition_file_name": "c.png", "prompts": ["one", ["2", "two"]]}]
    data = ImageFolder(write_rows(tmp_path, rows), EDIT)
    assert len(data) == 1
    assert data.prompts(0) == [("one",), ("2", "two")]
    colours = [[np.asarray(image)[0, 0, 0] for image in data.load_images(0, variant)] for variant in (0, 1)]
    assert colours == [[ord("a"), ord("c")], [ord("b"), ord("c")]]
    assert data.image_digest(0, 0) != data.image_digest(0, 1)


def test_digests_follow_contents_and_not_names(tmp_path):
    one, other = write_edits(tmp_path / "one"), write_edits(tmp_path / "other")
    memo = ImageDigests(tmp_path / "memo")
    data = ImageFolder(one, EDIT, memo)
    digests = [data.image_digest(row, 0) for row in range(3)]
    assert len(set(digests)) == 3
    assert [ImageFolder(other, EDIT).image_digest(row, 0) for row in range(3)] == digests
    write_image(one / "before/1.png", (9, 9, 9))
    os.utime(one / "before/1.png", (0, 0))
    assert [data.image_digest(row, 0) == digests[row] for row in range(3)] == [True, False, True]


def test_the_digest_of_a_folder_follows_its_rows_and_files(tmp_path):
    folder = write_edits(tmp_path / "edits")
    digest = ImageFolder(folder, EDIT).digest
    assert ImageFolder(write_edits(tmp_path / "copy"), EDIT).digest == digest
    write_image(folder / "after/0.png", size=(120, 80))
    changed = ImageFolder(folder, EDIT).digest
    write_rows(folder, [edit(0), edit(1)])
    assert len({digest, changed, ImageFolder(folder, EDIT).digest}) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "after/1.png").write_bytes(b""), r"after/1\.png is no image in a format"),
        (lambda folder: (folder / "before/1.png").unlink(), r"There is no file .*before/1\.png"),
    ],
    ids=["corrupt", "missing"],
)
def test_an_image_that_cannot_be_read_names_its_row(tmp_path, spoil, message):
    folder = write_edits(tmp_path / "edits")
    data = ImageFolder(folder, EDIT)
    spoil(folder)
    with pytest.raises(ValueError, match=rf"edits/metadata\.jsonl, line 2: .*{message}"):
        data.load_images(1, 0)
    if not (folder / "before/1.png").exists():
        with pytest.raises(ValueError, match=r"line 2: .*before/1\.png cannot be read: No such file"):
            data.image_digest(1, 0)


def test_folders_without_rows_and_rows_with_faults_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*none\.$"):
        ImageFolder(tmp_path / "none", EDIT)
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl\.$"):
        ImageFolder(tmp_path, EDIT)
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl, but a metadata\.csv\.$"):
        ImageFolder(tmp_path, EDIT)
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no rows"):
        ImageFolder(write_rows(tmp_path, [b"", b"  "]), EDIT)
    with pytest.raises(
        ValueError, match=r"metadata\.jsonl, line 2: the row lacks the key 'condition_file_name': .* lists all"
    ):
        ImageFolder(write_rows(tmp_path, [edit(0), {"target_file_name": "a.png", "prompt": "b"}]), EDIT)
    with pytest.raises(
        ValueError, match="line 1: the row has a condition image, but the task 'text-to-image' takes none"
    ):
        ImageFolder(write_rows(tmp_path, [edit(0)]), TEXT_TO_IMAGE)


def test_a_link_may_lead_out_of_the_folder(tmp_path):
    write_image(tmp_path / "elsewhere/photo.png", (7, 7, 7))
    folder = write_rows(tmp_path / "mine", [{"file_name": "photos/photo.png", "text": "a photo"}])
    (folder / "photos").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    data = ImageFolder(folder, TEXT_TO_IMAGE)
    assert np.asarray(data.load_images(0, 0).target)[0, 0].tolist() == [7, 7, 7]
    contents = hashlib.sha256((tmp_path / "elsewhere/photo.png").read_bytes()).hexdigest()
    assert data.image_digest(0, 0) == hashlib.sha256(contents.encode()).hexdigest()


def test_a_thousand_rows_are_one_string(tmp_path):
    """Worker processes would copy an object for each row."""
    rows = [{"file_name": "a.png", "text": f"caption {number} " * 5} for number in range(1000)]
    size = (write_rows(tmp_path, rows) / "metadata.jsonl").stat().st_size
    data = ImageFolder(tmp_path, TEXT_TO_IMAGE)
    assert len(pickle.dumps(data)) < size + 1000 * 24 + 2000
    assert json.loads(json.dumps(data.prompts(999))) == [[rows[999]["text"]]]
