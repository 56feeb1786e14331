"""The backward pass of the second product and of the activation: ∂z, the weighted activation again, and ∂w.

    ∂(w a) = ∂y W_out,e;    ∂u = w ∂(wa)·gelu(g);    ∂g = w ∂(wa)·u·(Φ(g) + g φ(g));    ∂w = Σ ∂(wa)·a

The result of the product stays in registers. Each row tile writes one row of partial sums. They are added later in a
fixed order and without atomics, so that results have the same bits at every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights
from mtu_kernels.routing import Routing
from mtu_kernels.triton.kernels.activation import (
    GegluBackwardOutputs,
    expert_of_slot,
    load_pre_activations,
    store_geglu_backward,
)
from mtu_kernels.triton.kernels.expert_in import tile_of_program
from mtu_kernels.triton.launch import Launch, ceil_div, next_power_of_2
from mtu_kernels.triton.tiles import TileConfig


@triton.jit
def expert_out_backward_kernel(
    grad_y_ptr, w_out_ptr, weights_ptr, indices_ptr, z_ptr, h_ptr, dz_ptr, d_weights_ptr, d_bias_ptr, B, L, D, F, K, E,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of ∂(w a) (B, L, KF), with the gradients and partial sums of `store_geglu_backward`."""
    KF = K * F
    tiles_m = tl.cdiv(L, BLOCK_M)
    tile_m, tile_n = tile_of_program(B * tiles_m, tl.cdiv(KF, BLOCK_N), GROUP_M)
    sample = tile_m // tiles_m
    local_M = (tile_m % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # A remainder keeps neighbours together, so that one load takes several elements; a minimum would not.
    slot_N = tl.minimum(column_N // F, K - 1)
    unit_N = expert_of_slot(indices_ptr, sample, slot_N, K, E) * F + column_N % F

    # u and g are read before the product, which hides the latency. The compiler then also keeps everything after the
    # product in its register layout.
    mask_MN = (local_M < L)[:, None] & (column_N < KF)[None, :]
    rows_M = sample.to(tl.int64) * L + local_M
    u_MN, g_MN = load_pre_activations(z_ptr, mask_MN, rows_M, column_N, KF)

    # Rows past the end read the last row again, and columns those of the last slot. Their results are not stored.
    k_K = tl.arange(0, BLOCK_K)
    safe_M = sample.to(tl.int64) * L + tl.minimum(local_M, L - 1)
    grad_y_ptrs = grad_y_ptr + safe_M[:, None] * D + k_K[None, :]
    w_out_ptrs = w_out_ptr + unit_N[None, :] + k_K.to(tl.int64)[:, None] * (E * F)
    da_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        if EVEN_K:
            grad_y_MK = tl.load(grad_y_ptrs)
            w_out_KN = tl.load(w_out_ptrs)
        else:
            grad_y_MK = tl.load(grad_y_ptrs, mask=k_K[None, :] < D - k, other=0.0)
            w_out_KN = tl.load(w_out_ptrs, mask=k_K[:, None] < D - k, other=0.0)
        da_MN = tl.dot(grad_y_MK, w_out_KN, da_MN, input_precision=PRECISION)
        grad_y_ptrs += BLOCK_K
        w_out_ptrs += BLOCK_K * E * F
    store_geglu_backward(
        da_MN, u_MN, g_MN, mask_MN, sample, tile_m, rows_M, column_N, slot_N, weights_ptr, h_ptr, dz_ptr,
        d_weights_ptr, d_bias_ptr, K, KF, EXACT, IN_PLACE,
    )  # fmt: skip


def launch_expert_out_backward(
    grad_y: Tensor, experts: ExpertWeights, routing: Routing, z: Tensor, outputs: GegluBackwardOutputs,
    tile: TileConfig, precision: str,
) -> Launch:  # fmt: skip
    """Launches the kernel from grad_y (B, L, D) and z (B, L, 2KF) to outputs, in tiles of `rows_per_tile` rows."""
    B, L, D = grad_y.shape
    K = routing.weights.shape[1]
    E = experts.num_experts
    F = experts.w_out.shape[1] // E
    block_m = rows_per_tile(tile, L)
    constants = {
        "EVEN_K": D % tile.block_k == 0,
        "PRECISION": precision,
        "EXACT": grad_y.element_size() == 4,
        "IN_PLACE": outputs.d_z is z,
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    programs = B * ceil_div(L, block_m) * ceil_div(K * F, tile.block_n)
    arguments = (grad_y, experts.w_out, *routing, z, *outputs, B, L, D, F, K, E)
    return Launch(
        expert_out_backward_kernel, programs, arguments, constants, tile.num_warps, tile.num_stages,
        product_name="expert_out_backward",
    )  # fmt: skip


def rows_per_tile(tile: TileConfig, L: int) -> int:
    """The rows of a tile, which are fewer than in the table if a sample has fewer tokens."""
    return min(tile.block_m, max(16, next_power_of_2(L)))
