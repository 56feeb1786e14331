"""GEGLU: the activation and its derivative inside kernels, and kernels that apply them after a library's product.

float32 storage gets the error function. Rounding to 16 bits hides small errors, so there Φ is a polynomial:
Φ(g) ≈ ½ + g · P(g²), clamped to [0, 1]. P has degree 8 and is fitted for the least maximal error, over all g, of the
clamped value times max(1, |g|). Beyond |g| = 4.39 the polynomial only grows, so the clamp, which costs no instruction,
covers all large arguments. The error of Φ is 2.8e-5, and that of gelu at most 4.2e-5. Half an ulp at 1 is 4.9e-4 in
float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mtu_kernels.triton.launch import Launch, ceil_div
from mtu_kernels.triton.tiles import ElementwiseTile


class GegluBackwardOutputs(NamedTuple):
    """The outputs of the activation's backward pass, for T row tiles per sample.

    Attributes:
        h: (B, L, KF) compute dtype, the weighted activation again; ``None`` if experts are frozen.
        d_z: (B, L, 2KF) compute dtype. It may be z itself.
        d_weights: (B, T, KF) float32, ``∂(w a) · a`` summed over the rows of each tile.
        d_bias: (B, T, 2KF) float32, dz summed over the rows of each tile; ``None`` if experts are frozen.
    """

    h: torch.Tensor | None
    d_z: torch.Tensor
    d_weights: torch.Tensor
    d_bias: torch.Tensor | None


@triton.jit
def normal_cdf(g, EXACT: tl.constexpr):
    """Φ(g), float32."""
    if EXACT:
        return 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
    t = g * g
    p = 3.807059182e-11 * t - 3.960752615e-09
    p = p * t + 1.816084847e-07
    p = p * t - 4.873374564e-06
    p = p * t + 8.601402806e-05
    p = p * t - 1.066821627e-03
    p = p * t + 9.689243510e-03
    p = p * t - 6.616774201e-02
    p = p * t + 3.988285959e-01
    return tl.minimum(tl.maximum(g * p + 0.5, 0.0), 1.0)


@triton.jit
def geglu(u, g, EXACT: tl.constexpr):
    """``u · gelu(g)``, float32."""
    return u * (g * normal_cdf(g, EXACT))


@triton.jit
def geglu_and_gradients(da, u, g, EXACT: tl.constexpr):
    """``a = u · gelu(g)`` and its gradients ∂u and ∂g for a gradient da of a, float32."""
    cdf = normal_cdf(g, EXACT)
    # exp(-g²/2) / sqrt(2π)
    pdf = 0.3989422804014327 * tl.exp2(g * g * -0.7213475204444817)
    gelu = g * cdf
    return u * gelu, da * gelu, da * u * (cdf + g * pdf)


@triton.jit
def expert_of_slot(indices_ptr, sample, slot, K, E):
    """The expert of each slot, which is the slot itself if routing is dense. Wrong indices are clamped into range."""
    # Without else, the compiler would also compile the code after an early return.
    if indices_ptr is None:
        return slot
    else:
        expert = tl.load(indices_ptr + sample.to(tl.int64) * K + slot).to(tl.int32)
        return tl.minimum(tl.maximum(expert, 0), E - 1)


@triton.jit
def load_pre_activations(z_ptr, mask_MN, rows_M, columns_N, KF):
    """u and g of a tile in the storage dtype."""
    z_ptrs = z_ptr + rows_M[:, None] * (2 * KF) + columns_N[None, :]
    return tl.load(z_ptrs, mask=mask_MN, other=0.0), tl.load(z_ptrs + KF, mask=mask_MN, other=0.0)


@triton.jit
def store_geglu_backward(
    da_MN, u_MN, g_MN, mask_MN, sample, tile, rows_M, columns_N, slots_N, weights_ptr, h_ptr, dz_ptr, d_weights_ptr,
    d_bias_ptr, K, KF, EXACT: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Writes ∂z, the weighted activation, and the tile's sums for ∂w and ∂b_in, from ∂(w · a), u and g of a tile.

    rows_M (int64) and tile count the rows and row tiles of all samples.
    """
    if IN_PLACE:
        # dz overwrites z, so all threads must have read the tile before one of them writes to it.
        tl.debug_barrier()
    # Elements past the end may be anything, because they are neither stored nor summed. Setting u and g to ∂(w · a)
    # there makes the compiler keep both in the register layout of the product. It then converts each of them once, in
    # 16 bits.
    u_MN = tl.where(mask_MN, u_MN.to(tl.float32), da_MN)
    g_MN = tl.where(mask_MN, g_MN.to(tl.float32), da_MN)
    w_N = tl.load(weights_ptr + sample.to(tl.int64) * K + slots_N).to(tl.float32)
    a_MN, du_MN, dg_MN = geglu_and_gradients(da_MN * w_N[None, :], u_MN, g_MN, EXACT)
    dz_ptrs = dz_ptr + rows_M[:, None] * (2 * KF) + columns_N[None, :]
    tl.store(dz_ptrs, du_MN.to(dz_ptr.dtype.element_ty), mask=mask_MN)
    tl.store(dz_ptrs + KF, dg_MN.to(dz_ptr.dtype.element_ty), mask=mask_MN)
    mask_N = columns_N < KF
    sums_N = tile.to(tl.int64) * KF + columns_N
    tl.store(d_weights_ptr + sums_N, tl.sum(tl.where(mask_MN, da_MN * a_MN, 0.0), axis=0), mask=mask_N)
    if h_ptr is not None:
        h_ptrs = h_ptr + rows_M[:, None] * KF + columns_N[None, :]
        tl.store(h_ptrs, (a_MN * w_N[None, :]).to(h_ptr.dtype.element_ty), mask=mask_MN)
        biases_N = sums_N + tile.to(tl.int64) * KF
        tl.store(d_bias_ptr + biases_N, tl.sum(tl.where(mask_MN, du_MN, 0.0), axis=0), mask=mask_N)
        tl.store(d_bias_ptr + biases_N + KF, tl.sum(tl.where(mask_MN, dg_MN, 0.0), axis=0), mask=mask_N)


