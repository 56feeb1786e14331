"""The choice of a tile: what of the table serves a shape and a version of Triton."""

import pytest

from mtu_kernels.triton.availability import MINIMUM_VERSION
from mtu_kernels.triton.tile_choice import default_tile, find_tile, look_up_tile, table_by_key, triton_version_string
from mtu_kernels.triton.tile_table import ROWS
from mtu_kernels.triton.tiles import LIBRARY, TableRow, TileConfig, TileKey

KEY = TileKey("expert_in", "sm_90", 16, True, 640, 2048, "3.6")
TILES = [TileConfig(16 * number, 64, 64, 4, 3) for number in range(1, 7)]
# From the one that is asked first to the last.
KEYS = [
    KEY._replace(triton=version, **general)
    for version in ("3.6", "")
    for general in ({}, {"tokens": 0}, {"tokens": 0, "width": 0})
]


@pytest.mark.parametrize("missing", range(7))
def test_rows_of_the_version_go_before_rows_for_any_and_exact_shapes_before_general_ones(missing):
    rows = [TableRow(key, tile, "") for key, tile in zip(KEYS, TILES, strict=True)][missing:]
    others = [TableRow(KEY._replace(triton=version), TileConfig(16, 16, 16, 1, 1), "") for version in ("3.5", "3.60")]
    assert look_up_tile(table_by_key([*others, *rows]), KEY) == [*TILES, default_tile(KEY)][missing]


def test_a_key_without_a_version_is_for_the_installed_triton():
    for row in ROWS:
        key = row.key._replace(triton="")
        assert find_tile(key) == find_tile(key._replace(triton=triton_version_string()))
        assert find_tile(row.key._replace(triton=row.key.triton or "0.0")) == row.tile


def test_versions_are_named_as_the_package_names_them():
    major, minor = map(int, triton_version_string().split("."))
    assert (major, minor) >= tuple(map(int, MINIMUM_VERSION.split(".")))
    assert all(row.key.triton.count(".") == 1 for row in ROWS if row.key.triton)


def test_a_table_with_two_rows_of_a_key_or_a_library_by_expert_is_refused():
    row = TableRow(KEY, TILES[0], "")
    with pytest.raises(ValueError, match=r"two rows for .*triton='3.6'"):
        table_by_key([row, row])
    table_by_key([row, row._replace(key=KEY._replace(triton=""))])
    with pytest.raises(ValueError, match="a library cannot pick weights by expert"):
        table_by_key([row._replace(tile=LIBRARY)])
