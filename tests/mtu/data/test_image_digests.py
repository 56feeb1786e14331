"""Digests of files: each file is read once, and again as soon as it changes."""

import hashlib
import os
from pathlib import Path

import pytest

from mtu.data import image_digests
from mtu.data.image_digests import ImageDigests

OLD = 10**18  # nanoseconds: in 2001


def write(file: Path, contents: bytes, modified: int = OLD) -> str:
    file.write_bytes(contents)
    os.utime(file, ns=(modified, modified))
    return hashlib.sha256(contents).hexdigest()


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, by name."""
    names, real = [], open

    def opened(file, *args, **kwargs):
        names.append(Path(file).name)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(image_digests, "open", opened, raising=False)
    return names


def test_a_file_is_read_again_only_when_it_changed(tmp_path, reads):
    file, memo = tmp_path / "ü\udce9.png", tmp_path / "memo" / "digests.safetensors"
    digest = write(file, b"one")
    digests = ImageDigests(memo)
    assert [digests.of(file), digests.of(file)] == [digest] * 2
    digests.save()
    later = ImageDigests(memo)
    assert later.of(file) == digest
    assert len(reads) == 1
    digest = write(file, b"two", OLD + 1)
    assert [later.of(file), later.of(file)] == [digest] * 2
    digest = write(file, b"three", OLD + 1)
    assert later.of(file) == digest
    assert len(reads) == 3
    with pytest.raises(FileNotFoundError):
        later.of(tmp_path / "missing.png")


def test_a_file_that_may_still_change_unseen_is_read_again(tmp_path, reads):
    file, digests = tmp_path / "a.png", ImageDigests()
    for contents in (b"one", b"two"):
        (tmp_path / "a.png").write_bytes(contents)
        os.utime(file, ns=(2**62, 2**62))  # as in the same tick
        assert digests.of(file) == hashlib.sha256(contents).hexdigest()


def test_processes_that_save_keep_each_others_digests(tmp_path, reads):
    files, memo = [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "digests"
    for file in files:
        write(file, file.name.encode())
    for digests, file in zip([ImageDigests(memo), ImageDigests(memo)], files, strict=True):
        digests.of(file)
        digests.save()
    last = ImageDigests(memo)
    for file in files:
        last.of(file)
    assert reads == ["a.png", "b.png"]


def test_a_damaged_memory_is_forgotten_with_a_warning(tmp_path, caplog):
    file, memo = tmp_path / "a.png", tmp_path / "digests"
    digest = write(file, b"one")
    memo.write_bytes(b"torn")
    digests = ImageDigests(memo)
    assert digests.of(file) == digest
    assert "digests is truncated or was altered" in caplog.text
    digests.save()
    assert ImageDigests(memo).of(file) == digest


def test_digests_are_saved_now_and_then_and_a_full_disk_costs_no_training(tmp_path, monkeypatch, caplog):
    files, memo = [tmp_path / f"{number}.png" for number in range(5)], tmp_path / "digests"
    for file in files:
        write(file, file.name.encode())
    digests = ImageDigests(memo)
    digests.of(files[0])
    assert not memo.exists()
    monkeypatch.setattr(image_digests, "_SECONDS_BETWEEN_SAVES", 0)
    digests.of(files[1])
    assert memo.exists()

    def full(*args):
        raise OSError(28, f"{memo} cannot be written: No space left on device")

    monkeypatch.setattr(image_digests.storage, "write_tensors", full)
    assert digests.of(files[2]) == digests.of(files[2])
    assert caplog.text.count("No space left on device") == 1
    with pytest.raises(OSError, match="No space left on device"):
        digests.save()
