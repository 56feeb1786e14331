"""The file of the table of tiles: reads and writes its rows, and merges new rows with old ones."""

import runpy
from collections.abc import Iterable
from pathlib import Path

from mtu_kernels.triton.tiles import PRODUCTS, LibraryProduct, TableRow, TileConfig, TileKey

_HEAD = (
    '"""The tiles that are shipped, a row each. `python -m benchmarks.kernels.tune` measures and rewrites them."""\n'
)


def render_rows(rows: Iterable[TableRow]) -> str:
    """The text of `tile_table.py`: a row a line, by architecture, product and shape."""
    ordered = sorted(rows, key=_order)
    names = ["TableRow"]
    names += ["LIBRARY"] if any(isinstance(row.tile, LibraryProduct) for row in ordered) else []
    names += ["TileConfig"] if any(isinstance(row.tile, TileConfig) for row in ordered) else []
    names += ["TileKey"] if ordered else []
    lines = [_HEAD, f"from mtu_kernels.triton.tiles import {', '.join(sorted(names, key=_isort))}", ""]
    if not ordered:
        return "\n".join([*lines, "ROWS: tuple[TableRow, ...] = ()", ""])
    lines += ["# fmt: off", "# ruff: noqa: E501", "ROWS: tuple[TableRow, ...] = ("]
    arch = None
    for row in ordered:
        if row.key.arch != arch:
            arch = row.key.arch
            lines.append(f"    # {arch}")
        lines.append(f"    TableRow({_text(row.key)}, {_text(row.tile)}, {_quoted(row.source)}),")
    return "\n".join([*lines, ")", ""])


def merge_rows(
    old: Iterable[TableRow], new: Iterable[TableRow], measured: Iterable[TileKey] = ()
) -> tuple[TableRow, ...]:
    """The new rows, and the old ones but for the measured keys."""
    gone = set(measured)
    by_key = {row.key: row for row in old if row.key not in gone}
    by_key |= {row.key: row for row in new}
    return tuple(sorted(by_key.values(), key=_order))


def read_rows(path: Path) -> tuple[TableRow, ...]:
    """The rows of a file that `render_rows` made; none if there is no such file."""
    if not path.exists():
        return ()
    return runpy.run_path(str(path))["ROWS"]


def write_rows(path: Path, rows: Iterable[TableRow]) -> None:
    """Replaces the file as a whole: a run that is cut off leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(render_rows(rows))
    partial.replace(path)


def _order(row: TableRow) -> tuple:
    product, arch, bits, grouped, width, tokens, version = row.key
    family, _, number = arch.partition("_")
    numbers = tuple(int(part) for part in version.split(".")) if version else ()
    return family, int(number or 0), arch, PRODUCTS.index(product), bits, grouped, width, tokens, numbers


# Number of fields that every row shows. The fields after them are left out where they have their defaults.
_SHOWN = {TileKey: 6, TileConfig: 7}


def _text(value: TileKey | TileConfig | LibraryProduct) -> str:
    if isinstance(value, LibraryProduct):
        return "LIBRARY"
    fields = list(value._asdict().items())
    while len(fields) > _SHOWN[type(value)] and fields[-1][1] == value._field_defaults[fields[-1][0]]:
        fields.pop()
    arguments = (_quoted(field) if isinstance(field, str) else repr(field) for _, field in fields)
    return f"{type(value).__name__}({', '.join(arguments)})"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _isort(name: str) -> tuple[bool, str]:
    # Constants before classes, as ruff sorts them.
    return not name.isupper(), name
