"""`python -m benchmarks.ffn.host_overhead`: host time of a call of the backend "triton", up to Triton's own launcher.

Kernels are not run, so no GPU is needed and none is measured: on a GPU `benchmarks.ffn.moe_ffn` times whole calls.
Routing is top-2, whose products all are kernels; a library product would run on the CPU here.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ffn.inputs import EPS, Inputs, draw_routed_inputs, draw_shared_inputs
from benchmarks.ffn.training_memory import build_operator_call, run_training_step
from benchmarks.harness.commands import make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, collect_provenance
from benchmarks.harness.rows import write_cells
from benchmarks.harness.timing import measure_burst_us
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels.arguments import check_arguments
from mtu_kernels.triton import operators
from mtu_kernels.triton.launch import Launch, LaunchDevice

_MODULE = "benchmarks.ffn.host_overhead"
_BURST, _BURSTS = 200, 15


def calls_by_part(inputs: Inputs, run: Callable[[Launch], None]) -> dict[str, Callable[[], Any]]:
    """The parts of a call by name: checks of the arguments, and the operators with their allocations."""
    # Index values are checked by a kernel on a GPU; here that would be a sort on the CPU.
    dense = inputs.routing._replace(weights=inputs.routing.weights.new_ones(len(inputs.x), inputs.experts.num_experts))
    shapes = dense._replace(indices=None)
    make = functools.partial(build_operator_call, inputs, LaunchDevice("sm_90", run))
    return {
        "checks": lambda: check_arguments(inputs.x, inputs.norm, inputs.experts, shapes),
        "inference": lambda: operators.run_inference(make(), EPS),
        "training": lambda: run_training_step(make, inputs),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `results/host_overhead.csv`."""
    parser = make_parser(_MODULE, 'Host time of a call of the backend "triton", up to Triton\'s own launcher.')
    parser.add_argument("--output", type=Path, default=RESULTS / "host_overhead.csv")
    _, options = parse_arguments(parser, argv)
    torch.set_num_threads(1)
    # Few numbers, so that torch's own allocations and sums take no time.
    inputs = draw_routed_inputs(
        draw_shared_inputs(Workload(64, 16, 2, "bf16", "forward"), torch.device("cpu"), 0), Setting(8, 2, 2), 1
    )
    launches: list[Launch] = []
    rows = []
    with torch.no_grad():
        recorded, timed = calls_by_part(inputs, launches.append), calls_by_part(inputs, lambda launch: None)
        for name, part in timed.items():
            launches.clear()
            recorded[name]()
            # The first burst fills caches.
            measure_burst_us(part, inputs.x.device, _BURST, bursts=1)
            median = measure_burst_us(part, inputs.x.device, _BURST, _BURSTS)
            rows.append({"part": name, "launches": len(launches), "median_us": f"{median:.1f}"})
            print(*rows[-1].values())
    write_cells(options.output, rows, collect_provenance(f"python -m {_MODULE}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
