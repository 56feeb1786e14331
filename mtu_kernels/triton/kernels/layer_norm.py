"""LayerNorm with the affine of each sample (or of each of its experts), forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from mtu_kernels.arguments import NormAffine
from mtu_kernels.triton.kernels.activation import expert_of_slot
from mtu_kernels.triton.launch import Launch, ceil_div, next_power_of_2

# Rows that one program of the backward pass walks through, where it can sum them in registers.
_ROWS_PER_SUM = 128


@triton.jit
def layer_norm_kernel(
    x_ptr, gamma_ptr, beta_ptr, indices_ptr, x_hat_ptr, mean_ptr, rstd_ptr, L, D, K, E, eps,
    SLOTS: tl.constexpr, PER_EXPERT: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x̂ = (x − mean) · rstd · γ + β; SLOTS outputs a row. mean_ptr ``None``: statistics are not kept."""
    if OVERLAP:
        # Once every program has begun, the next launch may begin too; it waits for the results by itself.
        gdc_launch_dependents()
    tiles = tl.cdiv(L, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    local_R = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    row_R = sample * L + local_R
    d_D = tl.arange(0, BLOCK_D)
    mask_D = d_D < D
    mask_RD = (local_R < L)[:, None] & mask_D[None, :]
    x_RD = tl.load(x_ptr + row_R[:, None] * D + d_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
    mean_R = tl.sum(x_RD, axis=1) / D
    # Centred before squaring: the difference of two large sums would lose everything where |mean| ≫ deviation.
    centred_RD = tl.where(mask_D[None, :], x_RD - mean_R[:, None], 0.0)
    rstd_R = tl.rsqrt(tl.sum(centred_RD * centred_RD, axis=1) / D + eps)
    n_RD = centred_RD * rstd_R[:, None]
    if mean_ptr is not None:
        tl.store(mean_ptr + row_R, mean_R, mask=local_R < L)
        tl.store(rstd_ptr + row_R, rstd_R, mask=local_R < L)
    if x_hat_ptr is not None:
        for slot in range(0, SLOTS):
            affine = sample * E + expert_of_slot(indices_ptr, sample, slot, K, E) if PER_EXPERT else sample
            gamma_D = tl.load(gamma_ptr + affine * D + d_D, mask=mask_D, other=0.0).to(tl.float32)
            beta_D = tl.load(beta_ptr + affine * D + d_D, mask=mask_D, other=0.0).to(tl.float32)
            x_hat_RD = n_RD * gamma_D[None, :] + beta_D[None, :]
            out_R = (sample * SLOTS + slot) * L + local_R
            out_ptrs = x_hat_ptr + out_R[:, None] * D + d_D[None, :]
            tl.store(out_ptrs, x_hat_RD.to(x_hat_ptr.dtype.element_ty), mask=mask_RD)


@triton.jit
def layer_norm_backward_kernel(
    d_x_hat_ptr, x_ptr, mean_ptr, rstd_ptr, gamma_ptr, indices_ptr, dx_ptr, d_gamma_ptr, d_beta_ptr, L, D, K, E,
    SLOTS: tl.constexpr, PER_EXPERT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """∂n = Σ γ ∂x̂; ∂x = rstd (∂n − mean(∂n) − n mean(n ∂n)); sums of ∂x̂ · n and ∂x̂ over this program's rows.

    d_gamma_ptr, d_beta_ptr: (B, tiles, SLOTS, D) float32. STEPS is 1 where there are several slots.
    """
    tiles = tl.cdiv(L, ROWS * STEPS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    d_D = tl.arange(0, BLOCK_D)
    mask_D = d_D < D
    d_gamma_D = tl.zeros((BLOCK_D,), tl.float32)
    d_beta_D = tl.zeros((BLOCK_D,), tl.float32)
    sums_ptr = (tl.program_id(0).to(tl.int64) * SLOTS) * D
    for step in range(0, STEPS):
        local_R = (tile * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask_R = local_R < L
        mask_RD = mask_R[:, None] & mask_D[None, :]
        row_R = sample * L + local_R
        x_RD = tl.load(x_ptr + row_R[:, None] * D + d_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
        mean_R = tl.load(mean_ptr + row_R, mask=mask_R, other=0.0)
        rstd_R = tl.load(rstd_ptr + row_R, mask=mask_R, other=0.0)
        n_RD = tl.where(mask_RD, (x_RD - mean_R[:, None]) * rstd_R[:, None], 0.0)
        dn_RD = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for slot in range(0, SLOTS):
            affine = sample * E + expert_of_slot(indices_ptr, sample, slot, K, E) if PER_EXPERT else sample
            gamma_D = tl.load(gamma_ptr + affine * D + d_D, mask=mask_D, other=0.0).to(tl.float32)
            in_R = (sample * SLOTS + slot) * L + local_R
            d_x_hat_ptrs = d_x_hat_ptr + in_R[:, None] * D + d_D[None, :]
            d_x_hat_RD = tl.load(d_x_hat_ptrs, mask=mask_RD, other=0.0).to(tl.float32)
            dn_RD += gamma_D[None, :] * d_x_hat_RD
            if SLOTS == 1:
                d_gamma_D += tl.sum(d_x_hat_RD * n_RD, axis=0)
                d_beta_D += tl.sum(d_x_hat_RD, axis=0)
            else:
                tl.store(d_gamma_ptr + sums_ptr + slot * D + d_D, tl.sum(d_x_hat_RD * n_RD, axis=0), mask=mask_D)
                tl.store(d_beta_ptr + sums_ptr + slot * D + d_D, tl.sum(d_x_hat_RD, axis=0), mask=mask_D)
        mean_dn_R = tl.sum(dn_RD, axis=1) / D
        projection_R = tl.sum(n_RD * dn_RD, axis=1) / D
        dx_RD = rstd_R[:, None] * (dn_RD - mean_dn_R[:, None] - n_RD * projection_R[:, None])
        tl.store(dx_ptr + row_R[:, None] * D + d_D[None, :], dx_RD.to(dx_ptr.dtype.element_ty), mask=mask_RD)
    if SLOTS == 1:
        tl.store(d_gamma_ptr + sums_ptr + d_D, d_gamma_D, mask=mask_D)
        tl.store(d_beta_ptr + sums_ptr + d_D, d_beta_D, mask=mask_D)


class Statistics(NamedTuple):
    """Of each token, float32, (B, L)."""

    mean: Tensor
    rstd: Tensor


class NormGradients(NamedTuple):
    """What the backward pass of LayerNorm writes, for T row tiles a sample.

    Attributes:
        x: (B, L, D) dtype of x.
        weight: (B, T, slots, D) float32, sums over the rows of a tile.
        bias: the same.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor


def launch_layer_norm(
    x: Tensor,
    norm: NormAffine,
    indices: Tensor | None,
    x_hat: Tensor | None,
    statistics: Statistics | None,
    eps: float,
    *,
    overlap: bool = False,
) -> Launch:
    """x (B, L, D) → x̂ (B, L, D), or (B, slots, L, D) for affines (B, E, D); and, if asked for, the statistics.

    overlap: let the next launch start early, if it asks to.
    """
    B, L, D = x.shape
    block_d, rows, num_warps = _block(D)
    per_expert = norm.weight.dim() == 3
    slots = x_hat.shape[1] if x_hat is not None and per_expert else 1
    constants = {
        "SLOTS": slots,
        "PER_EXPERT": per_expert,
        "OVERLAP": overlap,
        "ROWS": rows,
        "BLOCK_D": block_d,
    }
    experts = norm.weight.shape[1] if per_expert else 1
    kept = statistics or (None, None)
    arguments = (x, *norm, indices, x_hat, *kept, L, D, slots, experts, eps)
    return Launch(layer_norm_kernel, B * ceil_div(L, rows), arguments, constants, num_warps, 1)


def launch_layer_norm_backward(
    d_x_hat: Tensor, x: Tensor, statistics: Statistics, norm: NormAffine, indices: Tensor | None, outputs: NormGradients
) -> Launch:
    """∂x̂ (B, L, D), or (B, slots, L, D), → outputs, whose sums have `norm_tiles` rows a sample."""
    B, L, D = x.shape
    block_d, rows, num_warps = _block(D)
    per_expert = norm.weight.dim() == 3
    slots = d_x_hat.shape[1] if per_expert else 1
    constants = {
        "SLOTS": slots,
        "PER_EXPERT": per_expert,
        "STEPS": _steps(L, rows, slots),
        "ROWS": rows,
        "BLOCK_D": block_d,
    }
    experts = norm.weight.shape[1] if per_expert else 1
    arguments = (d_x_hat, x, *statistics, norm.weight, indices, *outputs, L, D, slots, experts)
    programs = B * norm_tiles(L, D, slots)
    return Launch(layer_norm_backward_kernel, programs, arguments, constants, num_warps, 1)


def norm_tiles(L: int, D: int, slots: int) -> int:
    """Programs that share a sample's rows in the backward pass."""
    _, rows, _ = _block(D)
    return ceil_div(L, rows * _steps(L, rows, slots))


def _steps(L: int, rows: int, slots: int) -> int:
    return 1 if slots > 1 else max(1, min(_ROWS_PER_SUM, next_power_of_2(L)) // rows)


def _block(D: int) -> tuple[int, int, int]:
    """Width of a row's block, rows of a program and its warps: some 4096 elements, 32 a thread."""
    block_d = next_power_of_2(D)
    rows = max(1, min(16, 4096 // block_d))
    return block_d, rows, max(1, min(16, block_d * rows // 1024))
