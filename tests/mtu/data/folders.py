"""Small image folders for tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (12, 8)


def write_image(
    path: Path, colour: tuple[int, ...] = (10, 20, 30), size: tuple[int, int] = SIZE, mode: str = "RGB"
) -> None:
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any] | bytes]) -> Path:
    """Write a `metadata.jsonl` of rows, and return its folder; bytes are lines as they stand."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def write_edits(folder: Path, count: int = 3) -> Path:
    """Write a folder of edits without a fault, whose images differ."""
    rows = []
    for number in range(count):
        write_image(folder / f"after/{number}.png", (number, 0, 0))
        write_image(folder / f"before/{number}.png", (0, number, 0))
        rows.append(edit(number))
    return write_rows(folder, rows)


def edit(number: int) -> dict[str, Any]:
    """A row of `write_edits`."""
    names = {"target_file_name": f"after/{number}.png", "condition_file_name": f"before/{number}.png"}
    return {**names, "prompt": f"edit {number}"}
