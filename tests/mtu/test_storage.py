"""The atomic writer: wherever it is cut off, what is there loads, as it was before or as it is now."""

import json
import re
import stat
import threading
from pathlib import Path

import pytest
import torch

from mtu import storage

from .file_operations import CUTS, count_operations, run_cut_off

OLD, NEW = ({"a": torch.full((3,), value), "b": torch.full((2,), -value)} for value in (1.0, 2.0))


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    storage.write_description_and_tensors(folder, "part", tensors, {"is": float(tensors["a"][0])})


def operations(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    write(folder, OLD)
    return count_operations(monkeypatch, lambda: write(folder, NEW))


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: type(cut).__name__)
def test_cut_off_anywhere_the_older_or_the_newer_loads(tmp_path, monkeypatch, cut):
    total = operations(monkeypatch, tmp_path / "count")
    found = []
    for operation in range(total):
        folder = tmp_path / str(operation)
        write(folder, OLD)
        run_cut_off(monkeypatch, lambda folder=folder: write(folder, NEW), operation, cut)
        description, tensors = storage.read_description_and_tensors(folder, "part")
        expected = OLD if description["is"] == 1.0 else NEW
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        found.append(description["is"])
        # What the cut left behind is gone after the next time.
        write(folder, NEW)
        assert len(list(folder.iterdir())) == 2
        assert storage.read_description_and_tensors(folder, "part")[0]["is"] == 2.0
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def write_files(folder: Path, contents: dict[str, str]) -> None:
    with storage.atomic_replacement(folder, re.compile(r"part-\d")) as new:
        for name, text in contents.items():
            (new / name).write_text(text)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: type(cut).__name__)
def test_files_are_replaced_together_wherever_that_is_cut_off(tmp_path, monkeypatch, cut):
    old = {"config": "old", "part-1": "old", "part-2": "old", "index": "old"}
    new = {"config": "new", "part-1": "new", "other": "new"}
    kept = {"notes": "mine"}
    write_files(tmp_path / "count", old)
    found = []
    for operation in range(count_operations(monkeypatch, lambda: write_files(tmp_path / "count", new))):
        folder = tmp_path / str(operation)
        write_files(folder, old)
        (folder / "notes").write_text("mine")
        run_cut_off(monkeypatch, lambda folder=folder: write_files(folder, new), operation, cut)
        storage.finish_replacement(folder)
        # `index` is of no name that is outdated.
        assert files(folder) in (old | kept, {"index": "old"} | new | kept)
        found.append(files(folder)["config"])
        write_files(folder, new)
        assert {path.name for path in folder.iterdir()} == {"index", "notes", *new}
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_text("old")
    total = count_operations(monkeypatch, lambda: storage.write_text(path, "old"))
    for operation in range(total):
        path.write_text("old")
        run_cut_off(monkeypatch, lambda: storage.write_text(path, "new"), operation, CUTS[0])
        assert path.read_text() in ("old", "new")
    storage.write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise storage.SafetensorError("I/O error: No space left on device (os error 28)")

    write(tmp_path, OLD)
    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path, NEW)
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert storage.read_description_and_tensors(tmp_path, "part")[0]["is"] == 1.0


def test_tensors_come_back_whatever_memory_they_are_in(tmp_path):
    shared = torch.arange(24.0).view(2, 3, 2, 2)
    tensors = {
        "whole": shared,
        "again": shared,
        "part": shared[0],
        "last": shared.to(memory_format=torch.channels_last),
        "none": torch.empty(0),
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    storage.write_description_and_tensors(tmp_path, "part", tensors, {})
    _, found = storage.read_description_and_tensors(tmp_path, "part")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    part = {path.suffix: path for path in tmp_path.iterdir()}
    assert stat.S_IMODE(part[".safetensors"].stat().st_mode) == stat.S_IMODE(part[".json"].stat().st_mode)
    assert part[".safetensors"].stat().st_size < 4 * 24 * 4 + 1000


@pytest.mark.parametrize("name", ["../part.safetensors", "part.bin", 3])
def test_a_description_cannot_name_a_file_elsewhere(tmp_path, name):
    write(tmp_path, OLD)
    path = tmp_path / "part.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "file": name}))
    with pytest.raises(ValueError, match="must name a safetensors file in its own folder"):
        storage.read_description_and_tensors(tmp_path, "part")


def test_a_replacement_from_elsewhere_cannot_reach_out_of_its_folder(tmp_path):
    """Reading finishes it: a folder may come from anyone."""
    folder = tmp_path / "model"
    replacement = folder / ".replacement"
    replacement.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    (replacement / "replacement.json").write_text(json.dumps({"written": ["../mine"], "deleted": ["../mine"]}))
    (replacement / "mine").write_text("theirs")
    storage.finish_replacement(folder)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / "mine").read_text() == "theirs"


