"""`python -m benchmarks.ffn.machine`: the two roofs of this machine, the rate of matrix products and that of memory.

Of each matrix size, and of each way through memory, the median over the rounds is taken, as it is for all other
contenders; the best of the sizes, and of the ways, is the roof. It is what torch's own product reaches, not what the
processor's data sheet says: kernels with products of their own may pass it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.commands import add_common_options, choose_device, make_parser, parse
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.provenance import RESULTS, command_line, provenance
from benchmarks.harness.rows import append_cells, check_header, read_cells
from benchmarks.harness.timing import MIN_ROUNDS, time_interleaved, warm_up

_MEASURED = ("bf16", "fp32")
# Edges of the square matrices, by device.
_MATRICES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
# Of one array: several times the last-level cache of any processor.
_ARRAY_BYTES = 2**30
# A smoke test, nothing to learn from.
_QUICK = ((64,), 2**16, 2)
MODULE = "benchmarks.ffn.machine"
COLUMNS = ("device", "dtype", "matrix", "flops_per_s", "traffic", "array_bytes", "bytes_per_s", "rounds")
_KINDS = {"matrix": int, "flops_per_s": float, "array_bytes": int, "bytes_per_s": float, "rounds": int}


class Roofs(NamedTuple):
    """What a device reaches at most in one dtype.

    Attributes:
        device: kind of it, "cuda" or "cpu".
        dtype: its name, as in `benchmarks.harness.dtypes.DTYPES`.
        matrix: edge of the square matrices whose product was the fastest.
        flops_per_s: of that product; a multiply-add counts as two.
        traffic: the faster way through memory: "copy", or "triad", ``a = b + s · c``.
        array_bytes: of each array in it.
        bytes_per_s: read and written by it.
        rounds: that were timed.
        source: where it comes from, as `benchmarks.harness.provenance` says it.
    """

    device: str
    dtype: str
    matrix: int
    flops_per_s: float
    traffic: str
    array_bytes: int
    bytes_per_s: float
    rounds: int
    source: dict[str, str]

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        cells = {name: getattr(self, name) for name in COLUMNS}
        cells |= {name: f"{cells[name]:.4g}" for name in ("flops_per_s", "bytes_per_s")}
        return {name: str(value) for name, value in cells.items()} | self.source


def product_rates(device: torch.device, dtype: torch.dtype, edges: Sequence[int], rounds: int) -> dict[int, float]:
    """FLOP/s of the product of two square matrices, ``2 N³ / time``, by edge."""
    calls = {}
    for edge in edges:
        # Never zeros: products of zeros run faster than those of data.
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        calls[edge] = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    return {edge: 2 * edge**3 / seconds for edge, seconds in _medians(calls, device, rounds).items()}


def memory_rates(device: torch.device, dtype: torch.dtype, array_bytes: int, rounds: int) -> dict[str, float]:
    """Bytes/s that a copy and a triad read and write, by name."""
    a, b, c = (torch.ones(array_bytes // dtype.itemsize, device=device, dtype=dtype) for _ in range(3))
    calls = {"copy": functools.partial(a.copy_, b), "triad": functools.partial(torch.add, b, c, alpha=0.5, out=a)}
    moved = {"copy": 2 * a.nbytes, "triad": 3 * a.nbytes}
    return {name: moved[name] / seconds for name, seconds in _medians(calls, device, rounds).items()}


def _medians(calls: dict[Any, Callable[[], Any]], device: torch.device, rounds: int) -> dict[Any, float]:
    for call in calls.values():
        warm_up([call], device)
    timings = time_interleaved([[call] for call in calls.values()], [True] * len(calls), device, 0, rounds)
    return {name: timing.median_us / 1e6 for name, timing in zip(calls, timings, strict=True)}


def measure(
    device: torch.device,
    dtype: str,
    source: dict[str, str],
    edges: Sequence[int] | None = None,
    array_bytes: int = _ARRAY_BYTES,
    rounds: int = MIN_ROUNDS,
) -> Roofs:
    """Measures both roofs of a device in one dtype. float32 products are IEEE, as torch computes them by default."""
    # Captures need a stream of their own.
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    with stream, torch.no_grad():
        products = product_rates(device, DTYPES[dtype], edges or _MATRICES[device.type], rounds)
        ways = memory_rates(device, DTYPES[dtype], array_bytes, rounds)
    matrix, traffic = max(products, key=products.__getitem__), max(ways, key=ways.__getitem__)
    rates = {"flops_per_s": products[matrix], "bytes_per_s": ways[traffic]}
    return Roofs(
        device.type, dtype, matrix, traffic=traffic, array_bytes=array_bytes, rounds=rounds, source=source, **rates
    )


def read_roofs(path: Path) -> dict[tuple[str, str], Roofs]:
    """The roofs in a CSV file by device and dtype, the last ones that were measured.

    Raises:
        ValueError: there is no such file, or a column is missing.
    """
    found = read_cells(path, COLUMNS, MODULE)
    return {(cells["device"], cells["dtype"]): _roofs(cells) for cells in found}


def _roofs(cells: dict[str, str]) -> Roofs:
    values = {name: _KINDS.get(name, str)(cells[name]) for name in COLUMNS}
    return Roofs(**values, source={name: text for name, text in cells.items() if name not in COLUMNS})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(MODULE, __doc__.partition(": ")[2])
    add_common_options(parser, "machine.csv", dtype=False)
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny matrices and arrays")
    argv, options = parse(parser, argv)
    output = options.output or RESULTS / "machine.csv"
    try:
        device = choose_device(options.device)
        source = provenance(command_line(MODULE, argv), device, options.commit)
        check_header(output, [*COLUMNS, *source])
    except ValueError as error:
        parser.error(str(error))
    sizes = _QUICK if options.quick else (None, _ARRAY_BYTES, MIN_ROUNDS)
    for dtype in _MEASURED:
        roofs = measure(device, dtype, source, *sizes)
        append_cells(output, roofs.cells())
        product = f"{roofs.flops_per_s / 1e12:.3g} TFLOP/s by products of edge {roofs.matrix}"
        print(f"{device.type}, {dtype}: {product}, {roofs.bytes_per_s / 1e9:.3g} GB/s by {roofs.traffic}")
    print(f"{len(_MEASURED)} rows added to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
