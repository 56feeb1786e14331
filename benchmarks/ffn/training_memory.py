"""`python -m benchmarks.ffn.training_memory`: what training holds, in bytes, beside the stock feed-forward.

No GPU is needed. Bytes asked of the allocator depend neither on the device nor on numbers, so the backend "triton" is
counted as it runs on an architecture, with its tiles, but without its kernels. (torch's CPU sum widens ∂y to float32
first, which its CUDA sum does not: on a GPU the peaks are lower by B·L·D·4 bytes at the most.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.ffn.inputs import EPS, Inputs, draw_shared, route
from benchmarks.ffn.peers import as_stock, stock_ffn
from benchmarks.harness.arguments import SHAPE_SETS
from benchmarks.harness.memory import peak_bytes, saved_bytes
from benchmarks.harness.provenance import RESULTS, provenance
from benchmarks.harness.rows import write_cells
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels.triton import operators
from mtu_kernels.triton.launch import Machine

_CPU = torch.device("cpu")


class Memory(NamedTuple):
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


def count(workload: Workload, setting: Setting, arch: str) -> Memory:
    """The memory of the backend "triton" with the tiles of an architecture, and of the stock feed-forward."""
    inputs = route(draw_shared(workload, _CPU, seed=0), setting, seed=1)
    stock = as_stock(inputs)
    return Memory(
        saved_bytes(lambda: stock_ffn(*stock.arguments), stock.named.values()),
        peak_bytes(lambda: torch.autograd.grad(stock_ffn(*stock.arguments), stock.leaves, stock.grad_y), _CPU),
        sum(tensor.nbytes for tensor in _train(inputs, arch)[1:]),
        peak_bytes(lambda: _step(inputs, arch, recompute=False), _CPU),
        peak_bytes(lambda: _step(inputs, arch, recompute=True), _CPU),
    )


def _call(inputs: Inputs, arch: str) -> operators.Call:
    tensors = (inputs.x, *inputs.norm, *inputs.experts[:4], *inputs.routing)
    return operators.make_call(Machine(arch, run=lambda launch: None), tensors, inputs.experts.num_experts)


@torch.no_grad()
def _train(inputs: Inputs, arch: str) -> tuple[torch.Tensor, ...]:
    return operators.train(_call(inputs, arch), EPS)


@torch.no_grad()
def _step(inputs: Inputs, arch: str, *, recompute: bool) -> tuple[Any, ...]:
    call = _call(inputs, arch)
    if recompute:
        y, saved = operators.inference(call, EPS), None
    else:
        y, *saved = operators.train(call, EPS)
    return y, operators.backward(call, inputs.grad_y, saved, EPS, True)


def main() -> None:
    """Write `results/training_memory.csv`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ffn.training_memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", default="sm_90", help="whose tiles (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_memory.csv")
    given = parser.parse_args()
    source = provenance(f"python -m benchmarks.ffn.training_memory --arch {given.arch}")
    rows = []
    for D, L in tqdm(SHAPE_SETS["sd15"] + SHAPE_SETS["sdxl"], unit="shape"):
        workload = Workload(D, L, 2, "bf16", "forward+backward")
        memory = count(workload, Setting(E=4), given.arch)
        ratios = {f"{name}_ratio": f"{ratio:.4f}" for name, ratio in memory.ratios.items()}
        place = {"arch": given.arch, "D": D, "L": L, "B": workload.B, "E": 4, "dtype": workload.dtype}
        rows.append(place | memory._asdict() | ratios)
    write_cells(given.output, rows, source)


if __name__ == "__main__":
    main()
