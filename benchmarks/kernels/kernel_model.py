"""A model of the time of kernels on a GPU that need not be here. Its results are labelled as predictions.

A product is a grid of programs, shared evenly among the multiprocessors. Of one program the model knows, in cycles,

    loop      the longest of: tensor cores at the rate that the best library reaches, bytes from the L2 cache, issued
              instructions, and traffic of shared memory where the product takes its operands through registers;
    fill      until the first operands are there;
    epilogue  issued instructions between the main loop and the exit.

A multiprocessor with n programs, P of them at a time, is busy for the longest of ``fill + n · loop + epilogue`` (loops
follow one another, and epilogues hide behind other programs' loops), ``n · (fill + loop + epilogue) / P`` (too few
programs to hide them) and all that is issued. Memory is the other bound: every operand is read once and every result
written once, but for results that the kernel before has left in the L2 cache. Two bounds of equal length hinder each
other: ``(t⁴ + m⁴)^¼``. A library's product is the best of its tiles in the same model.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.kernels.ahead_of_time import CHIPS, CompiledLaunch, programs_per_processor
from benchmarks.kernels.kernel_calls import tile_block_of
from benchmarks.kernels.sass import Instruction
from mtu_kernels.triton.tiles import PAIR_PRODUCTS

_SCHEDULERS = 4
# Dependent instructions and conflicts keep schedulers from issuing in each cycle. An estimate.
_ISSUE_SHARE = 0.8
_SHARED_BYTES_PER_CYCLE = 128
# One multiprocessor takes no more from the L2 cache, however few others read from it.
_L2_BYTES_PER_CYCLE = 64
# An estimate of the time until a first load from the L2 cache or from memory arrives.
LATENCY_CYCLES = 800
_SHARPNESS = 4
# A library's epilogue: a conversion, and a share of a store, for each element of a thread.
_LIBRARY_EPILOGUE = 1.5


class GPURates(NamedTuple):
    """The rates that a GPU reaches, which are below those of its data sheet.

    Attributes:
        name: of the GPU.
        arch: of its multiprocessors.
        num_processors: multiprocessors.
        ghz: clock under load.
        tflops: of the best library's large bfloat16 products.
        l2_tbs: TB/s from the L2 cache to all multiprocessors.
        memory_tbs: TB/s from memory.
        norm_tbs: TB/s of kernels that read and write once, such as LayerNorm.
        l2_mb: size of the L2 cache.
        edge_us: between two kernels of a CUDA graph, of which the second waits for the first.
        cluster: programs of the library that share one of their operands by multicast.
        library_tiles: rows, columns and resident programs of the library's tiles.
    """

    name: str
    arch: str
    num_processors: int
    ghz: float
    tflops: float
    l2_tbs: float
    memory_tbs: float
    norm_tbs: float
    l2_mb: float
    edge_us: float
    cluster: int
    library_tiles: tuple[tuple[int, int, int], ...]

    @property
    def flop_per_cycle(self) -> float:
        """The rate of one multiprocessor."""
        return self.tflops * 1e3 / self.num_processors / self.ghz

    def l2_bytes_per_cycle(self, programs: int) -> float:
        """The rate of one multiprocessor; a grid keeps no more of them busy than it has programs."""
        busy = min(programs, self.num_processors)
        return min(_L2_BYTES_PER_CYCLE, self.l2_tbs * 1e3 / busy / self.ghz)

    def microseconds(self, cycles: float) -> float:
        return cycles / self.ghz / 1e3

    def bytes_missing_in_l2(self, size: float) -> float:
        """The bytes, of so many that the kernel before has written, that are not in the L2 cache any more.

        Half of the cache counts: each of its two halves keeps the reads of its own multiprocessors.
        """
        return max(0.0, size - self.l2_mb * 1e6 / 2)


# H100 SXM5: 132 multiprocessors, 989 TFLOP/s dense. Rates are estimates from known results of libraries. Its
# library has tiles of any multiple of 32 columns, and hides epilogues behind other tiles' loops.
H100 = GPURates(
    "H100 SXM", "sm_90", 132, 1.755, 790, 9.5, 3.0, 2.6, 50, 1.2, cluster=2,
    library_tiles=tuple((M, N, 2) for M in (64, 128, 192, 256) for N in range(32, 257, 32) if M * N <= 128 * 256),
)  # fmt: skip
# A100 SXM4 80 GB: 108 multiprocessors, 312 TFLOP/s dense, 2.0 TB/s. Reached: 83 % of the products' peak and 85 % of the
# memory's are estimates; so is the L2 cache's rate, three quarters of 5120 bytes a cycle (NVIDIA A100 whitepaper).
A100 = GPURates(
    "A100 SXM 80GB", "sm_80", 108, 1.41, 260, 5.4, 1.7, 1.5, 40, 1.3, cluster=1,
    library_tiles=((256, 128, 1), (128, 256, 1), (128, 128, 2), (256, 64, 2), (64, 256, 2), (128, 64, 3), (64, 128, 3),
           (64, 64, 4)),
)  # fmt: skip
GPUS = {rates.arch: rates for rates in (H100, A100)}


class ProgramCost(NamedTuple):
    """One program of a product.

    Attributes:
        flops: a multiply-add counts as two.
        bytes: that it loads into shared memory, from the L2 cache or from memory.
        issue_cycles: to issue its main loop.
        shared_cycles: of shared memory's traffic.
        latency_cycles: that its main loop takes at least, with the stages in flight that it has.
        epilogue_cycles: to issue the instructions after the main loop.
        resident_programs: programs on a multiprocessor at once.
    """

    flops: float
    bytes: float
    issue_cycles: float = 0.0
    shared_cycles: float = 0.0
    latency_cycles: float = 0.0
    epilogue_cycles: float = 0.0
    resident_programs: int = 1

    @property
    def l2_bytes_per_flop(self) -> float:
        return self.bytes / self.flops

    def loop_cycles(self, programs: int, rates: GPURates) -> dict[str, float]:
        """The cycles that its main loop takes of each part of a multiprocessor that programs share."""
        return {
            "tensor": self.flops / rates.flop_per_cycle,
            "l2": self.bytes / rates.l2_bytes_per_cycle(programs),
            "issue": self.issue_cycles,
            "shared": self.shared_cycles,
        }


class CompiledTile(NamedTuple):
    """The figures of a compiled product with 16-bit operands that the model uses.

    Attributes:
        rows: of the tile.
        columns: of the tile, both of a value-gate pair.
        step: depth of one step of the main loop.
        num_warps: warps.
        num_stages: tiles in flight.
        loop: instructions of the main loop.
        epilogue: instructions after it.
        resident_programs: programs on a multiprocessor at once.
        shared_bytes: that go in and out of shared memory in a step, where operands pass through registers.
    """

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int
    loop: int
    epilogue: int
    resident_programs: int
    shared_bytes: int = 0

    def make_program(self, depth: int) -> ProgramCost:
        """A program of a product of this depth: D for the first one, K·F for the second one."""
        steps = math.ceil(depth / self.step)
        per_issue = self.num_warps / _SCHEDULERS / _ISSUE_SHARE
        return ProgramCost(
            flops=2 * self.rows * self.columns * steps * self.step,
            bytes=2 * (self.rows + self.columns) * steps * self.step,
            issue_cycles=steps * self.loop * per_issue,
            shared_cycles=steps * self.shared_bytes / _SHARED_BYTES_PER_CYCLE,
            latency_cycles=steps * LATENCY_CYCLES / max(self.num_stages - 1, 1),
            epilogue_cycles=self.epilogue * per_issue,
            resident_programs=self.resident_programs,
        )


def read_tile(compiled: CompiledLaunch, arch: str) -> CompiledTile:
    """The figures of a compiled product, from its block sizes and its listed code."""
    launch, code = compiled.launch, compiled.require_code()
    rows, columns, step = tile_block_of(launch)
    columns *= 2 if launch.product_name in PAIR_PRODUCTS else 1
    return CompiledTile(
        rows, columns, step, launch.num_warps, launch.num_stages,
        loop=len(code.main_loop),
        epilogue=len(code.epilogue),
        resident_programs=max(programs_per_processor(compiled, CHIPS[arch]), 1),
        shared_bytes=_shared_bytes(code.main_loop, launch.num_warps, 2 * (rows + columns) * step),
    )  # fmt: skip


def predict_grid_us(program: ProgramCost, programs: int, rates: GPURates) -> float:
    """The time of a grid of equal programs, without the bound of memory and without the launch."""
    busiest = math.ceil(programs / rates.num_processors)
    resident = min(program.resident_programs, busiest)
    loop = max(program.loop_cycles(programs, rates).values())
    throughput = LATENCY_CYCLES + busiest * loop + program.epilogue_cycles
    alone = LATENCY_CYCLES + max(loop, program.latency_cycles) + program.epilogue_cycles
    issued = busiest * (program.issue_cycles + program.epilogue_cycles)
    return rates.microseconds(max(throughput, busiest / resident * alone, issued))


def predict_product_us(program: ProgramCost, programs: int, memory_bytes: float, rates: GPURates) -> float:
    """The time of a product in a CUDA graph, its launch included."""
    return (
        overlapped_time(predict_grid_us(program, programs, rates), memory_bytes / rates.memory_tbs / 1e6)
        + rates.edge_us
    )


def predict_library_us(M: int, N: int, K: int, memory_bytes: float, rates: GPURates) -> float:
    """The time of a library's product (M, K) · (K, N) in 16 bits, by the best of its tiles and numbers of parts."""
    return min(_library_ways(M, N, K, memory_bytes, rates))