def test_removing_leaves_what_others_wrote(tmp_path):
    for stem in ("part", "part.a"):
        storage.write_description_and_tensors(tmp_path, stem, OLD, {})
    storage.delete_tensor_files(tmp_path, "part")
    assert {path.name.split(".")[1] for path in tmp_path.iterdir()} == {"a"}
    assert storage.read_description_and_tensors(tmp_path, "part.a")[1].keys() == OLD.keys()


@pytest.mark.parametrize("way", ["write", "write_files", "write_text"])
def test_savers_of_one_folder_take_turns(tmp_path, monkeypatch, way):
    """As the processes of a distributed training that all save."""
    at_work, overlaps, failures = threading.Semaphore(), [], []
    settle = storage._settle

    def slow_settle(folder):
        overlaps.append(not at_work.acquire(blocking=False))
        threading.Event().wait(0.05)
        settle(folder)
        at_work.release()

    def save(number):
        values = {"a": torch.full((3,), number), "b": torch.full((2,), -number)}
        try:
            if way == "write":
                write(tmp_path, values)
            elif way == "write_files":
                write_files(tmp_path, {"config": str(number), "part-1": str(number)})
            else:
                storage.write_text(tmp_path / "log", str(number))
        except OSError as error:
            failures.append(error)

    monkeypatch.setattr(storage, "_settle", slow_settle)
    threads = [threading.Thread(target=save, args=(float(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert overlaps == [False] * 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------------------ single files


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: type(cut).__name__)
def test_a_single_file_is_whole_wherever_its_writing_is_cut_off(tmp_path, monkeypatch, cut, durable):
    path, found = tmp_path / "row.safetensors", []

    def write_new():
        storage.write_tensors(path, NEW, {"is": 2}, durable=durable)

    for operation in range(count_operations(monkeypatch, write_new)):
        storage.write_tensors(path, OLD, {"is": 1})
        run_cut_off(monkeypatch, write_new, operation, cut)
        tensors, metadata = storage.read_tensors(path)
        assert all(torch.equal(tensor, (OLD, NEW)[metadata["is"] - 1][name]) for name, tensor in tensors.items())
        found.append(metadata["is"])
    assert found == sorted(found)
    assert set(found) == ({1, 2} if durable else {1})


def test_a_single_file_keeps_values_types_and_metadata(tmp_path):
    path = tmp_path / "row.safetensors"
    tensors = {"half": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.empty(0), "count": torch.tensor(3)}
    storage.write_tensors(path, tensors, {"sha256": "0", "list": [1, None, "ü"]})
    found, metadata = storage.read_tensors(path)
    assert metadata == {"sha256": "0", "list": [1, None, "ü"]}
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    # Any program can read it, equal contents make equal files, and the user's usual permissions hold.
    assert torch.equal(storage.load_file(path)["half"], tensors["half"])
    storage.write_tensors(tmp_path / "other", dict(reversed(tensors.items())), {"list": [1, None, "ü"], "sha256": "0"})
    assert (tmp_path / "other").read_bytes() == path.read_bytes()
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 3


def test_a_single_file_that_is_torn_or_altered_is_noticed(tmp_path):
    path = tmp_path / "row.safetensors"
    storage.write_tensors(path, OLD, {"is": 1})
    whole = path.read_bytes()
    torn = [whole[:length] for length in range(len(whole))]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    foreign = tmp_path / "foreign.safetensors"
    storage.save_file(OLD, foreign)
    for contents in [*torn, *flipped, whole + b"\0", foreign.read_bytes(), b"[" * 10**5]:
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is truncated or was altered"):
            storage.read_tensors(path)
    with pytest.raises(FileNotFoundError):
        storage.read_tensors(tmp_path / "missing")


def test_a_single_file_that_does_not_fit_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "row.safetensors"
    storage.write_tensors(path, OLD, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match=rf"{re.escape(str(path))} cannot be written: No space left on device"):
        storage.write_tensors(path, NEW, {})
    assert [file.name for file in tmp_path.iterdir()] == ["row.safetensors"]
    assert torch.equal(storage.read_tensors(path)[0]["a"], OLD["a"])
