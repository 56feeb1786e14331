"""The cache of encoded examples: entries come back, and a damaged file costs its own entry alone."""

import hashlib
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from mtu.training.multitask.encoded_cache import EncodedCache


def key_of(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def entry(value: float) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((4, 8, 8), value), "pooled": torch.full((3,), value, dtype=torch.bfloat16)}


def file_of(cache: EncodedCache, key: str) -> Path:
    assert cache.directory is not None
    (path,) = cache.directory.rglob(f"{key}.safetensors")
    return path


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_entries_come_back(tmp_path, where):
    cache = EncodedCache(tmp_path / "new" / "cache" if where == "disk" else None)
    given = entry(1.0)
    assert key_of(1) not in cache
    assert cache.get(key_of(1)) is None
    cache.put(key_of(1), given)
    given["latents"].zero_()
    found = cache.get(key_of(1))
    assert key_of(1) in cache
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in entry(1.0).items())
    cache.put(key_of(1), entry(2.0))
    assert torch.equal(cache.get(key_of(1))["latents"], entry(2.0)["latents"])
    copy = pickle.loads(pickle.dumps(cache))  # as worker processes get it
    assert torch.equal(copy.get(key_of(1))["latents"], entry(2.0)["latents"])
    assert cache.damaged == copy.damaged == 0


def test_a_damaged_file_counts_as_missing_until_it_is_written_anew(tmp_path):
    cache = EncodedCache(tmp_path)
    keys = [key_of(number) for number in range(5)]
    for number, key in enumerate(keys):
        cache.put(key, entry(number))
    whole = file_of(cache, keys[0]).read_bytes()
    file_of(cache, keys[0]).write_bytes(b"")
    file_of(cache, keys[1]).write_bytes(whole[:-1])
    file_of(cache, keys[2]).write_bytes(whole)  # the whole entry of another key
    os.unlink(file_of(cache, keys[3]))
    assert [cache.get(key) is None for key in keys] == [True] * 4 + [False]
    assert cache.get(keys[0]) is None
    assert cache.damaged == 3
    for number, key in enumerate(keys):
        cache.put(key, entry(number))
        assert torch.equal(cache.get(key)["latents"], entry(number)["latents"])


def put_all(directory: Path, first: int) -> None:
    cache = EncodedCache(directory)
    for number in range(first, first + 40):
        cache.put(key_of(number % 20), entry(number % 20))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_many_may_write_the_same_entries(tmp_path, kind):
    start = threading.Thread if kind == "threads" else multiprocessing.get_context("fork").Process
    writers = [start(target=put_all, args=(tmp_path, first)) for first in range(4)]
    for writer in writers:
        writer.start()
    cache, seen = EncodedCache(tmp_path), 0
    while any(writer.is_alive() for writer in writers) or not seen:
        for number in range(20):
            found = cache.get(key_of(number))
            seen += found is not None
            assert found is None or torch.equal(found["latents"], entry(number)["latents"])
    for writer in writers:
        writer.join()
    assert all(getattr(writer, "exitcode", 0) == 0 for writer in writers)
    assert cache.damaged == 0
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(f"{key_of(number)}.safetensors" for number in range(20))


def test_files_that_a_killed_process_left_are_deleted_once_they_are_old(tmp_path):
    folder = tmp_path / key_of(1)[:2]
    folder.mkdir()
    for name in (".old.partial", ".new.partial"):
        (folder / name).touch()
    os.utime(folder / ".old.partial", (0, 0))
    EncodedCache(tmp_path).put(key_of(1), entry(1.0))
    assert {path.name for path in folder.iterdir()} == {".new.partial", f"{key_of(1)}.safetensors"}


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "a" * 31, "g" * 32, "A" * 64])
def test_a_key_is_a_digest(tmp_path, key):
    for cache in (EncodedCache(tmp_path), EncodedCache(None)):
        for use in (cache.get, cache.__contains__, lambda key, cache=cache: cache.put(key, {})):
            with pytest.raises(ValueError, match="A key is a digest of 32 to 128 hexadecimal digits"):
                use(key)


def test_the_directory_must_not_be_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, but a folder"):
        EncodedCache(tmp_path / "file")
