"""LayerNorm with an affine per sample, or per sample and expert: forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from mtu_kernels.arguments import NormAffine
from mtu_kernels.triton.kernels.activation import expert_of_slot
from mtu_kernels.triton.launch import Launch, ceil_div, next_power_of_2

# The number of rows that one program of the backward pass sums in registers, if there is one slot.
_ROWS_PER_SUM = 128


@triton.jit
def layer_norm_kernel(
    x_ptr, gamma_ptr, beta_ptr, indices_ptr, x_hat_ptr, mean_ptr, rstd_ptr, L, D, K, E, eps,
    SLOTS: tl.constexpr, PER_EXPERT: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x̂ = (x − mean) · rstd · γ + β, with SLOTS outputs per row. mean_ptr ``None`` keeps no statistics."""
    if OVERLAP:
        # When all programs have reached this line, the next launch may start. It waits for the results by itself.
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
    # Squares are of centred numbers: E[x²] − mean² would lose all digits where |mean| ≫ deviation.
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
    """∂n = Σ γ ∂x̂ and ∂x = rstd (∂n − mean(∂n) − n mean(n ∂n)), and ∂x̂ · n and ∂x̂ summed over this program's rows.

    d_gamma_ptr and d_beta_ptr are (B, tiles, SLOTS, D) float32. STEPS must be 1 if there are several slots.
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


class TokenStatistics(NamedTuple):
    """The statistics of each token, (B, L) float32.

    Attributes:
        mean: the mean of x.
        rstd: 1 / sqrt(variance + eps).
    """

    mean: Tensor
    rstd: Tensor


class NormBackwardOutputs(NamedTuple):
    """The outputs of LayerNorm's backward pass, for T row tiles per sample.

    Attributes:
        d_x: (B, L, D) in the dtype of x, its gradient.
        d_weight_per_tile: (B, T, slots, D) float32, the gradient of γ summed over the rows of each tile.
        d_bias_per_tile: (B, T, slots, D) float32, the gradient of β summed over the rows of each tile.
    """

    d_x: Tensor
    d_weight_per_tile: Tensor
    d_bias_per_tile: Tensor


def launch_layer_norm(
    x: Tensor,
    norm: NormAffine,
    indices: Tensor | None,
    x_hat: Tensor | None,
    statistics: TokenStatistics | None,
    eps: float,
    *,
    overlap: bool = False,
) -> Launch:
    """Launches `layer_norm_kernel` from x (B, L, D) to x̂ (B, L, D), or to (B, slots, L, D) for affines (B, E, D).

    Args:
        x, norm, indices, eps: as for `mtu_kernels.moe_ffn`.
        x_hat, statistics: the outputs. ``None`` omits one.
        overlap: whether the next launch may start early.
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
    d_x_hat: Tensor,
    x: Tensor,
    statistics: TokenStatistics,
    norm: NormAffine,
    indices: Tensor | None,
    outputs: NormBackwardOutputs,
) -> Launch:
    """Launches `layer_norm_backward_kernel` from ∂x̂ (B, L, D), or (B, slots, L, D), in `num_norm_tiles` tiles."""
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
    programs = B * num_norm_tiles(L, D, slots)
    return Launch(layer_norm_backward_kernel, programs, arguments, constants, num_warps, 1)


def num_norm_tiles(L: int, D: int, slots: int) -> int:
    """The number of programs that share the rows of a sample in the backward pass."""
    _, rows, _ = _block(D)
    return ceil_div(L, rows * _steps(L, rows, slots))


def _steps(L: int, rows: int, slots: int) -> int:
    return 1 if slots > 1 else max(1, min(_ROWS_PER_SUM, next_power_of_2(L)) // rows)


def _block(D: int) -> tuple[int, int, int]:
    """The width of a row's block, and the rows and warps of a program: about 4096 elements, 32 per thread."""
    block_d = next_power_of_2(D)
    rows = max(1, min(16, 4096 // block_d))
    return block_d, rows, max(1, min(16, block_d * rows // 1024))
