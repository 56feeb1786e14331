"""The first product: ``h = w · u · gelu(g)`` with ``u, g = x̂ W_inᵀ + b_in``, over the active experts' hidden units.

The value and the gate of a hidden unit are H rows apart in W_in. One tile of the product holds both: the addresses of
the loads interleave them as pairs of columns, and the accumulator is split into u and g in registers.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from mtu_kernels.arguments import ExpertWeights
from mtu_kernels.routing import Routing
from mtu_kernels.triton.kernels.activation import expert_of_slot, geglu
from mtu_kernels.triton.launch import (
    Launch,
    ceil_div,
    fits_tensor_descriptor,
    floor_power_of_2,
    make_descriptor,
    next_power_of_2,
)
from mtu_kernels.triton.tiles import TileConfig


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's row tile and column tile. GROUP_M row tiles share the weights of a column tile in the L2 cache."""
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return group * GROUP_M + within % size, within // size


@triton.jit
def load_routing_weights_of_rows(weights_ptr, row_M, slot, L, K):
    """The routing weight of a slot for each row, float32. Rows are counted over all samples, of L tokens each."""
    return tl.load(weights_ptr + (row_M // L).to(tl.int64) * K + slot).to(tl.float32)


@triton.jit
def expert_in_kernel(
    x_hat_ptr, w_in_ptr, b_in_ptr, weights_ptr, indices_ptr, h_ptr, z_ptr, matrices, rows, L, D, F, K, E,
    SLOT_INPUTS: tl.constexpr, ALIGNED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """x̂ is (matrices, rows, D): a matrix of L rows for each sample, or one of B·L rows if routing is dense.

    ALIGNED means that the columns of a tile belong to one slot. It must be true if there is one matrix for all samples.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = K * tl.cdiv(F, BLOCK_N) if ALIGNED else tl.cdiv(K * F, BLOCK_N)
    tile_m, tile_n = tile_of_program(matrices * tiles_m, tiles_n, GROUP_M)
    matrix = tile_m // tiles_m
    local_M = (tile_m % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_M = tl.minimum(local_M, rows - 1)
    # The pairs of columns: values are at even places, gates at odd ones.
    pair_P = tl.arange(0, 2 * BLOCK_N)
    n_N = tl.arange(0, BLOCK_N)
    input_matrix = matrix
    if ALIGNED:
        slot = tile_n // tl.cdiv(F, BLOCK_N)
        first = (tile_n % tl.cdiv(F, BLOCK_N)) * BLOCK_N
        unit_P = tl.minimum(first + pair_P // 2, F - 1)
        mask_N = first + n_N < F
        column_N = slot * F + first + n_N
        expert_P = expert_of_slot(indices_ptr, matrix, slot, K, E)
        if SLOT_INPUTS:
            input_matrix = matrix * K + slot
    else:
        column_P = tl.minimum(tile_n * BLOCK_N + pair_P // 2, K * F - 1)
        column_N = tile_n * BLOCK_N + n_N
        mask_N = column_N < K * F
        unit_P = column_P % F
        expert_P = expert_of_slot(indices_ptr, matrix, column_P // F, K, E)
    row_P = expert_P * F + unit_P + (pair_P % 2) * (E * F)

    # Rows past the end read the last row again. Their results are not stored.
    k_K = tl.arange(0, BLOCK_K)
    x_hat_ptrs = x_hat_ptr + (input_matrix.to(tl.int64) * rows + row_M)[:, None] * D + k_K[None, :]
    w_in_ptrs = w_in_ptr + row_P.to(tl.int64)[None, :] * D + k_K[:, None]
    # The accumulator starts from the bias. Adding it later would cost one more instruction per element.
    bias_P = tl.load(b_in_ptr + row_P).to(tl.float32)
    z_MP = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32) + bias_P[None, :]
    if OVERLAP:
        gdc_wait()
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

    mask_MN = (local_M < rows)[:, None] & mask_N[None, :]
    out_M = matrix.to(tl.int64) * rows + local_M
    if z_ptr is not None:
        z_ptrs = z_ptr + out_M[:, None] * (2 * K * F) + column_N[None, :]
        tl.store(z_ptrs, u_MN.to(z_ptr.dtype.element_ty), mask=mask_MN)
        tl.store(z_ptrs + K * F, g_MN.to(z_ptr.dtype.element_ty), mask=mask_MN)
    if h_ptr is not None:
        # The weights are loaded after the loop, which needs all registers.
        if ALIGNED:
            w_MN = load_routing_weights_of_rows(weights_ptr, matrix * rows + row_M, slot, L, K)[:, None]
        else:
            slot_N = tl.minimum(column_N // F, K - 1)
            w_MN = tl.load(weights_ptr + matrix.to(tl.int64) * K + slot_N).to(tl.float32)[None, :]
        h_MN = geglu(u_MN, g_MN, EXACT) * w_MN
        h_ptrs = h_ptr + out_M[:, None] * (K * F) + column_N[None, :]
        tl.store(h_ptrs, h_MN.to(h_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def expert_in_descriptor_kernel(
    x_hat_desc, w_in_desc, b_in_ptr, weights_ptr, indices_ptr, h_desc, z_desc, matrices, rows, L, D, F, K, E,
    SLOT_INPUTS: tl.constexpr, ALIGNED: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`expert_in_kernel` with tensor descriptors, which mask rows and depth in hardware, for 16-bit storage.

    x_hat_desc is (matrices·slots, rows, D), w_in_desc (2, H, D), h_desc (matrices, rows, KF), z_desc (matrices, rows,
    2KF). BLOCK_N divides F if ALIGNED, else KF.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = K * F // BLOCK_N
    tile_m, tile_n = tile_of_program(matrices * tiles_m, tiles_n, GROUP_M)
    matrix = tile_m // tiles_m
    row = (tile_m % tiles_m) * BLOCK_M
    column = tile_n * BLOCK_N
    first = column
    input_matrix = matrix
    if ALIGNED:
        slot = column // F
        first = expert_of_slot(indices_ptr, matrix, slot, K, E) * F + column % F
        if SLOT_INPUTS:
            input_matrix = matrix * K + slot
        row_M = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1)
        w_MN = load_routing_weights_of_rows(weights_ptr, matrix * rows + row_M, slot, L, K)[:, None]
    else:
        slot_N = (column + tl.arange(0, BLOCK_N)) // F
        w_MN = tl.load(weights_ptr + matrix.to(tl.int64) * K + slot_N).to(tl.float32)[None, :]
    pair_P = tl.arange(0, 2 * BLOCK_N)
    bias_P = tl.load(b_in_ptr + first + (pair_P // BLOCK_N) * (E * F) + pair_P % BLOCK_N).to(tl.float32)
    z_MP = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32) + bias_P[None, :]
    if OVERLAP:
        gdc_wait()
    for k in range(0, D, BLOCK_K):
        x_hat_MK = x_hat_desc.load([input_matrix, row, k]).reshape(BLOCK_M, BLOCK_K)
        w_in_PK = w_in_desc.load([0, first, k]).reshape(2 * BLOCK_N, BLOCK_K)
        z_MP = tl.dot(x_hat_MK, w_in_PK.T, z_MP)
    u_MN, g_MN = tl.split(tl.permute(tl.reshape(z_MP, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))

    if z_desc is not None:
        z_desc.store([matrix, row, column], u_MN.to(z_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))
        z_desc.store([matrix, row, K * F + column], g_MN.to(z_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))
    if h_desc is not None:
        h_MN = geglu(u_MN, g_MN, False) * w_MN
        h_desc.store([matrix, row, column], h_MN.to(h_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))


@triton.jit
def expert_in_wide_descriptor_kernel(
    x_hat_desc, w_in_desc, w_in_rest_desc, b_in_ptr, weights_ptr, h_desc, h_rest_desc, rows, L, D, F, E,
    OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`expert_in_descriptor_kernel` for dense routing and tiles of three halves of a power of two.

    Such tiles load fewer bytes per product. A tile has two accumulators that read the same rows: one of FRONT columns
    from the front of the hidden units, and one of half as many columns from the rest. FRONT divides F. Rows are those
    of all samples.
    """
    FRONT: tl.constexpr = BLOCK_N // 3 * 2
    REST: tl.constexpr = BLOCK_N // 3
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(E * F, BLOCK_N)
    tile_m, tile_n = tile_of_program(tiles_m, tiles_n, GROUP_M)
    row = tile_m * BLOCK_M
    column = tile_n * FRONT
    rest = tiles_n * FRONT + tile_n * REST
    pair_P = tl.arange(0, 2 * FRONT)
    bias_P = tl.load(b_in_ptr + column + (pair_P // FRONT) * (E * F) + pair_P % FRONT).to(tl.float32)
    z_MP = tl.zeros((BLOCK_M, 2 * FRONT), tl.float32) + bias_P[None, :]
    z_MR = tl.zeros((BLOCK_M, 2 * REST), tl.float32)
    if OVERLAP:
        gdc_wait()
    for k in range(0, D, BLOCK_K):
        x_hat_MK = x_hat_desc.load([0, row, k]).reshape(BLOCK_M, BLOCK_K)
        w_in_PK = w_in_desc.load([0, column, k]).reshape(2 * FRONT, BLOCK_K)
        w_in_RK = w_in_rest_desc.load([0, rest, k]).reshape(2 * REST, BLOCK_K)
        z_MP = tl.dot(x_hat_MK, w_in_PK.T, z_MP)
        z_MR = tl.dot(x_hat_MK, w_in_RK.T, z_MR)
    store_weighted_activations(z_MP, h_desc, weights_ptr, rows, L, row, column, F, E, BLOCK_M, FRONT)
    # This bias is added after the loop, which has no registers left for it. It is zero past the last hidden unit, whose
    # results are not stored.
    pair_R = tl.arange(0, 2 * REST)
    unit_R = rest + pair_R % REST
    bias_R = tl.load(b_in_ptr + unit_R + (pair_R // REST) * (E * F), mask=unit_R < E * F, other=0.0)
    z_MR += bias_R.to(tl.float32)[None, :]
    store_weighted_activations(z_MR, h_rest_desc, weights_ptr, rows, L, row, rest, F, E, BLOCK_M, REST)


@triton.jit
def store_weighted_activations(
    z_MP, h_desc, weights_ptr, rows, L, row, column, F, E, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Stores h = w · u · gelu(g) for rows of all samples, and columns of one expert that start at `column`."""
    row_M = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1)
    w = load_routing_weights_of_rows(weights_ptr, row_M, tl.minimum(column // F, E - 1), L, E)[:, None]
    u_MN, g_MN = tl.split(tl.permute(tl.reshape(z_MP, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    h_MN = geglu(u_MN, g_MN, False) * w
    h_desc.store([0, row, column], h_MN.to(h_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))


class FirstProductOutputs(NamedTuple):
    """The outputs of the first product. One of them may be ``None``.

    Attributes:
        h: (B, L, KF) compute dtype, the weighted activations.
        z: (B, L, 2KF) compute dtype, the pre-activations ``[values; gates]``.
    """

    h: Tensor | None
    z: Tensor | None


def launch_expert_in(
    x_hat: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    outputs: FirstProductOutputs,
    tile: TileConfig,
    precision: str,
    *,
    overlap: bool = False,
) -> Launch:
    """Launches the first product from x̂ (B, L, D), or (B, K, L, D) with an input per slot, to outputs.

    Args:
        x_hat, experts, routing: the inputs. Weights of experts are contiguous.
        outputs: the tensors to write.
        tile: the shape of a program.
        precision: "ieee" or "tf32", for float32 products.
        overlap: whether to start before the previous launch ends. That launch must write x̂, and no other input.
    """
    *_, L, D = x_hat.shape
    B, K = routing.weights.shape
    E = experts.num_experts
    F = experts.w_out.shape[1] // E
    slot_inputs = x_hat.dim() == 4
    is_dense = routing.indices is None and not slot_inputs
    by_descriptor = tile.descriptors and all(fits_tensor_descriptor(t) for t in (x_hat, experts.w_in, *outputs))
    block_n = floor_power_of_2(tile.block_n)
    if by_descriptor and is_dense and outputs.z is None and F % block_n == 0:
        if tile.persistent:
            # Gluon, which the kernel is written in, is experimental. So only calls that use the kernel import it.
            persistent = importlib.import_module("mtu_kernels.triton.kernels.expert_in_persistent")
            return persistent.launch_expert_in_persistent(x_hat, experts, routing, outputs.h, tile, overlap=overlap)
        if block_n < tile.block_n:
            return _launch_wide(x_hat, experts, routing, outputs.h, tile, overlap=overlap)
    if by_descriptor and F % block_n != 0:
        # Descriptors mask the end of a tensor, but not the end of an expert inside it.
        divisor = _divisor(K * F if is_dense else F, block_n)
        by_descriptor = divisor >= 16
        block_n = divisor if by_descriptor else block_n
    is_aligned = slot_inputs or F % block_n == 0
    # If all columns of a tile belong to one expert, its rows may belong to several samples.
    matrices, rows = (1, B * L) if is_dense and is_aligned else (B, L)
    block_m = min(tile.block_m, max(16, next_power_of_2(rows)))
    constants = {
        "SLOT_INPUTS": slot_inputs,
        "ALIGNED": is_aligned,
        "OVERLAP": overlap,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    programs = matrices * ceil_div(rows, block_m)
    programs *= K * ceil_div(F, block_n) if is_aligned else ceil_div(K * F, block_n)
    sizes = (matrices, rows, L, D, F, K, E)
    if by_descriptor:
        x_hat_desc = make_descriptor(x_hat.view(-1, rows, D), (1, block_m, tile.block_k))
        w_in_desc = make_descriptor(experts.w_in.view(2, -1, D), (2, block_n, tile.block_k))
        written = (None if t is None else t.view(matrices, rows, -1) for t in outputs)
        output_descs = (None if t is None else make_descriptor(t, (1, block_m, block_n)) for t in written)
        arguments = (x_hat_desc, w_in_desc, experts.b_in, *routing, *output_descs, *sizes)
        kernel = expert_in_descriptor_kernel
    else:
        constants |= {"EVEN_K": D % tile.block_k == 0, "PRECISION": precision, "EXACT": x_hat.element_size() == 4}
        arguments = (x_hat, experts.w_in, experts.b_in, *routing, *outputs, *sizes)
        kernel = expert_in_kernel
    product = "expert_in" if outputs.z is None else "expert_in_train"
    return Launch(kernel, programs, arguments, constants, tile.num_warps, tile.num_stages, overlap, product)


def _launch_wide(
    x_hat: Tensor, experts: ExpertWeights, routing: Routing, h: Tensor, tile: TileConfig, *, overlap: bool
) -> Launch:
    B, L, D = x_hat.shape
    E = experts.num_experts
    front = floor_power_of_2(tile.block_n)
    block_m = min(tile.block_m, max(16, next_power_of_2(B * L)))
    w_in = experts.w_in.view(2, -1, D)
    constants = {
        "OVERLAP": overlap,
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    arguments = (
        make_descriptor(x_hat.view(1, B * L, D), (1, block_m, tile.block_k)),
        *(make_descriptor(w_in, (2, width, tile.block_k)) for width in (front, front // 2)),
        experts.b_in,
        routing.weights,
        *(make_descriptor(h.view(1, B * L, -1), (1, block_m, width)) for width in (front, front // 2)),
        *(B * L, L, D, w_in.shape[1] // E, E),
    )
    programs = ceil_div(B * L, block_m) * ceil_div(w_in.shape[1], tile.block_n)
    return Launch(
        expert_in_wide_descriptor_kernel, programs, arguments, constants, tile.num_warps, tile.num_stages, overlap,
        product_name="expert_in",
    )  # fmt: skip


def _divisor(width: int, limit: int) -> int:
    """The largest power of two, at most limit, that divides width."""
    return min(width & -width, limit)
