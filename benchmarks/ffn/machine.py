"""`python -m benchmarks.ffn.machine`: the two roofs of this machine, the rate of matrix products and that of memory.

The rate of each matrix size, and of each way through memory, is that of its median time. The best of the sizes, and of
the ways, is the roof. A roof is the rate of torch's own product, not that of the processor's data sheet, so kernels
with products of their own may pass it.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness.commands import (
    add_common_options,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.rows import CsvTable, Row
from benchmarks.harness.timing import MIN_ROUNDS, Key, capture_stream, time_each, warm_up
from benchmarks.harness.workloads import Workload

_MEASURED = ("bf16", "fp32")
# Edges of the square matrices, by device.
_MATRICES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
# Of one array: several times the last-level cache of any processor.
_ARRAY_BYTES = 2**30
# A smoke test; its rates mean nothing.
_QUICK = ((64,), 2**16, 2)
# A row has the roofs of one dtype. Its part is the faster way through memory: "copy", or "triad", ``a = b + s · c``.
TABLE = CsvTable(
    "benchmarks.ffn.machine",
    ("device", "dtype", "matrix", "flops_per_s", "traffic", "array_bytes", "bytes_per_s", "rounds"),
    field_of_column={"traffic": "part"},
)
# By device and dtype.
Roofs = Mapping[tuple[str, str], Row]


def measure_product_rates(
    device: torch.device, dtype: torch.dtype, edges: Sequence[int], rounds: int
) -> dict[int, float]:
    """FLOP/s of the product of two square matrices, ``2 N³ / time``, by edge."""
    calls = {}
    for edge in edges:
        # Never zeros: products of zeros run faster than those of data.
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        calls[edge] = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    return {edge: 2 * edge**3 / seconds for edge, seconds in _medians(calls, device, rounds).items()}


def measure_memory_rates(device: torch.device, dtype: torch.dtype, array_bytes: int, rounds: int) -> dict[str, float]:
    """Bytes/s that a copy and a triad read and write, by name."""
    a, b, c = (torch.ones(array_bytes // dtype.itemsize, device=device, dtype=dtype) for _ in range(3))
    calls = {"copy": functools.partial(a.copy_, b), "triad": functools.partial(torch.add, b, c, alpha=0.5, out=a)}
    moved = {"copy": 2 * a.nbytes, "triad": 3 * a.nbytes}
    return {name: moved[name] / seconds for name, seconds in _medians(calls, device, rounds).items()}


def _medians(calls: Mapping[Key, Callable[[], object]], device: torch.device, rounds: int) -> dict[Key, float]:
    for call in calls.values():
        warm_up([call], device)
    timings = time_each({name: [call] for name, call in calls.items()}, device, 0, rounds)
    return {name: timing.median_us / 1e6 for name, timing in timings.items()}


def measure_roofs(
    device: torch.device,
    dtype: str,
    source: dict[str, str],
    edges: Sequence[int] | None = None,
    array_bytes: int = _ARRAY_BYTES,
    rounds: int = MIN_ROUNDS,
) -> Row:
    """Measures both roofs of a device in one dtype. float32 products are IEEE, as torch computes them by default."""
    with capture_stream(device), torch.no_grad():
        products = measure_product_rates(device, DTYPES[dtype], edges or _MATRICES[device.type], rounds)
        ways = measure_memory_rates(device, DTYPES[dtype], array_bytes, rounds)
    matrix, way = max(products, key=products.__getitem__), max(ways, key=ways.__getitem__)
    place = {"device": device.type, "workload": Workload(dtype=dtype), "part": way, "rounds": rounds, "source": source}
    rates = {"flops_per_s": products[matrix], "bytes_per_s": ways[way]}
    return Row(matrix=matrix, array_bytes=array_bytes, **rates, **place)


def read_roofs(path: Path) -> Roofs:
    """The last roofs in a CSV file by device and dtype. Raises ValueError as `CsvTable.read_rows` does."""
    return {(row.device, row.workload.dtype): row for row in TABLE.read_rows(path)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(TABLE.module, "The rate of matrix products and that of memory on this machine.")
    add_common_options(parser, "machine.csv", dtype=False)
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny matrices and arrays")
    argv, options = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        context = start_command(TABLE, options, argv, "machine.csv")
    sizes = _QUICK if options.quick else (None, _ARRAY_BYTES, MIN_ROUNDS)
    for dtype in _MEASURED:
        roofs = measure_roofs(context.device, dtype, context.source, *sizes)
        context.append_row(roofs)
        product = f"{roofs.flops_per_s / 1e12:.3g} TFLOP/s by products of edge {roofs.matrix}"
        print(f"{roofs.device}, {dtype}: {product}, {roofs.bytes_per_s / 1e9:.3g} GB/s by {roofs.part}")
    print(f"{len(_MEASURED)} rows added to {context.output_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
