"""What compiled kernels let one expect on an H100 (or H200), before any is measured. A prediction, and labelled so."""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.ahead_of_time import CHIPS, Compiled, programs_per_processor
from benchmarks.kernel_calls import Call

# H100 SXM: 132 multiprocessors; 989.4 TFLOP/s of dense bfloat16 are 4096 FLOP a cycle on each at 1.83 GHz.
ARCH = "sm_90"
PROCESSORS = 132
FLOP_PER_CYCLE = 4096
GHZ = 1.83
# Four schedulers issue one instruction of a warp each in a cycle.
ISSUES_PER_CYCLE = 4


class Prediction(NamedTuple):
    """The time that a product cannot beat, and why.

    Attributes:
        programs: tiles of the grid.
        waves: programs over the places that all multiprocessors have for them.
        quantisation: of the multiprocessor with the most programs, the share of its time that the average one works.
        tensor_cycles: of one program, on tensor cores at their peak.
        bytes_per_tensor_cycle: that one program reads, from the L2 cache or from memory, while they are at their peak.
        loop_cycles: of one program, to issue its main loop.
        epilogue_cycles: of one program, to issue what follows the main loop.
        floor_us: if programs on one multiprocessor overlap perfectly, and memory costs nothing.
    """

    programs: int
    waves: float
    quantisation: float
    tensor_cycles: float
    bytes_per_tensor_cycle: float
    loop_cycles: float
    epilogue_cycles: float
    floor_us: float

    def cells(self) -> dict[str, str]:
        return {
            name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in self._asdict().items()
        }


def predict(call: Call, compiled: Compiled) -> Prediction:
    """For a product of the forward pass: expert_in or expert_sum, in 16 bits, at a shape."""
    launch, code, shape = compiled.launch, compiled.code, call.shape
    block = {name: launch.constants[f"BLOCK_{name}"] for name in "MNK"}
    first = launch.kernel.__name__.startswith("expert_in")
    depth = shape.D if first else shape.active_hidden
    columns = 2 * block["N"] if first else block["N"]
    steps = math.ceil(depth / block["K"])
    per_issue = launch.num_warps / ISSUES_PER_CYCLE
    tensor_cycles = 2 * block["M"] * columns * depth / FLOP_PER_CYCLE
    loop_cycles = steps * len(code.main_loop) * per_issue
    epilogue_cycles = len(code.epilogue) * per_issue
    busiest = math.ceil(launch.programs / PROCESSORS)
    cycles = busiest * max(tensor_cycles, loop_cycles + epilogue_cycles)
    return Prediction(
        programs=launch.programs,
        waves=launch.programs / (PROCESSORS * programs_per_processor(compiled, CHIPS[ARCH])),
        quantisation=launch.programs / (busiest * PROCESSORS),
        tensor_cycles=tensor_cycles,
        bytes_per_tensor_cycle=2 * (block["M"] + columns) * depth / tensor_cycles,
        loop_cycles=loop_cycles,
        epilogue_cycles=epilogue_cycles,
        floor_us=cycles / GHZ / 1e3,
    )
