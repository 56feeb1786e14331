"""The products that sum over the active experts' hidden units: the second product, and the gradient of x̂.

    y[b]  = Σ_k h[b, :, k] W_out,eᵀ + bias                       e = indices[b, k]
    ∂x̂[b] = Σ_k ∂u[b, :, k] W_u,e + ∂g[b, :, k] W_g,e

For affines (B, E, D), the second sum is over one k only, and has an output for each. Both products read rows of (B, L,
halves·K·F), with one half for h and two for [∂u, ∂g]. Each step of the main loop reads the weights of one expert. The
experts are loaded into a vector before the loop, because a load of an index inside it would prevent pipelining.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mtu_kernels.routing import Routing
from mtu_kernels.triton.kernels.activation import expert_of_slot
from mtu_kernels.triton.kernels.expert_in import tile_of_program
from mtu_kernels.triton.launch import Launch, ceil_div, fits_tensor_descriptor, make_descriptor, next_power_of_2
from mtu_kernels.triton.tiles import TileConfig


@triton.jit
def add_bias(y_MN, bias_ptr, weights_ptr, indices_ptr, sample, n_N, N, K, E, BIAS_PER_EXPERT: tl.constexpr):
    """y + b_out for a bias (D,), and y + Σ_k w[k] · b_out[e_k] for a bias (E, D)."""
    n_N = tl.minimum(n_N, N - 1)
    # There is one return, because the compiler also compiles the code after an early return.
    if BIAS_PER_EXPERT:
        bias_N = tl.zeros_like(n_N).to(tl.float32)
        for k in range(0, K):
            expert = expert_of_slot(indices_ptr, sample, k, K, E)
            w = tl.load(weights_ptr + sample.to(tl.int64) * K + k).to(tl.float32)
            bias_N += w * tl.load(bias_ptr + expert * N + n_N).to(tl.float32)
        y_MN += bias_N[None, :]
    elif bias_ptr is not None:
        y_MN += tl.load(bias_ptr + n_N).to(tl.float32)[None, :]
    return y_MN


@triton.jit
def experts_of_sample(indices_ptr, sample, K, E, SLOTS: tl.constexpr):
    """The experts of all slots of a sample, padded to SLOTS."""
    return expert_of_slot(indices_ptr, sample, tl.minimum(tl.arange(0, SLOTS), K - 1), K, E)


@triton.jit
def select_expert(indices_ptr, experts_S, slot, SLOTS: tl.constexpr):
    """experts_S[slot], from registers."""
    if indices_ptr is None:
        return slot
    else:
        return tl.sum(tl.where(tl.arange(0, SLOTS) == slot, experts_S, 0), axis=0)


@triton.jit
def expert_sum_kernel(
    a_ptr, weight_ptr, bias_ptr, weights_ptr, indices_ptr, y_ptr, B, L, N, F, K, E, stride_k, stride_n,
    HALVES: tl.constexpr, SLOT_OUTPUTS: tl.constexpr, BIAS_PER_EXPERT: tl.constexpr, SLOTS: tl.constexpr,
    EVEN_F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """In weight_ptr, hidden unit i of half j is at (j·H + i)·stride_k, and column n at n·stride_n."""
    tiles_m = tl.cdiv(L, BLOCK_M)
    outputs = B * K if SLOT_OUTPUTS else B
    tile_m, tile_n = tile_of_program(outputs * tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    output = tile_m // tiles_m
    sample = output // K if SLOT_OUTPUTS else output
    first_slot = output % K if SLOT_OUTPUTS else 0
    num_slots = 1 if SLOT_OUTPUTS else K
    local_M = (tile_m % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    experts_S = experts_of_sample(indices_ptr, sample, K, E, SLOTS)

    # Rows past the end read the last row again, and columns past the end the first ones. Their results are not stored.
    # For columns, a remainder keeps neighbours together, so that one load takes several elements; a minimum would not.
    row_M = sample.to(tl.int64) * L + tl.minimum(local_M, L - 1)
    a_ptrs = a_ptr + row_M[:, None] * (HALVES * K * F) + k_K[None, :]
    weight_ptrs = weight_ptr + (n_N % N).to(tl.int64)[None, :] * stride_n
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # These are counted, because divisions would be a third of the loop's instructions.
    f = 0
    slot = first_slot
    half = 0
    for _ in range(0, HALVES * num_slots * tl.cdiv(F, BLOCK_K)):
        unit_K = half * (E * F) + select_expert(indices_ptr, experts_S, slot, SLOTS) * F + f + k_K
        column = (half * K + slot) * F + f
        if EVEN_F:
            a_MK = tl.load(a_ptrs + column)
            weight_KN = tl.load(weight_ptrs + unit_K.to(tl.int64)[:, None] * stride_k)
        else:
            a_MK = tl.load(a_ptrs + column, mask=k_K[None, :] < F - f, other=0.0)
            weight_KN = tl.load(
                weight_ptrs + unit_K.to(tl.int64)[:, None] * stride_k, mask=k_K[:, None] < F - f, other=0.0
            )
        y_MN = tl.dot(a_MK, weight_KN, y_MN, input_precision=PRECISION)
        f += BLOCK_K
        if f >= F:
            f = 0
            slot += 1
        if slot == first_slot + num_slots:
            slot = first_slot
            half += 1

    y_MN = add_bias(y_MN, bias_ptr, weights_ptr, indices_ptr, sample, n_N, N, K, E, BIAS_PER_EXPERT)
    y_ptrs = y_ptr + (output.to(tl.int64) * L + local_M)[:, None] * N + n_N[None, :]
    tl.store(y_ptrs, y_MN.to(y_ptr.dtype.element_ty), mask=(local_M < L)[:, None] & (n_N < N)[None, :])


@triton.jit
def expert_sum_descriptor_kernel(
    a_desc, weight_desc, bias_ptr, weights_ptr, indices_ptr, y_desc, B, L, N, F, K, E,
    HALVES: tl.constexpr, SLOT_OUTPUTS: tl.constexpr, BIAS_PER_EXPERT: tl.constexpr, SLOTS: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`expert_sum_kernel` with tensor descriptors, for 16-bit storage. BLOCK_K divides F.

    a_desc is (B, L, halves·KF), weight_desc (halves·H, N) if UNITS_FIRST and else (N, H), and y_desc (outputs, L, N).
    """
    tiles_m = tl.cdiv(L, BLOCK_M)
    outputs = B * K if SLOT_OUTPUTS else B
    tile_m, tile_n = tile_of_program(outputs * tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    output = tile_m // tiles_m
    sample = output // K if SLOT_OUTPUTS else output
    first_slot = output % K if SLOT_OUTPUTS else 0
    num_slots = 1 if SLOT_OUTPUTS else K
    row = (tile_m % tiles_m) * BLOCK_M
    n = tile_n * BLOCK_N
    experts_S = experts_of_sample(indices_ptr, sample, K, E, SLOTS)
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    f = 0
    slot = first_slot
    half = 0
    for _ in range(0, HALVES * num_slots * (F // BLOCK_K)):
        unit = half * (E * F) + select_expert(indices_ptr, experts_S, slot, SLOTS) * F + f
        a_MK = a_desc.load([sample, row, (half * K + slot) * F + f]).reshape(BLOCK_M, BLOCK_K)
        weight_KN = weight_desc.load([unit, n]) if UNITS_FIRST else weight_desc.load([n, unit]).T
        y_MN = tl.dot(a_MK, weight_KN, y_MN)
        f += BLOCK_K
        if f >= F:
            f = 0
            slot += 1
        if slot == first_slot + num_slots:
            slot = first_slot
            half += 1
    y_MN = add_bias(
        y_MN, bias_ptr, weights_ptr, indices_ptr, sample, n + tl.arange(0, BLOCK_N), N, K, E, BIAS_PER_EXPERT
    )
    y_desc.store([output, row, n], y_MN.to(y_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))


class ExpertSumOperands(NamedTuple):
    """The operands of such a product.

    Attributes:
        a: (B, L, halves·K·F) compute dtype.
        weight: w_out (N, H), or w_in (2H, N).
        weight_has_units_first: whether hidden units are the first dimension of weight, as in w_in.
        bias: (N,) or (E, N), or ``None``.
        num_experts: E.
    """

    a: Tensor
    weight: Tensor
    weight_has_units_first: bool
    bias: Tensor | None
    num_experts: int


def launch_expert_sum(
    summands: ExpertSumOperands, routing: Routing, y: Tensor, tile: TileConfig, precision: str
) -> Launch:
    """Launches the product that writes y (B, L, N), or (B, K, L, N) with an output for each slot."""
    a, weight, units_first, bias, E = summands
    B, K = routing.weights.shape
    *_, L, N = y.shape
    hidden = weight.shape[0 if units_first else 1]
    halves = 2 if units_first else 1
    F = hidden // (halves * E)
    slot_outputs = y.dim() == 4
    block_m = min(tile.block_m, max(16, next_power_of_2(L)))
    # The depth of a step should divide F, because masked steps load numbers that they do not use.
    divisor = min(F & -F, tile.block_k)
    block_k = divisor if divisor >= 16 else tile.block_k
    constants = {
        "HALVES": halves,
        "SLOT_OUTPUTS": slot_outputs,
        "BIAS_PER_EXPERT": bias is not None and bias.dim() == 2,
        "SLOTS": next_power_of_2(K),
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tile.group_m,
    }
    programs = B * (K if slot_outputs else 1) * ceil_div(L, block_m) * ceil_div(N, tile.block_n)
    sizes = (B, L, N, F, K, E)
    if tile.descriptors and F % block_k == 0 and all(fits_tensor_descriptor(t) for t in (a, weight, y)):
        weight_block = (block_k, tile.block_n) if units_first else (tile.block_n, block_k)
        arguments = (
            make_descriptor(a, (1, block_m, block_k)),
            make_descriptor(weight, weight_block),
            bias,
            *routing,
            make_descriptor(y.flatten(0, -3), (1, block_m, tile.block_n)),
            *sizes,
        )
        constants["UNITS_FIRST"] = units_first
        kernel = expert_sum_descriptor_kernel
    else:
        constants |= {"EVEN_F": F % block_k == 0, "PRECISION": precision}
        strides = weight.stride() if units_first else weight.stride()[::-1]
        arguments = (a, weight, bias, *routing, y, *sizes, *strides)
        kernel = expert_sum_kernel
    product = "expert_in_backward" if units_first else "expert_sum"
    return Launch(kernel, programs, arguments, constants, tile.num_warps, tile.num_stages, product_name=product)