@triton.jit
def geglu_kernel(
    z_ptr, weights_ptr, h_ptr, L, F, K,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h (B, L, KF) = w · u · gelu(g) from z (B, L, 2KF)."""
    KF = K * F
    sample, _, rows_M, columns_N, slots_N, mask_MN = _elementwise_tile(L, F, K, BLOCK_M, BLOCK_N)
    u_MN, g_MN = load_pre_activations(z_ptr, mask_MN, rows_M, columns_N, KF)
    w_N = tl.load(weights_ptr + sample.to(tl.int64) * K + slots_N).to(tl.float32)
    h_MN = geglu(u_MN.to(tl.float32), g_MN.to(tl.float32), EXACT) * w_N[None, :]
    offsets_MN = rows_M[:, None] * KF + columns_N[None, :]
    tl.store(h_ptr + offsets_MN, h_MN.to(h_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def geglu_backward_kernel(
    da_ptr, weights_ptr, z_ptr, h_ptr, dz_ptr, d_weights_ptr, d_bias_ptr, L, F, K,
    EXACT: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`store_geglu_backward` after a library's product ∂(w · a) = da (B, L, KF), which h may overwrite."""
    KF = K * F
    sample, tile, rows_M, columns_N, slots_N, mask_MN = _elementwise_tile(L, F, K, BLOCK_M, BLOCK_N)
    da_MN = tl.load(da_ptr + rows_M[:, None] * KF + columns_N[None, :], mask=mask_MN, other=0.0).to(tl.float32)
    u_MN, g_MN = load_pre_activations(z_ptr, mask_MN, rows_M, columns_N, KF)
    # h may overwrite da, so all threads must have read the tile before one of them writes to it.
    tl.debug_barrier()
    store_geglu_backward(
        da_MN, u_MN, g_MN, mask_MN, sample, tile, rows_M, columns_N, slots_N, weights_ptr, h_ptr, dz_ptr,
        d_weights_ptr, d_bias_ptr, K, KF, EXACT, IN_PLACE,
    )  # fmt: skip


@triton.jit
def _elementwise_tile(L, F, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sample, row tile, rows, columns, slots of the columns, and mask of valid elements of this program's tile."""
    tiles_m = tl.cdiv(L, BLOCK_M)
    tiles_n = tl.cdiv(K * F, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    sample = tile // tiles_m
    local_M = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_N = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots_N = tl.minimum(columns_N // F, K - 1)
    mask_MN = (local_M < L)[:, None] & (columns_N < K * F)[None, :]
    return sample, tile, sample.to(tl.int64) * L + local_M, columns_N, slots_N, mask_MN


def launch_geglu(
    z: torch.Tensor, weights: torch.Tensor, h: torch.Tensor, expert_size: int, tile: ElementwiseTile
) -> Launch:
    """Launches `geglu_kernel` from z (B, L, 2KF) and weights (B, K) to h (B, L, KF). The expert size is F."""
    programs = _programs(h, tile)
    constants = {"EXACT": z.dtype == torch.float32, **tile.block_sizes}
    arguments = (z, weights, h, h.shape[1], expert_size, weights.shape[1])
    return Launch(geglu_kernel, programs, arguments, constants, tile.num_warps, 1)


def launch_geglu_backward(
    da: torch.Tensor,
    weights: torch.Tensor,
    z: torch.Tensor,
    outputs: GegluBackwardOutputs,
    expert_size: int,
    tile: ElementwiseTile,
) -> Launch:
    """Launches `geglu_backward_kernel` from da (B, L, KF) and z (B, L, 2KF) to outputs. The expert size is F."""
    constants = {"EXACT": z.dtype == torch.float32, "IN_PLACE": outputs.d_z is z, **tile.block_sizes}
    arguments = (da, weights, z, *outputs, da.shape[1], expert_size, weights.shape[1])
    return Launch(geglu_backward_kernel, _programs(da, tile), arguments, constants, tile.num_warps, 1)


def _programs(h: torch.Tensor, tile: ElementwiseTile) -> int:
    B, L, width = h.shape
    return B * ceil_div(L, tile.block_m) * ceil_div(width, tile.block_n)
