"""How long a compiled kernel takes on a GPU that is not here: a model, whose results are predictions.

A product is a grid of programs, shared evenly among the multiprocessors. Of one program the model knows, in cycles,

    loop      the longest of: tensor cores at the rate that the best library reaches, bytes from the L2 cache, issued
              instructions, and reads of shared memory where the product takes its operands through registers;
    fill      until the first operands are there;
    epilogue  issued instructions between the main loop and the exit.

A multiprocessor with n programs, P of them at a time, is busy for the longest of ``fill + n · loop + epilogue`` (loops
follow one another, and epilogues hide behind other programs' loops) and ``n · (fill + loop + epilogue) / P`` (too few
programs to hide them). Memory is the other bound; the two overlap all but where they are equal: ``(t⁴ + m⁴)^¼``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.ahead_of_time import CHIPS, Compiled, programs_per_processor
from benchmarks.sass import Instruction

_SCHEDULERS = 4
# Dependent instructions and bank conflicts keep schedulers from one instruction in each cycle. An estimate.
_ISSUE_SHARE = 0.8
_SHARED_BYTES_PER_CYCLE = 128
# What one multiprocessor takes from the L2 cache at most, however few ask for it.
_L2_BYTES_PER_CYCLE = 64
# Until a first load from the L2 cache or from memory arrives. An estimate.
_LATENCY_CYCLES = 800
_SHARPNESS = 4


class Rates(NamedTuple):
    """What a GPU reaches, not what its data sheet promises.

    Attributes:
        name: of the GPU.
        arch: of its multiprocessors.
        processors: multiprocessors.
        ghz: clock under load.
        tflops: of the best library's large bfloat16 products.
        l2_tbs: TB/s from the L2 cache to all multiprocessors.
        memory_tbs: TB/s from memory.
        norm_tbs: TB/s of a LayerNorm, which reads and writes once.
        l2_mb: size of the L2 cache.
        edge_us: between two kernels of a CUDA graph, of which the second waits for the first.
        cluster: programs of the library that share one of their operands by multicast.
    """

    name: str
    arch: str
    processors: int
    ghz: float
    tflops: float
    l2_tbs: float
    memory_tbs: float
    norm_tbs: float
    l2_mb: float
    edge_us: float
    cluster: int

    @property
    def flop_per_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.tflops * 1e3 / self.processors / self.ghz

    def l2_bytes_per_cycle(self, programs: int) -> float:
        """Of one multiprocessor, where a grid keeps no more of them busy than it has programs."""
        busy = min(programs, self.processors)
        return min(_L2_BYTES_PER_CYCLE, self.l2_tbs * 1e3 / busy / self.ghz)

    def microseconds(self, cycles: float) -> float:
        return cycles / self.ghz / 1e3


# H100 SXM5: 132 multiprocessors, 989 TFLOP/s dense. Rates: estimates from what libraries are known to reach.
H100 = Rates("H100 SXM", "sm_90", 132, 1.755, 790, 9.5, 3.0, 2.6, 50, 1.2, cluster=2)
# A100 SXM4 80 GB: 108 multiprocessors, 312 TFLOP/s dense, 2.0 TB/s. Reached: 83 % of the products' peak and 85 % of the
# memory's are estimates; so is the L2 cache's rate, three quarters of 5120 bytes a cycle (NVIDIA A100 whitepaper).
A100 = Rates("A100 SXM 80GB", "sm_80", 108, 1.41, 260, 5.4, 1.7, 1.5, 40, 1.3, cluster=1)
GPUS = {rates.arch: rates for rates in (H100, A100)}


class Program(NamedTuple):
    """One program of a product.

    Attributes:
        flops: a multiply-add counts as two.
        bytes: that it loads into shared memory, from the L2 cache or from memory.
        issue_cycles: to issue its main loop.
        shared_cycles: to read its operands from shared memory into registers.
        latency_cycles: that its main loop takes at least, with the stages in flight that it has.
        epilogue_cycles: to issue what follows the main loop.
        resident: programs on a multiprocessor at once.
    """

    flops: float
    bytes: float
    issue_cycles: float = 0
    shared_cycles: float = 0
    latency_cycles: float = 0
    epilogue_cycles: float = 0
    resident: int = 1


def program_of(compiled: Compiled, arch: str, depth: int) -> Program:
    """A program of a compiled product, from its block sizes and its code.

    Args:
        compiled: with its code listed.
        arch: that it was compiled for.
        depth: of the product: D for the first one, K·F for the second one.
    """
    launch, code = compiled.launch, compiled.code
    block_m, block_n, block_k = (launch.constants[f"BLOCK_{name}"] for name in "MNK")
    columns = 2 * block_n if launch.kernel.__name__.startswith("expert_in") else block_n
    steps = math.ceil(depth / block_k)
    per_issue = launch.num_warps / _SCHEDULERS / _ISSUE_SHARE
    bytes_per_step = (block_m + columns) * block_k * _element_size(launch.arguments[0])
    return Program(
        flops=2 * block_m * columns * steps * block_k,
        bytes=steps * bytes_per_step,
        issue_cycles=steps * len(code.main_loop) * per_issue,
        shared_cycles=steps * _shared_bytes(code.main_loop, launch.num_warps, bytes_per_step) / _SHARED_BYTES_PER_CYCLE,
        latency_cycles=steps * _LATENCY_CYCLES / max(launch.num_stages - 1, 1),
        epilogue_cycles=len(code.epilogue) * per_issue,
        resident=max(programs_per_processor(compiled, CHIPS[arch]), 1),
    )


def grid_microseconds(program: Program, programs: int, rates: Rates) -> float:
    """Of a grid of equal programs on a GPU, without what memory costs and without the launch."""
    busiest = math.ceil(programs / rates.processors)
    resident = min(program.resident, busiest)
    shared = max(
        program.flops / rates.flop_per_cycle,
        program.bytes / rates.l2_bytes_per_cycle(programs),
        program.issue_cycles,
        program.shared_cycles,
    )
    alone = max(shared, program.latency_cycles)
    throughput = _LATENCY_CYCLES + busiest * shared + program.epilogue_cycles
    latency = busiest / resident * (_LATENCY_CYCLES + alone + program.epilogue_cycles)
    issue = busiest * (program.issue_cycles + program.epilogue_cycles)
    return rates.microseconds(max(throughput, latency, issue))


def overlapped(first: float, second: float) -> float:
    """The time of two things that go on at once, and hinder each other where they take equally long."""
    return (first**_SHARPNESS + second**_SHARPNESS) ** (1 / _SHARPNESS)


def _shared_bytes(loop: Sequence[Instruction], num_warps: int, bytes_per_step: int) -> int:
    """That go in and out of shared memory in one step; 0 where tensor cores read it by themselves."""
    # LDSM.16.M88.4: four 8×8 matrices of 16 bits.
    matrices = sum(int(i.name.rpartition(".")[2]) for i in loop if i.base == "LDSM")
    return 128 * matrices * num_warps + bytes_per_step if matrices else 0


def _element_size(operand: Tensor | TensorDescriptor) -> int:
    return (operand.base if isinstance(operand, TensorDescriptor) else operand).element_size()
