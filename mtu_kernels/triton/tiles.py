"""The shapes of programs, and the keys by which `tile_table.py` lists them."""

from __future__ import annotations

from typing import NamedTuple


class TileConfig(NamedTuple):
    """The shape of one program of a matrix product.

    Attributes:
        block_m: rows; tokens, or hidden units for weight gradients.
        block_n: columns; for products with value-gate pairs, pairs. A power of two, or three halves of one: then a tile
            of the first product has two accumulators, where routing is dense, in inference. Elsewhere it is the power.
        block_k: depth of one step of the main loop.
        num_warps: warps of 32 threads (64 on AMD).
        num_stages: tiles in flight.
        descriptors: load through tensor descriptors (TMA, sm_90 and later) where strides and addresses allow it.
        group_m: row tiles that walk the columns together, for the sake of the L2 cache.
        persistent: programs that stay and walk many tiles, whose warps have different work (sm_90, the first product
            with dense routing in inference). Where they cannot serve a call, others with the same tile do.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    group_m: int = 8
    persistent: bool = False


class Library(NamedTuple):
    """In the place of a tile: a plain matrix product by torch (cuBLAS), and elementwise kernels around it."""


LIBRARY = Library()


class ElementwiseTile(NamedTuple):
    """The shape of one program of an elementwise kernel."""

    block_m: int
    block_n: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


ELEMENTWISE_TILE = ElementwiseTile(64, 64, 8)

# Products, by what they compute. "Grouped" products pick weights by expert and have no library form.
PRODUCTS = ("expert_in", "expert_in_train", "expert_sum", "expert_out_backward", "expert_in_backward", "expert_weights")
# Those whose columns are pairs of a value and a gate.
PAIR_PRODUCTS = ("expert_in", "expert_in_train")
# Those that are plain matrix products where routing is dense.
PLAIN_PRODUCTS = ("expert_sum", "expert_in_backward", "expert_weights")


class TileKey(NamedTuple):
    """What a tile is chosen by.

    Attributes:
        product: a name in PRODUCTS.
        arch: "sm_90", …
        bits: 16 (bfloat16 and float16) or 32.
        grouped: whether the product picks weights by expert (top-k routing, an affine per expert).
        width: D, or 0 for any.
        tokens: B·L rounded up to a power of two, or 0 for any.
        triton: version of Triton that the tile holds for, "3.6", …, or "" for any: another compiler makes other code of
            the same tile, which may spill, or wait for tensor cores after each product.
    """

    product: str
    arch: str
    bits: int
    grouped: bool
    width: int = 0
    tokens: int = 0
    triton: str = ""


class TableRow(NamedTuple):
    """One row of the table: a key, its tile, and where the choice comes from."""

    key: TileKey
    tile: TileConfig | Library
    source: str
