"""Which tile a product runs with: a frozen table, and a careful default for what the table does not know.

Nothing is tuned at run time: that would stall users, need a driver while compiling, and break CUDA-graph capture.
`python -m benchmarks.kernels.tune` measures on the GPU it finds and rewrites `tile_table.py`.

A row that names a version of Triton serves that version alone, and goes before all rows that serve any. Those are
compiled with the oldest and the newest version that the package supports, and are right on both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import triton

from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import LIBRARY, PAIR_PRODUCTS, PLAIN_PRODUCTS, Library, TableRow, TileConfig, TileKey

Table = dict[TileKey, TileConfig | Library]


def token_class(tokens: int) -> int:
    """Token counts that share a tile: those with the same next power of two, from 64 to 65536."""
    return min(max(1 << max(tokens - 1, 0).bit_length(), 64), 65536)


@functools.cache
def triton_version() -> str:
    """Major and minor version of the installed Triton, as keys name it."""
    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def find_tile(key: TileKey) -> TileConfig | Library:
    """The tile of the shipped table; where the key names no version of Triton, for the installed one."""
    return look_up(_TABLE, key if key.triton else key._replace(triton=triton_version()))


def look_up(table: Table, key: TileKey) -> TileConfig | Library:
    """The row for exactly this shape, else the one for its width, else for its architecture, else the default.

    Of rows for the key's version of Triton, else of those for any version.
    """
    for version in (key.triton, ""):
        for candidate in more_general(key._replace(triton=version)):
            if candidate in table:
                return table[candidate]
    return default_tile(key)


def more_general(key: TileKey) -> tuple[TileKey, TileKey, TileKey]:
    """The key, that of its width at any number of tokens, and that of any shape."""
    return key, key._replace(tokens=0), key._replace(width=0, tokens=0)


def default_tile(key: TileKey) -> TileConfig | Library:
    """What fits any GPU that Triton compiles for: little shared memory, few registers."""
    if key.arch == "interpreter":
        # Small, so that small problems take several programs and several steps of the main loop.
        return TileConfig(32, 16, 16, 1, 1, group_m=2)
    if not key.grouped and (key.bits == 32 or key.product in (*PLAIN_PRODUCTS, "expert_out_backward")):
        # Nothing to fuse; or products in IEEE float32, which Triton runs on the plain units: a library is better tuned.
        # The gradient of the activation leaves its product so few registers that small tiles cost more than they save.
        return LIBRARY
    if key.bits == 32:
        # Value-gate pairs are twice as many columns: longer steps of them spill.
        return TileConfig(32, 32, 16 if key.product in PAIR_PRODUCTS else 32, 4, 2)
    return TileConfig(64, 32 if key.product in PAIR_PRODUCTS else 64, 32, 4, 2)


def index(rows: Iterable[TableRow]) -> Table:
    """Tiles by their keys.

    Raises:
        ValueError: two rows have one key, or a row has a library's product by expert.
    """
    table: Table = {}
    for row in rows:
        if row.key in table:
            raise ValueError(f"tile_table.py has two rows for {row.key}.")
        if row.key.grouped and isinstance(row.tile, Library):
            raise ValueError(f"tile_table.py must have a tile for {row.key}: a library knows no experts.")
        table[row.key] = row.tile
    return table


_TABLE = index(ROWS)
