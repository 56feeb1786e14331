"""A whole forward pass of the feed-forward, and a whole UNet, on a GPU that is not here: predicted from its products.

    op        `mtu_kernels.moe_ffn`: LayerNorm, first product with GEGLU and routing weights, second product
    compiled  the same between the kernels that a compiler makes of the block around it
    stock     the original feed-forward, compiled: residual and LayerNorm, product, GEGLU, product
    products  the two plain products alone, all of their operands in memory

A UNet consists of its feed-forwards and the rest, which is the same for both: ``1 + s · (ours / stock - 1)``, where s
is the share of time of the stock feed-forwards. They are a share f of the FLOPs. A FLOP of the rest takes k times as
long, and k follows from the known s on an H100 (an estimate). The part of k above 1 is taken to be the memory's, which
on another GPU scales with the rate of memory, and not with that of products.
"""

import math
from typing import NamedTuple

from benchmarks.kernels.kernel_model import (
    H100,
    LATENCY_CYCLES,
    CompiledTile,
    GPURates,
    ProgramCost,
    predict_library_us,
    predict_pass_us,
    predict_product_us,
)

_BYTES = 2
# Kernels that gather norm affines and routing weights in front of each layer.
_GATHERS = 3


class DenseFFNSizes(NamedTuple):
    """The sizes of a dense feed-forward.

    Attributes:
        D: width of a token; there are 4·D hidden units.
        L: tokens of a sample.
        B: samples.
    """

    D: int
    L: int
    B: int

    def __str__(self) -> str:
        return f"{self.D}x{self.L} B={self.B}"

    @property
    def num_rows(self) -> int:
        return self.B * self.L

    @property
    def hidden_size(self) -> int:
        return 4 * self.D

    @property
    def x_bytes(self) -> int:
        return _BYTES * self.num_rows * self.D

    @property
    def h_bytes(self) -> int:
        return _BYTES * self.num_rows * self.hidden_size

    @property
    def w_out_bytes(self) -> int:
        return _BYTES * self.D * self.hidden_size


class ForwardTimes(NamedTuple):
    """A forward pass in µs, launches included: LayerNorm, x̂ · W_in with GEGLU, h · W_out, kernels around them."""

    norm_us: float
    first_us: float
    second_us: float
    others_us: float

    @property
    def total_us(self) -> float:
        """The sum of all parts in µs."""
        return sum(self)


class UNetWorkload(NamedTuple):
    """The feed-forwards of a UNet: number by width and tokens, share of FLOPs, and share of time on an H100."""

    name: str
    ffn_counts: dict[tuple[int, int], int]
    ffn_flop_share: float
    ffn_time_share: float


UNETS = (
    UNetWorkload("SD 1.5, 512²", {(320, 4096): 5, (640, 1024): 5, (1280, 256): 5, (1280, 64): 1}, 0.19, 0.10),
    UNetWorkload("SDXL, 1024²", {(640, 4096): 10, (1280, 1024): 60}, 0.42, 0.31),
)

# The first product as it was at commit d34559a: tiles within samples, bias and weights loaded after the loop.
_BEFORE = {
    "sm_80": {
        128: CompiledTile(128, 128, 64, 4, 3, loop=284, epilogue=1551, resident_programs=2),
        64: CompiledTile(64, 128, 64, 4, 3, loop=185, epilogue=835, resident_programs=3),
    },
    "sm_90": {
        128: CompiledTile(128, 128, 64, 4, 3, loop=96, epilogue=1340, resident_programs=2),
        64: CompiledTile(64, 128, 64, 4, 3, loop=86, epilogue=778, resident_programs=3),
    },
}
# A kernel in Gluon that compiles and has never run: persistent, a warp that loads, two groups of warps that take turns
# at the tensor cores and at the epilogue, so that each hides the other's, as two resident programs do.
_PING_PONG = CompiledTile(128, 128, 64, 4, 5, loop=96, epilogue=1055, resident_programs=2)


class FirstProductGrid(NamedTuple):
    """The grid of the first product; `starts_early`: before LayerNorm ends (programmatic dependent launch)."""

    program: ProgramCost
    num_programs: int
    starts_early: bool = False


def first_product_before_tuning(tokens: DenseFFNSizes, rates: GPURates) -> FirstProductGrid:
    """The first product as it was: tiles of 128 rows within a sample; of 64 on an A100 at width 320."""
    rows = 64 if tokens.L <= 64 or (rates.arch == "sm_80" and tokens.D == 320) else 128
    return _first(tokens, _BEFORE[rates.arch][rows], tokens.B * math.ceil(tokens.L / rows))


