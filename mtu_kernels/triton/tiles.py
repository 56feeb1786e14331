"""Tiles, which are the shapes of programs, and the keys that `tile_table.py` lists them by."""

from __future__ import annotations

from typing import NamedTuple


class TileConfig(NamedTuple):
    """The shape of one program of a matrix product.

    Attributes:
        block_m: the number of rows, which are tokens, or hidden units in gradients of weights.
        block_n: the number of columns, or of column pairs in products of value-gate pairs. It is a power of two, or
            three halves of one. With three halves, the first product of dense inference has two accumulators; all other
            products use the power of two.
        block_k: the depth of one step of the main loop.
        num_warps: the number of warps, of 32 threads each (64 on AMD).
        num_stages: the number of steps whose loads are under way at once.
        descriptors: whether to load through tensor descriptors (TMA, sm_90 and later), if strides and addresses allow.
        group_m: the number of row tiles that go through the columns together, to share the L2 cache.
        persistent: whether programs stay and compute many tiles, with warps that only load (sm_90, the first product of
            dense inference). Calls that this does not support run the ordinary kernel with the same tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    group_m: int = 8
    persistent: bool = False


class LibraryProduct(NamedTuple):
    """Stands in the place of a tile for a matrix product by torch (cuBLAS), with elementwise kernels around it."""


LIBRARY = LibraryProduct()


class ElementwiseTile(NamedTuple):
    """The shape of one program of an elementwise kernel."""

    block_m: int
    block_n: int
    num_warps: int

    @property
    def block_sizes(self) -> dict[str, int]:
        """The block sizes as arguments of the kernels."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


ELEMENTWISE_TILE = ElementwiseTile(64, 64, 8)

# The products of a call. Grouped products pick weights by expert, which a library cannot do.
PRODUCTS = ("expert_in", "expert_in_train", "expert_sum", "expert_out_backward", "expert_in_backward", "expert_weights")
# The products whose columns are pairs of a value and a gate.
PAIR_PRODUCTS = ("expert_in", "expert_in_train")
# The products that are plain matrix products if routing is dense.
PLAIN_PRODUCTS = ("expert_sum", "expert_in_backward", "expert_weights")


class TileKey(NamedTuple):
    """The properties of a product that its tile is chosen by.

    Attributes:
        product: a name in PRODUCTS.
        arch: the architecture, such as "sm_90".
        bits: 16 (bfloat16 and float16) or 32.
        grouped: whether the product picks weights by expert (top-k routing, or an affine per expert).
        width: D, or 0 for any.
        tokens: B·L rounded up to a power of two, or 0 for any.
        triton: the version of Triton, such as "3.6", or "" for any. Other versions may compile the same tile to code
            that spills registers, or that waits for the tensor cores after each product.
    """

    product: str
    arch: str
    bits: int
    grouped: bool
    width: int = 0
    tokens: int = 0
    triton: str = ""


class TableRow(NamedTuple):
    """One row of the table: a key, its tile, and the reason for the choice."""

    key: TileKey
    tile: TileConfig | LibraryProduct
    source: str