def predict_pass_us(memory_bytes: float, rates: GPURates) -> float:
    """The time of a kernel that reads and writes once, such as LayerNorm or GEGLU."""
    return memory_bytes / rates.norm_tbs / 1e6 + rates.microseconds(LATENCY_CYCLES) + rates.edge_us


def overlapped_time(first: float, second: float) -> float:
    """The time of two processes at once, which hinder each other where they take equally long."""
    return (first**_SHARPNESS + second**_SHARPNESS) ** (1 / _SHARPNESS)


def _library_ways(M: int, N: int, K: int, memory_bytes: float, rates: GPURates) -> Iterator[float]:
    for (rows, columns, resident), parts in itertools.product(rates.library_tiles, (1, 2, 4, 8)):
        depth = K / parts
        # Of a cluster's programs, each loads its share of the operand that they have in common.
        loaded = min(rows / rates.cluster + columns, rows + columns / rates.cluster)
        epilogue = _LIBRARY_EPILOGUE * rows * columns / 32 / _SCHEDULERS / _ISSUE_SHARE
        program = ProgramCost(
            2 * rows * columns * depth, 2 * loaded * depth, epilogue_cycles=epilogue, resident_programs=resident
        )
        programs = math.ceil(M / rows) * math.ceil(N / columns) * parts
        # Parts leave sums in float32, which one more kernel adds.
        sums = 0.0 if parts == 1 else 8 * parts * M * N / rates.l2_tbs / 1e6 + rates.edge_us
        yield predict_product_us(program, programs, memory_bytes, rates) + sums


def _shared_bytes(loop: Sequence[Instruction], num_warps: int, bytes_per_step: int) -> int:
    """Bytes in and out of shared memory in one step; 0 where tensor cores read it by themselves."""
    # LDSM.16.M88.4: four 8×8 matrices of 16 bits.
    matrices = sum(int(i.name.rpartition(".")[2]) for i in loop if i.name_without_modifiers == "LDSM")
    return 128 * matrices * num_warps + bytes_per_step if matrices else 0
