"""Atomic writing and checked reading of files: after a crash, the old state or the new one is there, never a mixture.

`write_description_and_tensors` saves tensors as safetensors and their description as JSON. The file of tensors carries
its digest in its name, and the JSON file names it. The rename of the JSON file replaces the old state at one moment.
Only then is the old file of tensors deleted.

`atomic_replacement` serves files whose names are prescribed, such as those of diffusers. It collects them in a folder
beside their destination and renames that folder at one moment. From then on, the first reader moves the files to their
destination (`finish_replacement`).

`write_tensors` serves single small files of which there are many, such as the rows of a cache. Each carries the digest
of its contents in its own header, and may be written without waiting for the disk.

Except for such files, every file is on the disk before its rename. Processes that write into the same folder, as in
distributed training, wait for each other by a lock; single files need none. The formats of MTU's checkpoints are not
defined here.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "atomic_replacement",
    "delete_tensor_files",
    "finish_replacement",
    "make_folder",
    "read_description_and_tensors",
    "read_tensors",
    "write_description_and_tensors",
    "write_tensors",
    "write_text",
]

_REPLACEMENT, _JOURNAL = ".replacement", "replacement.json"


def make_folder(directory: str | os.PathLike) -> Path:
    """Make a folder if it does not exist, and return its path.

    Raises:
        ValueError: a file has this name.
    """
    folder = Path(directory)
    if folder.is_file():
        raise ValueError(f"{directory} is a file, but a folder to save into is expected.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_description_and_tensors(
    directory: str | os.PathLike, stem: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write `STEM.json` and the file of tensors that it names, and delete the earlier files of this stem.

    Args:
        directory: the folder; made if it does not exist.
        stem: the beginning of both files' names.
        tensors: the tensors by name, on any device; tensors that share memory are copied.
        description: JSON values; the entries "file" and "sha256" are added.

    Raises:
        ValueError: the directory is a file.
        OSError: the files cannot be written; the earlier files stay.
    """
    folder = make_folder(directory)
    with _taking_turns(folder):
        with _collecting(folder / f".{stem}.partial") as partial:
            tensor_path, json_path = partial / "tensors.safetensors", partial / "description.json"
            save_file(_unshared(tensors), tensor_path)
            with tensor_path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            name = f"{stem}.{digest.hexdigest()[:12]}.safetensors"
            described = {**description, "file": name}
            digest.update(json.dumps(described, sort_keys=True).encode())
            signed = {**described, "sha256": digest.hexdigest()}
            json_path.write_text(json.dumps(signed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            _settle(partial)
            os.replace(tensor_path, folder / name)
            _sync(folder)
            os.replace(json_path, folder / f"{stem}.json")
            _sync(folder)
        _delete_files(folder, stem, keep=name)


def read_description_and_tensors(directory: str | os.PathLike, stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read files of `write_description_and_tensors`, and check that they are complete and unaltered.

    Args:
        directory: the folder.
        stem: the beginning of both files' names.

    Returns:
        The description and the tensors.

    Raises:
        ValueError: a file is missing, truncated or altered.
    """
    folder = Path(directory)
    json_path = folder / f"{stem}.json"
    if not json_path.is_file():
        raise ValueError(f"{directory} holds no {json_path.name}: expected it, and the file of tensors that it names.")
    try:
        description = json.loads(json_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{json_path} is not the JSON file that was saved: {error}.") from None
    if not isinstance(description, dict) or "sha256" not in description:
        raise ValueError(f"The description in {directory} lacks the entry 'sha256'.")
    # In earlier versions the file of tensors had a fixed name, which the description lacks.
    name = description.get("file", f"{stem}.safetensors")
    if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
        raise ValueError(f"{json_path} must name a safetensors file in its own folder, but names {name!r}.")
    tensor_path = folder / name
    if not tensor_path.is_file():
        raise ValueError(f"{directory} holds no {name}, which {json_path.name} names.")
    if _digest(tensor_path, description) != description["sha256"]:
        raise ValueError(
            f"{name} or {json_path.name} in {directory} is truncated or was altered: their SHA-256 is not the one that "
            "was saved."
        )
    try:
        return description, load_file(tensor_path)
    except SafetensorError as error:
        raise ValueError(f"{tensor_path} is not a safetensors file: {error}.") from None


def delete_tensor_files(directory: str | os.PathLike, stem: str) -> None:
    """Delete the files that `write_description_and_tensors` wrote for a stem, if there are any."""
    folder = Path(directory)
    (folder / f"{stem}.json").unlink(missing_ok=True)
    _delete_files(folder, stem, keep=None)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, durable: bool = True
) -> None:
    """Write one safetensors file atomically, with the SHA-256 of its contents in its header.

    Equal contents make equal files. Several processes and threads may write the same file: the last one wins.

    Args:
        path: the file; its folder exists.
        tensors: the tensors by name, on any device. Their bytes pass through memory, so they should be small.
        metadata: JSON values.
        durable: whether to wait until the file is on the disk. Otherwise a power cut may leave a file that
            `read_tensors` refuses.

    Raises:
        OSError: the file cannot be written; an earlier one stays.
    """
    path = Path(path)
    header, data = _split_header(save(_unshared(tensors), {"metadata": json.dumps(metadata, sort_keys=True)}))
    header["__metadata__"]["sha256"] = _content_digest(header, data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
        raise


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`, and check that it is complete and unaltered.

    Args:
        path: the file.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or altered, or another program wrote it.
    """
    contents = Path(path).read_bytes()
    try:
        header, data = _split_header(contents)
        digest, metadata = header["__metadata__"].pop("sha256"), json.loads(header["__metadata__"]["metadata"])
        if digest == _content_digest(header, data):
            return load(contents), metadata
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        pass
    raise ValueError(f"{path} is truncated or was altered: its contents do not fit the SHA-256 in its header.")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: the file.
        text: its contents.
    """
    with _taking_turns(path.parent), _collecting(path.with_name(f".{path.name}.partial")) as partial:
        (partial / path.name).write_text(text, encoding="utf-8", newline="")
        _settle(partial)
        os.replace(partial / path.name, path)
        _sync(path.parent)


@contextmanager
def atomic_replacement(directory: str | os.PathLike, outdated_names: re.Pattern[str]) -> Iterator[Path]:
    """Replace files of a folder together: either all new files are there afterwards, or all old ones.

    The context yields a temporary folder. Write the new files into it; they move to `directory` when the context ends.

    Args:
        directory: the folder; made if it does not exist.
        outdated_names: a pattern of complete names. Files of `directory` that match it are deleted, unless they are
            written anew.

    Raises:
        ValueError: the directory is a file.
        OSError: the files cannot be written; the earlier files stay.

    Example:
        >>> with atomic_replacement("model", re.compile(r"shard-\\d+")) as folder:
        ...     (folder / "shard-1").write_text("new")
    """
    folder = make_folder(directory)
    with _taking_turns(folder):
        _move_in(folder)
        with _collecting(folder / f"{_REPLACEMENT}.partial") as partial:
            yield partial
            written = sorted(os.listdir(partial))
            deleted = [name for name in os.listdir(folder) if outdated_names.fullmatch(name) and name not in written]
            (partial / _JOURNAL).write_text(json.dumps({"written": written, "deleted": deleted}), encoding="utf-8")
            _settle(partial)
            os.replace(partial, folder / _REPLACEMENT)
            _sync(folder)
        _move_in(folder)


def finish_replacement(folder: Path) -> None:
    """Move the files of an interrupted `atomic_replacement` to their destination, if its files were complete.

    Args:
        folder: the folder that it was to replace files of.
    """
    if (folder / _REPLACEMENT).is_dir():
        with _taking_turns(folder):
            _move_in(folder)


def _move_in(folder: Path) -> None:
    replacement = folder / _REPLACEMENT
    if not replacement.is_dir():
        return
    journal = replacement / _JOURNAL
    if journal.is_file():
        names = json.loads(journal.read_text(encoding="utf-8"))
        # Only base names are used, because an untrusted folder could name files elsewhere.
        for name in map(os.path.basename, names["deleted"]):
            (folder / name).unlink(missing_ok=True)
        for name in map(os.path.basename, names["written"]):
            if (replacement / name).is_file():
                os.replace(replacement / name, folder / name)
        _sync(folder)
        journal.unlink()
    replacement.rmdir()


@contextmanager
def _taking_turns(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is in this context for the folder, if the system has locks of files."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems cannot lock folders.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _collecting(partial: Path) -> Iterator[Path]:
    """Make a temporary folder for incomplete files; the next use deletes one that an interruption left behind."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except SafetensorError as error:
        # safetensors raises this class if the disk is full, for example.
        code = re.search(r"\(os error (\d+)\)", str(error))
        number, reason = (int(code[1]), os.strerror(int(code[1]))) if code else (errno.EIO, str(error))
        raise OSError(number, reason, str(partial.parent)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Bring the files of a folder to the disk, and give all of them the user's usual permissions."""
    mode = max(path.stat().st_mode for path in folder.iterdir())
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors makes files that only their owner may read.
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync(folder)


def _sync(folder: Path) -> None:
    """Bring renames within a folder to the disk, if the system can do so."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_files(folder: Path, stem: str, keep: str | None) -> None:
    """Delete the files of tensors of a stem except for one, also the one without a digest of earlier versions."""
    pattern = rf"{re.escape(stem)}(\.[0-9a-f]{{12}})?\.safetensors"
    for path in folder.iterdir():
        if re.fullmatch(pattern, path.name) and path.name != keep:
            path.unlink(missing_ok=True)


def _digest(path: Path, description: Mapping[str, Any]) -> str:
    """The SHA-256 of a file of tensors and of its description, since an edited setting could fit the same tensors."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


def _split_header(contents: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file, and the bytes that follow it."""
    start = 8 + int.from_bytes(contents[:8], "little")
    return json.loads(contents[8:start]), memoryview(contents)[start:]


def _content_digest(header: Mapping[str, Any], data: memoryview) -> str:
    """The SHA-256 of a safetensors file, whose header lacks the digest."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and in separate memory, as safetensors requires."""
    plain, taken = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain
