"""Atomic writing and checked reading of files: after a crash, the old state or the new one is there, never a mixture.

`write_tensors` saves tensors as safetensors and their description as JSON. The file of tensors carries its digest in
its name, and the JSON file names it. The rename of the JSON file replaces the old state at one moment. Only then is the
old file of tensors deleted.

`atomic_replacement` serves files whose names are prescribed, such as those of diffusers. It collects them in a folder
beside their destination and renames that folder at one moment. From then on, the first reader moves the files to their
destination (`finish_replacement`).

Every file is on the disk before its rename. Processes that write into the same folder, as in distributed training, wait
for each other by a lock. The formats of MTU's checkpoints are not defined here.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "atomic_replacement",
    "finish_replacement",
    "make_folder",
    "read_tensors",
    "remove_tensors",
    "write_tensors",
    "write_text",
]

_REPLACEMENT, _JOURNAL = ".replacement", "replacement.json"


def make_folder(directory: str | os.PathLike) -> Path:
    """Return a folder to write into, made where it is not there.

    Raises:
        ValueError: there is a file of that name.
    """
    folder = Path(directory)
    if folder.is_file():
        raise ValueError(f"{directory} is a file, but a folder to save into is expected.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_tensors(
    directory: str | os.PathLike, stem: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write `STEM.json` and the file of tensors that it names, in place of what `stem` named before.

    Args:
        directory: the folder; made if it is not there.
        stem: how both files' names begin.
        tensors: on any device; copied where they share memory.
        description: JSON; "file" and "sha256" are added to it.

    Raises:
        ValueError: the directory is a file.
        OSError: the files cannot be written; what was there before stays.
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


def read_tensors(
    directory: str | os.PathLike, stem: str, *, requires_digest: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors` wrote, checking that it is whole and unaltered.

    Args:
        directory: the folder.
        stem: as in `write_tensors`.
        requires_digest: False also takes a description without a digest, as training wrote it once.

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
    if not isinstance(description, dict) or (requires_digest and "sha256" not in description):
        raise ValueError(f"The description in {directory} lacks the entry 'sha256'.")
    # Earlier versions had one name for all files of tensors, and did not write it down.
    name = description.get("file", f"{stem}.safetensors")
    if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
        raise ValueError(f"{json_path} must name a safetensors file in its own folder, but names {name!r}.")
    tensor_path = folder / name
    if not tensor_path.is_file():
        raise ValueError(f"{directory} holds no {name}, which {json_path.name} names.")
    if "sha256" in description and _digest(tensor_path, description) != description["sha256"]:
        raise ValueError(
            f"{name} or {json_path.name} in {directory} is truncated or was altered: their SHA-256 is not the one that "
            "was saved."
        )
    try:
        return description, load_file(tensor_path)
    except SafetensorError as error:
        raise ValueError(f"{tensor_path} is not a safetensors file: {error}.") from None


def remove_tensors(directory: str | os.PathLike, stem: str) -> None:
    """Delete what `write_tensors` wrote under `stem`, if anything."""
    folder = Path(directory)
    (folder / f"{stem}.json").unlink(missing_ok=True)
    _delete_files(folder, stem, keep=None)


def write_text(path: Path, text: str) -> None:
    """Write a text file in place of the one before."""
    with _taking_turns(path.parent), _collecting(path.with_name(f".{path.name}.partial")) as partial:
        (partial / path.name).write_text(text, encoding="utf-8", newline="")
        _settle(partial)
        os.replace(partial / path.name, path)
        _sync(path.parent)


@contextmanager
def atomic_replacement(directory: str | os.PathLike, outdated_names: re.Pattern[str]) -> Iterator[Path]:
    """Files written into the folder that this yields come to `directory` together, or none does.

    Args:
        directory: the folder; made if it is not there.
        outdated_names: files of `directory` whose names match wholly are deleted, unless written anew.

    Raises:
        ValueError: the directory is a file.
        OSError: the files cannot be written; what was there before stays.
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
    """Move files in that `atomic_replacement` had written when it was cut off, if there are any."""
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
        # Base names, as the folder may come from anyone.
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
    """Wait until no other process or thread is in this context of the folder, where the system can tell."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _collecting(partial: Path) -> Iterator[Path]:
    """A folder for what is not whole yet: what is left there at the end, now or after a cut, is deleted."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except SafetensorError as error:
        # The writer's own class for a full disk, among others.
        raise OSError(f"{partial.parent} cannot be written to: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(folder: Path) -> None:
    """See to it that the files of a folder are on the disk, and readable by whom the user lets read files."""
    mode = max(path.stat().st_mode for path in folder.iterdir())
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors leaves its files to their owner alone
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync(folder)


def _sync(folder: Path) -> None:
    """Bring renames within a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_files(folder: Path, stem: str, keep: str | None) -> None:
    """Delete the files of tensors under `stem`, also those that earlier versions wrote, but for one."""
    pattern = rf"{re.escape(stem)}((\.[0-9a-f]{{12}}|-\d{{7}})?\.safetensors(\.partial)?|(\.json)?\.partial)"
    for path in folder.iterdir():
        if re.fullmatch(pattern, path.name) and path.name != keep:
            path.unlink(missing_ok=True)


def _digest(path: Path, description: Mapping[str, Any]) -> str:
    """SHA-256 of a file of tensors and of what describes it: an edited setting could fit the same tensors."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, in the plain memory format, no two in the same memory, as safetensors wants them."""
    plain, taken = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain
