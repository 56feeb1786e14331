"""The candidate tiles that the tuner measures."""

from collections.abc import Iterator

from benchmarks.kernels.ahead_of_time import CHIPS
from mtu_kernels.triton.launch import is_sm_90_or_later
from mtu_kernels.triton.tile_choice import default_tile, find_tile
from mtu_kernels.triton.tiles import LIBRARY, PAIR_PRODUCTS, LibraryProduct, TileConfig, TileKey

# Rows, columns, warps. Columns of products with value-gate pairs are pairs.
_SHAPES = {
    "expert_in": ((64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8), (256, 64, 8)),
    "expert_sum": ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8), (256, 64, 8), (128, 256, 8)),
    "expert_out_backward": ((32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 64, 8)),
    "expert_weights": ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8)),
}
_SHAPES["expert_in_train"] = _SHAPES["expert_in"]
_SHAPES["expert_in_backward"] = _SHAPES["expert_sum"]
_WITH_DESCRIPTORS = ("expert_in", "expert_in_train", "expert_sum", "expert_in_backward")
# Depth of a step, and stages.
_PIPELINES = ((32, 3), (32, 4), (64, 2), (64, 3), (64, 4))
_MOST_ACCUMULATORS = 128
# Two accumulators, which no other product has. With 128 rows, two programs share a multiprocessor, and one hides the
# other's epilogue. With 256 rows, fewer bytes are read.
_WIDE = (
    *(TileConfig(128, 96, step, 4, stages, True) for step, stages in ((32, 3), (32, 4), (64, 2))),
    *(TileConfig(256, 96, 64, 8, stages, True) for stages in (2, 3)),
)
# No GPU has shown yet that its kernel is right: only --persistent measures it.
PERSISTENT = TileConfig(128, 64, 64, 4, 5, descriptors=True, persistent=True)


def candidate_tiles(key: TileKey) -> tuple[TileConfig | LibraryProduct, ...]:
    """The tile of the table, the default tile, the library where it has the product, and a grid of tiles."""
    found: dict[TileConfig | LibraryProduct, None] = dict.fromkeys((find_tile(key), default_tile(key)))
    if not key.grouped:
        found[LIBRARY] = None
    found |= dict.fromkeys(_grid(key))
    if key.product == "expert_in" and key.arch == "sm_90" and key.bits == 16 and not key.grouped:
        found |= dict.fromkeys(_WIDE)
    return tuple(found)


def _grid(key: TileKey) -> Iterator[TileConfig]:
    pairs = 2 if key.product in PAIR_PRODUCTS else 1
    size = key.bits // 8
    limit = CHIPS[key.arch].max_shared_bytes_per_program if key.arch in CHIPS else None
    for block_m, block_n, num_warps in _SHAPES[key.product]:
        if block_m * block_n * pairs / (32 * num_warps) > _MOST_ACCUMULATORS:
            continue
        for block_k, num_stages in _PIPELINES:
            # One stage may be on its way to registers; the compiler refuses tiles that do not fit.
            bytes_in_flight = (num_stages - 1) * (block_m + block_n * pairs) * block_k * size
            if limit is not None and bytes_in_flight > limit:
                continue
            for descriptors in _loads(key):
                yield TileConfig(block_m, block_n, block_k, num_warps, num_stages, descriptors)


def _loads(key: TileKey) -> tuple[bool, ...]:
    """Whether tensor descriptors are tried; nothing else is where the hardware is made for them."""
    has_them = is_sm_90_or_later(key.arch) and key.bits == 16
    return (True,) if has_them and key.product in _WITH_DESCRIPTORS else (False,)
