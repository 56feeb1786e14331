"""The choice of a product's tile: from the table in `tile_table.py`, or a cautious default.

No tile is tuned at run time: that would stall users, need a driver while compiling, and break the capture of CUDA
graphs. `python -m benchmarks.kernels.tune` measures tiles on a GPU and rewrites the table.

A row for one version of Triton is preferred to rows for any version. Tests compile the latter with the oldest and the
newest version that the package supports.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import triton

from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import (
    LIBRARY,
    PAIR_PRODUCTS,
    PLAIN_PRODUCTS,
    LibraryProduct,
    TableRow,
    TileConfig,
    TileKey,
)

Table = dict[TileKey, TileConfig | LibraryProduct]


def token_count_class(tokens: int) -> int:
    """The class of token counts that share a tile: the next power of two, from 64 to 65536."""
    return min(max(1 << max(tokens - 1, 0).bit_length(), 64), 65536)


@functools.cache
def triton_version_string() -> str:
    """The major and minor version of the installed Triton, as it is written in keys."""
    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def find_tile(key: TileKey) -> TileConfig | LibraryProduct:
    """The tile of the shipped table. A key without a version of Triton stands for the installed one."""
    return look_up_tile(_TABLE, key if key.triton else key._replace(triton=triton_version_string()))


def look_up_tile(table: Table, key: TileKey) -> TileConfig | LibraryProduct:
    """The tile for exactly this shape, else the one for its width, else for its architecture, else the default.

    Rows for the key's version of Triton are searched before those for any version.
    """
    for version in (key.triton, ""):
        for candidate in keys_from_exact_to_general(key._replace(triton=version)):
            if candidate in table:
                return table[candidate]
    return default_tile(key)


def keys_from_exact_to_general(key: TileKey) -> tuple[TileKey, TileKey, TileKey]:
    """The key itself, the key for any number of tokens, and the key for any shape."""
    return key, key._replace(tokens=0), key._replace(width=0, tokens=0)


def default_tile(key: TileKey) -> TileConfig | LibraryProduct:
    """A tile that fits every GPU that Triton compiles for: it takes little shared memory and few registers."""
    if key.arch == "interpreter":
        # Tiles of tests are small, so that small problems take several programs and several steps of the main loop.
        return TileConfig(32, 16, 16, 1, 1, group_m=2)
    if not key.grouped and (key.bits == 32 or key.product in (*PLAIN_PRODUCTS, "expert_out_backward")):
        # A library is faster for products with nothing to fuse, and for IEEE float32, which runs without tensor cores.
        # It is also faster where the gradient of the activation would leave registers for a small tile only.
        return LIBRARY
    if key.bits == 32:
        # Value-gate pairs have twice as many columns, so deeper steps would spill registers.
        return TileConfig(32, 32, 16 if key.product in PAIR_PRODUCTS else 32, 4, 2)
    return TileConfig(64, 32 if key.product in PAIR_PRODUCTS else 64, 32, 4, 2)


def table_by_key(rows: Iterable[TableRow]) -> Table:
    """The tiles of all rows by their keys.

    Raises:
        ValueError: two rows have the same key, or a grouped product has no tile but a library.
    """
    table: Table = {}
    for row in rows:
        if row.key in table:
            raise ValueError(f"tile_table.py has two rows for {row.key}.")
        if row.key.grouped and isinstance(row.tile, LibraryProduct):
            raise ValueError(f"tile_table.py must have a tile for {row.key}: a library cannot pick weights by expert.")
        table[row.key] = row.tile
    return table


_TABLE = table_by_key(ROWS)
