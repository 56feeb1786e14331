"""The first product for dense routing on sm_90, in persistent programs with specialised warps.

One warp loads tiles of x̂ and W_in into a ring of stages. Two groups of four warps multiply different tiles: while one
group uses the tensor cores, the other applies GEGLU to its previous tile and stores it. Each program computes many
tiles, so that only its first loads are waited for. The kernel is written in Gluon, where layouts, barriers and warps
are explicit.

No GPU has run this kernel yet, and no row of the table uses it. `python -m benchmarks.kernels.tune --persistent` checks
it against the reference and measures it beside the others.
"""

# Gluon computes with constants as with numbers, but declares fewer operators for them, and no calls of its functions.
# pyright: reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from mtu_kernels.arguments import ExpertWeights
from mtu_kernels.routing import Routing
from mtu_kernels.triton.kernels import activation
from mtu_kernels.triton.launch import Launch, ceil_div
from mtu_kernels.triton.tiles import TileConfig

normal_cdf = gluon.jit(activation.normal_cdf.fn)

# The multiprocessors of an H100, for launches that are compiled and not run.
_PROCESSORS = 132


@gluon.jit
def expert_in_persistent_kernel(
    x_hat_desc, w_in_desc, b_in_ptr, weights_ptr, h_desc, rows, L, D, F, E, OVERLAP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """x_hat_desc is (rows, D), w_in_desc (2, H, D), h_desc (rows, H). BLOCK_N divides F. Rows are those of all samples.

    A stage's barrier `ready` completes when its tiles have arrived, and `free` when they have been multiplied.
    """
    x_hat = gl.allocate_shared_memory(x_hat_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_hat_desc.layout)
    w_in = gl.allocate_shared_memory(w_in_desc.dtype, [STAGES, 2, BLOCK_N, BLOCK_K], w_in_desc.layout)
    h_even = gl.allocate_shared_memory(h_desc.dtype, h_desc.block_type.shape, h_desc.layout)
    h_odd = gl.allocate_shared_memory(h_desc.dtype, h_desc.block_type.shape, h_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):  # type: ignore[misc]
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    # The second group has 4 warps with 216 registers per thread. The loading warp needs few.
    gl.warp_specialize(
        [
            (_multiply, (
                x_hat, w_in, h_even, ready, free, b_in_ptr, weights_ptr, h_desc, rows, L, D, F, E,
                0, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            )),
            (_multiply, (
                x_hat, w_in, h_odd, ready, free, b_in_ptr, weights_ptr, h_desc, rows, L, D, F, E,
                1, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            )),
            (_fetch, (
                x_hat_desc, w_in_desc, x_hat, w_in, ready, free, rows, D, F, E,
                OVERLAP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            )),
        ],
        [4, 1],
        [216, 24],
    )  # fmt: skip


@gluon.jit
def _fetch(
    x_hat_desc, w_in_desc, x_hat, w_in, ready, free, rows, D, F, E, OVERLAP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Loads all tiles of this program, one step after the other, as stages become free."""
    tiles_m = gl.cdiv(rows, BLOCK_M)
    tiles_n = E * F // BLOCK_N
    if OVERLAP:
        gdc_wait()
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _rows_and_columns(tile, tiles_m, tiles_n, GROUP_M)
        for k in range(0, D, BLOCK_K):
            stage = step % STAGES
            # A new barrier counts as having completed a phase, so all stages are free at first.
            mbarrier.wait(free.index(stage), (step // STAGES + 1) & 1)
            barrier = ready.index(stage)
            mbarrier.expect(barrier, x_hat_desc.block_type.nbytes + w_in_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_hat_desc, [tile_m * BLOCK_M, k], barrier, x_hat.index(stage))
            tma.async_copy_global_to_shared(w_in_desc, [0, tile_n * BLOCK_N, k], barrier, w_in.index(stage))
            step += 1


@gluon.jit
def _multiply(
    x_hat, w_in, h_tile, ready, free, b_in_ptr, weights_ptr, h_desc, rows, L, D, F, E, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Computes every other tile of this program: the even ones in GROUP 0, the odd ones in GROUP 1."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(  # type: ignore[assignment]
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * BLOCK_N, 16]
    )
    tiles_m = gl.cdiv(rows, BLOCK_M)
    tiles_n = E * F // BLOCK_N
    steps = gl.cdiv(D, BLOCK_K)
    step = GROUP * steps
    first = gl.program_id(0) + GROUP * gl.num_programs(0)
    for tile in range(first, tiles_m * tiles_n, 2 * gl.num_programs(0)):
        tile_m, tile_n = _rows_and_columns(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        pair_P = gl.arange(0, 2 * BLOCK_N, layout=gl.SliceLayout(0, layout))
        bias_P = gl.load(b_in_ptr + column + (pair_P // BLOCK_N) * (E * F) + pair_P % BLOCK_N).to(gl.float32)
        z_MP = gl.zeros((BLOCK_M, 2 * BLOCK_N), gl.float32, layout=layout) + gl.expand_dims(bias_P, 0)
        z = warpgroup_mma_init(z_MP)
        for k in range(0, steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            w_in_KP = w_in.index(stage).reshape([2 * BLOCK_N, BLOCK_K]).permute((1, 0))
            z = warpgroup_mma(x_hat.index(stage), w_in_KP, z, is_async=True)
            # One product may still be running. The previous one has ended, so its stage is free.
            z = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(z,)))
            if k > 0:
                mbarrier.arrive(free.index((step - 1) % STAGES), count=1)
            step += 1
        z_MP = warpgroup_mma_wait(0, deps=(z,))
        mbarrier.arrive(free.index((step - 1) % STAGES), count=1)
        # The next tile in the ring belongs to the other group.
        step += steps
        u_MN, g_MN = gl.split(gl.permute(gl.reshape(z_MP, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        row_M = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, u_MN.type.layout))
        w_M = gl.load(weights_ptr + (gl.minimum(row_M, rows - 1) // L) * E + column // F).to(gl.float32)
        h_MN = u_MN * (g_MN * normal_cdf(g_MN, False)) * gl.expand_dims(w_M, 1)
        # Waits until the previous tile has left shared memory.
        tma.store_wait(0)
        h_tile.store(h_MN.to(h_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(h_desc, [row, column], h_tile)
    tma.store_wait(0)


@gluon.jit
def _rows_and_columns(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """The row tile and column tile of a tile, in the order of `expert_in.tile_of_program`."""
    group = tile // (GROUP_M * tiles_n)
    size = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + within % size, within // size


def launch_expert_in_persistent(
    x_hat: Tensor, experts: ExpertWeights, routing: Routing, h: Tensor, tile: TileConfig, *, overlap: bool
) -> Launch:
    """Launches the kernel from x̂ (B, L, D) to h (B, L, H). All are describable, and the tile's columns divide F."""
    B, L, D = x_hat.shape
    E = experts.num_experts
    H = h.shape[2]
    arguments = (
        _describe(x_hat.view(B * L, D), [tile.block_m, tile.block_k]),
        _describe(experts.w_in.view(2, H, D), [2, tile.block_n, tile.block_k]),
        experts.b_in,
        routing.weights,
        _describe(h.view(B * L, H), [tile.block_m, tile.block_n]),
        *(B * L, L, D, H // E, E),
    )
    constants = {
        "OVERLAP": overlap,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "GROUP_M": tile.group_m,
    }
    programs = min(ceil_div(B * L, tile.block_m) * (H // tile.block_n), _processors(x_hat.device))
    return Launch(
        expert_in_persistent_kernel, programs, arguments, constants, tile.num_warps, tile.num_stages, overlap,
        product_name="expert_in",
    )  # fmt: skip


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _PROCESSORS
