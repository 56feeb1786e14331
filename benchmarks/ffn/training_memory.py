"""`python -m benchmarks.ffn.training_memory`: the bytes that training holds, beside the stock feed-forward.

No GPU is needed. The bytes that are asked of the allocator depend neither on the device nor on values, so the backend
"triton" is counted as it runs on an architecture, with its tiles, but without its kernels. (torch's CPU sum widens ∂y
to float32 first, which its CUDA sum does not: on a GPU the peaks are lower by B·L·D·4 bytes at the most.)
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.ffn.inputs import EPS, Inputs, draw_routed_inputs, draw_shared_inputs
from benchmarks.ffn.peers import stock_ffn, to_stock_inputs
from benchmarks.harness.arguments import SHAPE_SETS
from benchmarks.harness.commands import make_parser, parse_arguments
from benchmarks.harness.memory import measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.provenance import RESULTS, collect_provenance
from benchmarks.harness.rows import write_cells
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels.triton import operators
from mtu_kernels.triton.launch import LaunchDevice

_MODULE = "benchmarks.ffn.training_memory"
_CPU = torch.device("cpu")


class TrainingStepBytes(NamedTuple):
    """Bytes of one training step of one feed-forward, forward and backward, results included, parameters not."""

    stock_saved: int
    stock_peak: int
    saved: int
    peak: int
    recomputed_peak: int

    @property
    def ratios(self) -> dict[str, float]:
        """Saved for the backward pass, peak, and peak with ``recompute=True``, over those of the stock code."""
        return {
            "saved": self.saved / self.stock_saved,
            "peak": self.peak / self.stock_peak,
            "recomputed_peak": self.recomputed_peak / self.stock_peak,
        }


def count_step_bytes(workload: Workload, setting: Setting, arch: str) -> TrainingStepBytes:
    """The memory of the backend "triton" with the tiles of an architecture, and of the stock feed-forward."""
    inputs = draw_routed_inputs(draw_shared_inputs(workload, _CPU, seed=0), setting, seed=1)
    stock = to_stock_inputs(inputs)
    make = functools.partial(build_operator_call, inputs, LaunchDevice(arch, run_launch=lambda launch: None))
    with torch.no_grad():
        saved = sum(tensor.nbytes for tensor in operators.run_training_forward(make(), EPS)[1:])
        peaks = [
            measure_peak_bytes(functools.partial(run_training_step, make, inputs, again), _CPU)
            for again in (False, True)
        ]
    return TrainingStepBytes(
        measure_saved_bytes(lambda: stock_ffn(*stock.moe_ffn_arguments), stock.named_tensors.values()),
        measure_peak_bytes(
            lambda: torch.autograd.grad(stock_ffn(*stock.moe_ffn_arguments), stock.leaf_tensors, stock.grad_y), _CPU
        ),
        saved,
        *peaks,
    )


def build_operator_call(inputs: Inputs, machine: LaunchDevice) -> operators.OperatorCall:
    """The backend's own description of a call, for a machine that may stand for a GPU."""
    tensors = (inputs.x, *inputs.norm, *inputs.experts[:4], *inputs.routing)
    return operators.build_call(machine, tensors, inputs.experts.num_experts)


def run_training_step(
    make: Callable[[], operators.OperatorCall], inputs: Inputs, recompute: bool = False
) -> tuple[Any, ...]:
    """The operators of a forward and a backward pass. `recompute`: the backward pass computes hidden units again."""
    if recompute:
        y, saved = operators.run_inference(make(), EPS), None
    else:
        y, *saved = operators.run_training_forward(make(), EPS)
    return y, operators.compute_gradients(make(), inputs.grad_y, saved, EPS, True)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `results/training_memory.csv`."""
    parser = make_parser(_MODULE, "The bytes that training holds, beside the stock feed-forward.")
    parser.add_argument("--arch", default="sm_90", help="whose tiles (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_memory.csv")
    argv, options = parse_arguments(parser, argv)
    rows = []
    for D, L in tqdm(SHAPE_SETS["sd15"] + SHAPE_SETS["sdxl"], unit="shape"):
        workload = Workload(D, L, 2, "bf16", "forward+backward")
        memory = count_step_bytes(workload, Setting(E=4), options.arch)
        ratios = {f"{name}_ratio": f"{ratio:.4f}" for name, ratio in memory.ratios.items()}
        place = {"arch": options.arch, "D": D, "L": L, "B": workload.B, "E": 4, "dtype": workload.dtype}
        rows.append(place | memory._asdict() | ratios)
    write_cells(options.output, rows, collect_provenance(f"python -m {_MODULE} --arch {options.arch}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
