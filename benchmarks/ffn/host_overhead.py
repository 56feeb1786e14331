"""`python -m benchmarks.ffn.host_overhead`: host time of a call of the backend "triton", up to Triton's own launcher.

Kernels are not run, so no GPU is needed and none is measured: on a GPU `benchmarks.ffn.moe_ffn` times whole calls.
Routing is top-2, whose products all are kernels; a library product would run on the CPU here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ffn.inputs import EPS, Inputs, draw_shared, route
from benchmarks.harness.provenance import RESULTS, provenance
from benchmarks.harness.rows import write_cells
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels.arguments import check_arguments
from mtu_kernels.triton import operators
from mtu_kernels.triton.launch import Launch, Machine

_BURST = 200
_BURSTS = 15


def median_us(call: Callable[[], Any]) -> float:
    """Median over bursts of the mean time of a call, in µs."""
    times = []
    for _ in range(_BURSTS + 1):
        start = time.perf_counter()
        for _ in range(_BURST):
            call()
        times.append((time.perf_counter() - start) / _BURST * 1e6)
    return statistics.median(times[1:])  # the first burst fills caches


def steps_of(inputs: Inputs, run: Callable[[Launch], None]) -> dict[str, Callable[[], Any]]:
    """The parts of a call by name: checks of the arguments, and the operators with what they allocate."""
    tensors = (inputs.x, *inputs.norm, *inputs.experts[:4], *inputs.routing)
    # Index values are checked by a kernel on a GPU; here that would be a sort on the CPU.
    dense = inputs.routing._replace(weights=inputs.routing.weights.new_ones(len(inputs.x), inputs.experts.num_experts))
    shapes = dense._replace(indices=None)
    machine = Machine("sm_90", run)

    def make() -> operators.Call:
        return operators.make_call(machine, tensors, inputs.experts.num_experts)

    def step() -> None:
        _, *saved = operators.train(make(), EPS)
        operators.backward(make(), inputs.grad_y, saved, EPS, True)

    return {
        "checks": lambda: check_arguments(inputs.x, inputs.norm, inputs.experts, shapes),
        "inference": lambda: operators.inference(make(), EPS),
        "training": step,
    }


def main() -> None:
    """Write `results/host_overhead.csv`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ffn.host_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "host_overhead.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Few numbers: what is allocated and added up by torch itself should take no time.
    inputs = route(draw_shared(Workload(64, 16, 2, "bf16", "forward"), torch.device("cpu"), 0), Setting(8, 2, 2), 1)
    source = provenance("python -m benchmarks.ffn.host_overhead")
    launches: list[Launch] = []
    counts = {}
    for name, step in steps_of(inputs, launches.append).items():
        launches.clear()
        step()
        counts[name] = len(launches)
    rows = []
    with torch.no_grad():
        for name, step in steps_of(inputs, lambda launch: None).items():
            rows.append({"part": name, "launches": counts[name], "median_us": f"{median_us(step):.1f}"})
            print(*rows[-1].values())
    write_cells(given.output, rows, source)


if __name__ == "__main__":
    main()
