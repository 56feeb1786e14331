"""The first product: ``h = w · u · gelu(g)`` with ``u, g = x̂ W_inᵀ + b_in``, over the active experts' hidden units.

Values and gates of a hidden unit lie H rows apart in W_in. One tile of the product holds both: its columns are pairs,
made in the addresses of the loads, and the accumulator splits into u and g where it lies in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mtu_kernels.arguments import ExpertWeights
from mtu_kernels.routing import Routing
from mtu_kernels.triton.activation import expert_of_slot, geglu
from mtu_kernels.triton.descriptors import describable, describe
from mtu_kernels.triton.launch import Launch, ceil_div, next_power_of_2
from mtu_kernels.triton.tiles import TileConfig


@triton.jit
def program_tile(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's row tile and column tile: GROUP_M row tiles walk the columns together and share their weights."""
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return group * GROUP_M + within % size, within // size


@triton.jit
def expert_in_kernel(
    x_hat_ptr, w_in_ptr, b_in_ptr, weights_ptr, indices_ptr, h_ptr, z_ptr, B, L, D, F, K, E,
    SLOT_INPUTS: tl.constexpr, ALIGNED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(L, BLOCK_M)
    tiles_n = K * tl.cdiv(F, BLOCK_N) if ALIGNED else tl.cdiv(K * F, BLOCK_N)
    tile_m, tile_n = program_tile(B * tiles_m, tiles_n, GROUP_M)
    sample = tile_m // tiles_m
    local_M = (tile_m % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Column pairs: slot and unit of each, twice over for the loads (values at even, gates at odd places).
    pair_P = tl.arange(0, 2 * BLOCK_N)
    n_N = tl.arange(0, BLOCK_N)
    if ALIGNED:
        slot = tile_n // tl.cdiv(F, BLOCK_N)
        first = (tile_n % tl.cdiv(F, BLOCK_N)) * BLOCK_N
        unit_P = tl.minimum(first + pair_P // 2, F - 1)
        unit_N = first + n_N
        mask_N = unit_N < F
        slot_P, slot_N = slot, slot + tl.zeros_like(n_N)
        x_hat_ptr += (sample.to(tl.int64) * K + slot) * L * D if SLOT_INPUTS else sample.to(tl.int64) * L * D
    else:
        column_P = tl.minimum(tile_n * BLOCK_N + pair_P // 2, K * F - 1)
        column_N = tile_n * BLOCK_N + n_N
        mask_N = column_N < K * F
        slot_P, unit_P = column_P // F, column_P % F
        slot_N, unit_N = tl.minimum(column_N // F, K - 1), column_N % F
        x_hat_ptr += sample.to(tl.int64) * L * D
    row_P = expert_of_slot(indices_ptr, sample, slot_P, K, E) * F + unit_P + (pair_P % 2) * (E * F)

    # Rows past the end read the last row again: nothing of theirs is stored.
    k_K = tl.arange(0, BLOCK_K)
    x_hat_ptrs = x_hat_ptr + tl.minimum(local_M, L - 1).to(tl.int64)[:, None] * D + k_K[None, :]
    w_in_ptrs = w_in_ptr + row_P.to(tl.int64)[None, :] * D + k_K[:, None]
    z_MP = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        if EVEN_K:
            x_hat_MK = tl.load(x_hat_ptrs)
            w_in_KP = tl.load(w_in_ptrs)
        else:
            x_hat_MK = tl.load(x_hat_ptrs, mask=k_K[None, :] < D - k, other=0.0)
            w_in_KP = tl.load(w_in_ptrs, mask=k_K[:, None] < D - k, other=0.0)
        z_MP = tl.dot(x_hat_MK, w_in_KP, z_MP, input_precision=PRECISION)
        x_hat_ptrs += BLOCK_K
        w_in_ptrs += BLOCK_K
    u_MN, g_MN = tl.split(tl.reshape(z_MP, (BLOCK_M, BLOCK_N, 2)))

    row_N = expert_of_slot(indices_ptr, sample, slot_N, K, E) * F + tl.minimum(unit_N, F - 1)
    u_MN += tl.load(b_in_ptr + row_N).to(tl.float32)[None, :]
    g_MN += tl.load(b_in_ptr + E * F + row_N).to(tl.float32)[None, :]
    mask_MN = (local_M < L)[:, None] & mask_N[None, :]
    rows_M = sample.to(tl.int64) * L + local_M
    columns_N = slot_N * F + unit_N
    if z_ptr is not None:
        z_MN = rows_M[:, None] * (2 * K * F) + columns_N[None, :]
        tl.store(z_ptr + z_MN, u_MN.to(z_ptr.dtype.element_ty), mask=mask_MN)
        tl.store(z_ptr + z_MN + K * F, g_MN.to(z_ptr.dtype.element_ty), mask=mask_MN)
    if h_ptr is not None:
        w_N = tl.load(weights_ptr + sample.to(tl.int64) * K + slot_N).to(tl.float32)
        h_MN = geglu(u_MN, g_MN, EXACT) * w_N[None, :]
        h_ptrs = h_ptr + rows_M[:, None] * (K * F) + columns_N[None, :]
        tl.store(h_ptrs, h_MN.to(h_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def expert_in_descriptor_kernel(
    x_hat_desc, w_in_desc, b_in_ptr, weights_ptr, indices_ptr, h_desc, z_desc, B, L, D, F, K, E,
    SLOT_INPUTS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors, which mask rows and depth by themselves, for 16-bit storage.

    BLOCK_N divides F where ALIGNED, else KF.
    x_hat_desc: (B·slots, L, D); w_in_desc: (2, H, D); h_desc: (B, L, KF); z_desc: (B, L, 2KF).
    """
    tiles_m = tl.cdiv(L, BLOCK_M)
    tiles_n = K * F // BLOCK_N
    tile_m, tile_n = program_tile(B * tiles_m, tiles_n, GROUP_M)
    sample = tile_m // tiles_m
    row = (tile_m % tiles_m) * BLOCK_M
    column = tile_n * BLOCK_N
    first = column
    matrix = sample
    if ALIGNED:
        slot = column // F
        first = expert_of_slot(indices_ptr, sample, slot, K, E) * F + column % F
        if SLOT_INPUTS:
            matrix = sample * K + slot
    z_MP = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        x_hat_MK = x_hat_desc.load([matrix, row, k]).reshape(BLOCK_M, BLOCK_K)
        w_in_PK = w_in_desc.load([0, first, k]).reshape(2 * BLOCK_N, BLOCK_K)
        z_MP = tl.dot(x_hat_MK, w_in_PK.T, z_MP)
    u_MN, g_MN = tl.split(tl.permute(tl.reshape(z_MP, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))

    n_N = tl.arange(0, BLOCK_N)
    u_MN += tl.load(b_in_ptr + first + n_N).to(tl.float32)[None, :]
    g_MN += tl.load(b_in_ptr + E * F + first + n_N).to(tl.float32)[None, :]
    if z_desc is not None:
        z_desc.store([sample, row, column], u_MN.to(z_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))
        z_desc.store([sample, row, K * F + column], g_MN.to(z_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))
    if h_desc is not None:
        w_N = tl.load(weights_ptr + sample.to(tl.int64) * K + (column + n_N) // F).to(tl.float32)
        h_MN = geglu(u_MN, g_MN, False) * w_N[None, :]
        h_desc.store([sample, row, column], h_MN.to(h_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))


class Hidden(NamedTuple):
    """What the first product writes; either may be ``None``.

    Attributes:
        h: (B, L, KF) compute dtype, weighted activations.
        z: (B, L, 2KF) compute dtype, pre-activations ``[values; gates]``.
    """

    h: Tensor | None
    z: Tensor | None


def launch_expert_in(
    x_hat: Tensor, experts: ExpertWeights, routing: Routing, outputs: Hidden, tile: TileConfig, precision: str
) -> Launch:
    """x̂ (B, L, D), or (B, K, L, D) with an input of its own for each slot, → outputs."""
    *_, L, D = x_hat.shape
    B, K = routing.weights.shape
    E = experts.num_experts
    F = experts.w_out.shape[1] // E
    slot_inputs = x_hat.dim() == 4
    tile = tile._replace(block_m=min(tile.block_m, max(16, next_power_of_2(L))))
    constants = {
        "SLOT_INPUTS": slot_inputs,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    tiles_m = B * ceil_div(L, tile.block_m)
    sizes = (B, L, D, F, K, E)
    by_expert = slot_inputs or routing.indices is not None
    block_n = _divisor(F if by_expert else K * F, tile.block_n)
    if tile.descriptors and block_n >= 16 and all(describable(t) for t in (x_hat, experts.w_in, *outputs)):
        block = (tile.block_m, block_n, tile.block_k)
        descriptors = _descriptors(x_hat, experts, outputs, block)
        arguments = (*descriptors[:2], experts.b_in, *routing, *descriptors[2:], *sizes)
        constants |= {"ALIGNED": by_expert, "BLOCK_N": block_n}
        programs = tiles_m * (K * F // block_n)
        return Launch(expert_in_descriptor_kernel, programs, arguments, constants, tile.num_warps, tile.num_stages)
    constants |= {
        "ALIGNED": slot_inputs,
        "EVEN_K": D % tile.block_k == 0,
        "PRECISION": precision,
        "EXACT": x_hat.element_size() == 4,
        "BLOCK_N": tile.block_n,
    }
    tiles_n = K * ceil_div(F, tile.block_n) if slot_inputs else ceil_div(K * F, tile.block_n)
    arguments = (x_hat, experts.w_in, experts.b_in, *routing, *outputs, *sizes)
    return Launch(expert_in_kernel, tiles_m * tiles_n, arguments, constants, tile.num_warps, tile.num_stages)


def _descriptors(
    x_hat: Tensor, experts: ExpertWeights, outputs: Hidden, block: tuple[int, int, int]
) -> tuple[TensorDescriptor | None, ...]:
    block_m, block_n, block_k = block
    w_in = experts.w_in.view(2, -1, experts.w_in.shape[1])
    return (
        describe(x_hat.flatten(0, -3), (1, block_m, block_k)),
        describe(w_in, (2, block_n, block_k)),
        *(None if t is None else describe(t, (1, block_m, block_n)) for t in outputs),
    )


def _divisor(width: int, limit: int) -> int:
    """The largest power of two up to limit that divides width."""
    return min(width & -width, limit)
