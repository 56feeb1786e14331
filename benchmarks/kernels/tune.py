"""`python -m benchmarks.kernels.tune`: measures tiles on the GPU it finds, and rewrites the package's table of them.

Every product of the feed-forward is timed alone, at the shapes of SD 1.5 and SDXL, dense and top-2 of 8 experts, in
bfloat16: each candidate is compiled ahead on all cores, checked against a reference, then timed beside the others in
CUDA graphs. The table is written after every shape, so a run that is cut off loses nothing.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.harness.arguments import parse_choices, parse_counts, parse_shapes
from benchmarks.harness.provenance import command_line, provenance
from benchmarks.kernels.kernel_calls import SD_SHAPES
from benchmarks.kernels.products import Shape
from benchmarks.kernels.tile_candidates import PERSISTENT, candidates
from benchmarks.kernels.tile_measure import Task, Tile, Timer, compile_ahead
from benchmarks.kernels.tile_rows import merge, read, write
from mtu_kernels.triton import tile_table
from mtu_kernels.triton.launch import arch_of, interpreted
from mtu_kernels.triton.tile_choice import find_tile, triton_version
from mtu_kernels.triton.tiles import PRODUCTS, TableRow, TileKey

BITS = 16
DTYPE = "bf16"
BATCHES = (2, 8)
# Experts, and how many of them are active. What all inference runs goes first.
ROUTINGS: dict[str, tuple[int, int | None]] = {"dense": (4, None), "top-2": (8, 2)}
_INFERENCE = ("expert_in", "expert_sum")
SHIPPED = Path(tile_table.__file__)
# A row for a number of tokens of its own must be worth it.
_WORTH_A_ROW = 1.02

Measure = Callable[[Task, Sequence[Tile], Sequence[Tile]], dict[Tile, float]]


class Measurement(NamedTuple):
    """Median times in µs of the tiles that compute a product rightly, and the tile that ran without them."""

    key: TileKey
    times: dict[Tile, float]
    before: Tile


def tasks_of(
    products: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    arch: str,
    batches: Sequence[int] = BATCHES,
    routings: Sequence[str] = tuple(ROUTINGS),
) -> dict[TileKey, Task]:
    """What is measured, by the key of its row: several shapes may share one, and the first of them stands for all.

    A run may be cut off anywhere, so it begins with what matters most: dense routing, and in it the inference. Keys
    name the installed version of Triton: what another one makes of the tiles is not measured.
    """
    tasks: dict[TileKey, Task] = {}
    for routing in sorted(routings, key=list(ROUTINGS).index):
        E, K = ROUTINGS[routing]
        for product in sorted(products, key=lambda product: product not in _INFERENCE):
            for D, L in shapes:
                for B in batches:
                    task = Task(product, Shape(D, L, B, E, K, 4 * D // E), DTYPE)
                    key = task.shape.key(product, arch, BITS)._replace(triton=triton_version())
                    tasks.setdefault(key, task)
    return tasks


def tune(
    tasks: dict[TileKey, Task],
    measure: Measure,
    table: Path,
    source: str,
    *,
    tried: Callable[[TileKey], Sequence[Tile]] = candidates,
    refused: Iterable = (),
    until: float,
) -> list[Measurement]:
    """Measures tasks one after the other and rewrites the table after each one.

    Args:
        tasks: in the order in which they are measured.
        measure: task, candidates, those to time with care → times in µs.
        table: file; rows of other architectures and of shapes that are not reached stay.
        source: where the times come from, for the rows.
        tried: of each key the candidates.
        refused: pairs of a task and a tile that are known not to be worth it.
        until: time by `time.monotonic` after which no task is begun.
    """
    old = read(table) if table.exists() else tile_table.ROWS
    left_out = set(refused)
    done: list[Measurement] = []
    bar = tqdm(tasks.items(), unit="shape", file=sys.stderr)
    for number, (key, task) in enumerate(bar):
        if time.monotonic() > until:
            bar.write(f"out of time: {len(tasks) - len(done)} of {len(tasks)} shapes are left as they were", sys.stderr)
            break
        bar.set_description(str(task))
        before = find_tile(key)
        tiles = [tile for tile in tried(key) if (task, tile) not in left_out]
        times = measure(task, tiles, (before,))
        if not times:
            bar.write(f"{task}: no candidate computed it rightly", sys.stderr)
            continue
        done.append(Measurement(key, times, before))
        # A tile for all of a width is chosen when all numbers of tokens have been tried: its row would hide what is
        # shipped for those that are not.
        waiting = {later._replace(tokens=0) for later in list(tasks)[number + 1 :]}
        write(table, merge(old, choose(done, source, waiting), measured=_keys(done) - waiting))
    return done


def with_persistent(key: TileKey) -> tuple[Tile, ...]:
    """The tile of the table, and that of the persistent kernel."""
    return find_tile(key), PERSISTENT


def choose(measurements: Sequence[Measurement], source: str, waiting: Collection[TileKey] = ()) -> list[TableRow]:
    """Rows for what was measured: one for each width, and more where a number of tokens wants a tile of its own.

    Widths that wait for more measurements have rows for numbers of tokens alone.
    """
    by_width: dict[TileKey, list[Measurement]] = {}
    for measurement in measurements:
        by_width.setdefault(measurement.key._replace(tokens=0), []).append(measurement)
    rows = []
    for key, group in by_width.items():
        everywhere = [] if key in waiting else _measured_everywhere(group)
        tile = min(everywhere, key=lambda tile: _slowness(tile, group), default=None)
        if tile is not None:
            rows.append(TableRow(key, tile, _source(source, tile, group)))
        for one in group:
            best = min(one.times, key=one.times.__getitem__)
            if tile is None or one.times[tile] > _WORTH_A_ROW * one.times[best]:
                rows.append(TableRow(one.key, best, _source(source, best, [one])))
    return rows


def _measured_everywhere(group: Sequence[Measurement]) -> list[Tile]:
    return [tile for tile in group[0].times if all(tile in one.times for one in group)]


def _slowness(tile: Tile, group: Sequence[Measurement]) -> float:
    """The mean over shapes of the logarithm of a tile's time over the best time."""
    return sum(math.log(one.times[tile] / min(one.times.values())) for one in group) / len(group)


