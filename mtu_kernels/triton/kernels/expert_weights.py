"""The gradients of expert weights: sums over the samples that use an expert, in their order.

    ∂W_in,e = Σ_b ∂z[b, :, k]ᵀ x̂[b];    ∂W_out,eᵀ = Σ_b (w a)[b, :, k]ᵀ ∂y[b]        over b with indices[b, k] = e

A program computes one tile of one expert's gradient and writes it once. If no sample uses the expert, it writes zeros.
"""

# Triton declares that a sum may be a tuple, but the sum of one tensor is a tensor.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtu_kernels.routing import Routing
from mtu_kernels.triton.launch import Launch, ceil_div, next_power_of_2
from mtu_kernels.triton.tiles import TileConfig


@triton.jit
def expert_weights_kernel(
    a_ptr, x_ptr, indices_ptr, gradient_ptr, B, L, N, F, K, E, stride_unit, stride_n,
    HALVES: tl.constexpr, SLOT_INPUTS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    IN_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """In gradient_ptr, hidden unit i of half j is at (j·H + i)·stride_unit, and column n at n·stride_n."""
    tiles_m = tl.cdiv(F, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    tile = tl.program_id(0) // tiles_n
    part = tile // tiles_m
    half = part // E
    expert = part % E
    unit_M = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Units and columns past the end read the first ones again. Their results are not stored. A remainder keeps
    # neighbours together, so that one load takes several elements; a minimum would not.
    safe_unit_M = unit_M % F
    safe_n_N = n_N % N
    k_K = tl.arange(0, BLOCK_K)
    slot_S = tl.arange(0, SLOTS)
    # For float32 storage, every 16 steps have a sum of their own. One running sum over thousands of rows would lose
    # digits.
    part_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gradient_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(0, B):
        slot = expert
        rows = L
        if indices_ptr is not None:
            found_S = tl.load(indices_ptr + b * K + slot_S, mask=slot_S < K, other=-1).to(tl.int32) == expert
            slot = tl.sum(tl.where(found_S, slot_S, 0), axis=0)
            rows = tl.where(tl.sum(found_S.to(tl.int32), axis=0) > 0, L, 0)
        column_M = (half * K + slot) * F + safe_unit_M
        first = tl.cast(b, tl.int64) * L
        first_x = (tl.cast(b, tl.int64) * K + slot) * L if SLOT_INPUTS else first
        a_ptrs = a_ptr + (first + k_K)[None, :] * (HALVES * K * F) + column_M[:, None]
        x_ptrs = x_ptr + (first_x + k_K)[:, None] * N + safe_n_N[None, :]
        for row in range(0, rows, BLOCK_K):
            # Both operands are masked, because memory past the end may hold NaN.
            a_MK = tl.load(a_ptrs, mask=k_K[None, :] < rows - row, other=0.0)
            x_KN = tl.load(x_ptrs, mask=k_K[:, None] < rows - row, other=0.0)
            part_MN = tl.dot(a_MK, x_KN, part_MN, input_precision=PRECISION)
            a_ptrs += BLOCK_K * HALVES * K * F
            x_ptrs += BLOCK_K * N
            if IN_PARTS:
                full = (row // BLOCK_K) % 16 == 15
                gradient_MN += tl.where(full, part_MN, 0.0)
                part_MN = tl.where(full, 0.0, part_MN)
    if IN_PARTS:
        gradient_MN += part_MN
    else:
        gradient_MN = part_MN
    row_M = (half * E + expert) * F + unit_M
    gradient_ptrs = gradient_ptr + row_M.to(tl.int64)[:, None] * stride_unit + n_N.to(tl.int64)[None, :] * stride_n
    mask_MN = (unit_M < F)[:, None] & (n_N < N)[None, :]
    tl.store(gradient_ptrs, gradient_MN.to(gradient_ptr.dtype.element_ty), mask=mask_MN)


def launch_expert_weight_gradients(
    a: Tensor, x: Tensor, routing: Routing, gradient: Tensor, expert_size: int, tile: TileConfig, precision: str
) -> Launch:
    """Launches the kernel from a (B, L, halves·KF) and x (B, L, N) or (B, K, L, N) to gradient (halves·H, N).

    The gradient may have any strides. The expert size is F.
    """
    B, L, width = a.shape
    K = routing.weights.shape[1]
    hidden, N = gradient.shape
    halves = width // (K * expert_size)
    num_experts = hidden // (halves * expert_size)
    constants = {
        "HALVES": halves,
        "SLOT_INPUTS": x.dim() == 4,
        "SLOTS": next_power_of_2(K),
        "PRECISION": precision,
        "IN_PARTS": a.element_size() == 4,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    programs = halves * num_experts * ceil_div(expert_size, tile.block_m) * ceil_div(N, tile.block_n)
    arguments = (a, x, routing.indices, gradient, B, L, N, expert_size, K, num_experts, *gradient.stride())
    return Launch(
        expert_weights_kernel,
        programs,
        arguments,
        constants,
        tile.num_warps,
        tile.num_stages,
        product_name="expert_weights",
    )