def ping_pong_first_product(tokens: DenseFFNSizes) -> FirstProductGrid:
    """The first product by the kernel in Gluon."""
    return _first(tokens, _PING_PONG, math.ceil(tokens.num_rows / _PING_PONG.rows))


def _first(tokens: DenseFFNSizes, tile: CompiledTile, tiles_of_rows: int) -> FirstProductGrid:
    return FirstProductGrid(
        tile.make_program(tokens.D), tiles_of_rows * math.ceil(tokens.hidden_size * 2 / tile.columns)
    )


def predict_moe_ffn(tokens: DenseFFNSizes, first: FirstProductGrid, rates: GPURates) -> ForwardTimes:
    """A call of `mtu_kernels.moe_ffn`."""
    reads = rates.bytes_missing_in_l2(tokens.x_bytes) + 2 * tokens.w_out_bytes
    time = predict_product_us(first.program, first.num_programs, reads + tokens.h_bytes, rates)
    # The launch and the first loads of weights pass while LayerNorm runs: the kernel waits for the rows alone.
    hidden = rates.edge_us + rates.microseconds(LATENCY_CYCLES) if first.starts_early else 0.0
    return ForwardTimes(predict_pass_us(2 * tokens.x_bytes, rates), time - hidden, _second(tokens, rates), 0.0)


def predict_compiled_moe_ffn(
    tokens: DenseFFNSizes, first: FirstProductGrid, rates: GPURates, *, opaque: bool
) -> ForwardTimes:
    """A call between a compiler's kernels, with the residual before it, since LayerNorm may be the compiler's kernel.

    With `opaque` the operator is the whole feed-forward, so that the residual and the gathers of this layer's norm
    affines and routing weights are kernels of their own. Otherwise the compiler's LayerNorm contains both.
    """
    first = first._replace(starts_early=first.starts_early and opaque)
    alone = predict_moe_ffn(tokens, first, rates)
    if not opaque:
        return alone._replace(norm_us=predict_pass_us(4 * tokens.x_bytes, rates))
    return alone._replace(others_us=predict_pass_us(3 * tokens.x_bytes, rates) + _GATHERS * predict_pass_us(0, rates))


def predict_compiled_stock_ffn(tokens: DenseFFNSizes, rates: GPURates) -> ForwardTimes:
    """The original feed-forward, compiled, with the residual before it."""
    z_bytes = 2 * tokens.h_bytes
    reads = rates.bytes_missing_in_l2(tokens.x_bytes) + 2 * tokens.w_out_bytes
    first = predict_library_us(tokens.num_rows, 2 * tokens.hidden_size, tokens.D, reads + z_bytes, rates)
    geglu = predict_pass_us(rates.bytes_missing_in_l2(z_bytes) + tokens.h_bytes, rates)
    return ForwardTimes(predict_pass_us(4 * tokens.x_bytes, rates), first, _second(tokens, rates), geglu)


def predict_plain_products(tokens: DenseFFNSizes, rates: GPURates) -> ForwardTimes:
    """The two plain products."""
    rows, hidden, D = tokens.num_rows, tokens.hidden_size, tokens.D
    first = predict_library_us(rows, 2 * hidden, D, tokens.x_bytes + 2 * tokens.w_out_bytes + 2 * tokens.h_bytes, rates)
    second = predict_library_us(rows, D, hidden, tokens.h_bytes + tokens.w_out_bytes + tokens.x_bytes, rates)
    return ForwardTimes(0.0, first, second, 0.0)


def feed_forward_time_share(unet: UNetWorkload, rates: GPURates) -> float:
    """The share of a step's time that the stock feed-forwards take."""
    rest = (1 - unet.ffn_flop_share) / unet.ffn_flop_share
    slowness = (1 / unet.ffn_time_share - 1) / rest
    memory = (H100.memory_tbs / rates.memory_tbs) / (H100.tflops / rates.tflops)
    return 1 / (1 + rest * (1 + (slowness - 1) * memory))


def predict_step_ratio(unet: UNetWorkload, ours: float, theirs: float, rates: GPURates) -> float:
    """Time of a step over the stock step's, from the times of all feed-forwards."""
    return 1 + feed_forward_time_share(unet, rates) * (ours / theirs - 1)


def _second(tokens: DenseFFNSizes, rates: GPURates) -> float:
    memory = rates.bytes_missing_in_l2(tokens.h_bytes) + tokens.w_out_bytes + tokens.x_bytes
    return predict_library_us(tokens.num_rows, tokens.D, tokens.hidden_size, memory, rates)