def _source(source: str, tile: Tile, group: Sequence[Measurement]) -> str:
    times = (
        f"{one.times[tile]:.1f} µs at {one.key.tokens} tokens, before {_microseconds(one)}"
        for one in sorted(group, key=lambda one: one.key.tokens)
    )
    return f"{source}: {'; '.join(times)}"


def _microseconds(one: Measurement) -> str:
    return f"{one.times[one.before]:.1f}" if one.before in one.times else "none"


def _keys(measurements: Iterable[Measurement]) -> set[TileKey]:
    """Keys whose old rows are out of date: those of the shapes, and those of their widths."""
    keys = {measurement.key for measurement in measurements}
    return keys | {key._replace(tokens=0) for key in keys}


def _products(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PRODUCTS:
            raise argparse.ArgumentTypeError(f"unknown product {name!r}: expected some of {', '.join(PRODUCTS)}.")
    return names


def _routings(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(ROUTINGS), "routing")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__.split("\n\n")[1])
    parser.add_argument("--products", type=_products, default=PRODUCTS, help=f"(default: {','.join(PRODUCTS)})")
    parser.add_argument(
        "--shapes", type=parse_shapes, default=SD_SHAPES, help="DxL, or sets: sd15, sdxl (default: both)"
    )
    parser.add_argument("--batches", type=parse_counts, default=BATCHES, help="samples (default: 2,8)")
    parser.add_argument(
        "--routing", type=_routings, default=tuple(ROUTINGS), help="dense, top-2, or all (default: all)"
    )
    parser.add_argument(
        "--persistent",
        action="store_true",
        help="the first product with dense routing alone, by the kernel for sm_90 that no GPU has run yet, beside the "
        "tiles of the table",
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="no shape is begun after these (default: 6)")
    parser.add_argument("--table", type=Path, default=SHIPPED, help="file to write (default: the package's own)")
    parser.add_argument("--commit", help="for the rows, in a copy of the tree without its git directory")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if no candidate of a shape computed it rightly."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    if options.table.suffix != ".py":
        parser.error(f"--table must be a Python file, got {options.table}.")
    if not torch.cuda.is_available():
        parser.error("Tiles are measured on a CUDA device, and torch finds none.")
    if interpreted():
        parser.error("TRITON_INTERPRET must be unset, since interpreted kernels have no times; it is set.")
    until = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    arch = arch_of(device)
    facts = provenance(command_line("benchmarks.kernels.tune", argv), device, options.commit)
    source = (
        f"measured on {facts['processor']}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, torch {facts['torch']}, "
    )
    source += f"triton {facts['triton']}, commit {facts['commit']}"
    if options.persistent and arch != "sm_90":
        parser.error(f"--persistent needs a GPU of sm_90, got one of {arch}.")
    products, routings = (("expert_in",), ("dense",)) if options.persistent else (options.products, options.routing)
    tasks = tasks_of(products, options.shapes, arch, options.batches, routings)
    tried = with_persistent if options.persistent else candidates
    tiles = {task: tried(key) for key, task in tasks.items()}
    refused = compile_ahead(tiles, arch)
    number = sum(map(len, tiles.values())) - len(refused)
    print(f"{number} candidates for {len(tasks)} shapes; {len(refused)} more spill or do not fit.")
    wrong: list[Task] = []

    def measure(task: Task, tiles: Sequence[Tile], keep: Sequence[Tile]) -> dict[Tile, float]:
        times = timer.measure(task, tiles, keep)
        wrong.extend([] if times else [task])
        return times

    with Timer(device) as timer:
        done = tune(tasks, measure, options.table, source, tried=tried, refused=refused, until=until)
    for (task, tile), reason in timer.refused.items():
        print(f"left out: {task}, {tile}: {reason}", file=sys.stderr)
    gains = [math.log(one.times[one.before] / min(one.times.values())) for one in done if one.before in one.times]
    gain = math.exp(sum(gains) / max(len(gains), 1))
    print(f"{len(done)} shapes written to {options.table}; the new tiles are {gain:.2f} times as fast as those before.")
    # One that breaks the device takes all later ones with it.
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
