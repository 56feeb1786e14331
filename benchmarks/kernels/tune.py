"""`python -m benchmarks.kernels.tune`: measures tiles on the GPU it finds, and rewrites the package's table of them.

Every product of the feed-forward is timed alone, at the shapes of SD 1.5 and SDXL, dense and top-2 of 8 experts, in
bfloat16: each candidate is compiled ahead on all cores, checked against a reference, then timed beside the others in
CUDA graphs. The table is written after every shape, so a run that is cut off loses nothing.
"""

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

from benchmarks.harness.arguments import names_parser, parse_counts, parse_shapes
from benchmarks.harness.commands import add_commit_option, make_parser, parse_arguments
from benchmarks.harness.provenance import collect_provenance, command_line
from benchmarks.harness.recording import deadline_after
from benchmarks.harness.report import geometric_mean
from benchmarks.kernels.kernel_calls import SD_SHAPES
from benchmarks.kernels.products import ProductShape
from benchmarks.kernels.tile_candidates import PERSISTENT, candidate_tiles
from benchmarks.kernels.tile_measure import ProductTask, Tile, TileTimer, compile_ahead
from benchmarks.kernels.tile_rows import merge_rows, read_rows, write_rows
from mtu_kernels.triton import tile_table
from mtu_kernels.triton.launch import arch_of, is_interpreted
from mtu_kernels.triton.tile_choice import find_tile, triton_version_string
from mtu_kernels.triton.tiles import PRODUCTS, TableRow, TileKey

MODULE = "benchmarks.kernels.tune"
BITS = 16
DTYPE = "bf16"
BATCHES = (2, 8)
# Experts, and the active ones among them. Dense routing goes first.
ROUTINGS: dict[str, tuple[int, int | None]] = {"dense": (4, None), "top-2": (8, 2)}
_INFERENCE = ("expert_in", "expert_sum")
# How the source of a row begins that was measured, and not chosen otherwise.
MEASURED_ON = "measured on "
SHIPPED = Path(tile_table.__file__)
# A row for a number of tokens of its own must be worth it.
_WORTH_A_ROW = 1.02

Measure = Callable[[ProductTask, Sequence[Tile], Sequence[Tile]], dict[Tile, float]]


class TileTimes(NamedTuple):
    """Median times in µs of the tiles that compute a product rightly, and the tile that was in use before."""

    key: TileKey
    median_us: dict[Tile, float]
    previous_tile: Tile


def tasks_by_key(
    products: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    arch: str,
    batches: Sequence[int] = BATCHES,
    routings: Sequence[str] = tuple(ROUTINGS),
) -> dict[TileKey, ProductTask]:
    """The measured products by the key of their row. Several shapes may share a key; the first stands for all.

    A run may be cut off anywhere, so it begins with dense routing, and there with inference. Keys name the installed
    version of Triton, since another one would compile the tiles differently.
    """
    tasks: dict[TileKey, ProductTask] = {}
    for routing in sorted(routings, key=list(ROUTINGS).index):
        E, K = ROUTINGS[routing]
        for product in sorted(products, key=lambda product: product not in _INFERENCE):
            for D, L in shapes:
                for B in batches:
                    task = ProductTask(product, ProductShape(D, L, B, E, K, 4 * D // E), DTYPE)
                    key = task.shape.tile_key(product, arch, BITS)._replace(triton=triton_version_string())
                    tasks.setdefault(key, task)
    return tasks


def measure_and_write_table(
    tasks: dict[TileKey, ProductTask],
    measure: Measure,
    table: Path,
    source: str,
    *,
    tried: Callable[[TileKey], Sequence[Tile]] = candidate_tiles,
    refused: Iterable = (),
    until: float,
) -> list[TileTimes]:
    """Measures tasks one after the other and rewrites the table after each one.

    Args:
        tasks: in the order in which they are measured.
        measure: task, candidates, those to time with care → times in µs.
        table: file; rows of other architectures and of shapes that are not reached stay.
        source: provenance, for the rows.
        tried: key → candidates.
        refused: pairs of a task and a tile that are not measured.
        until: time by `time.monotonic` after which no task is begun.
    """
    old = read_rows(table) if table.exists() else tile_table.ROWS
    left_out = set(refused)
    done: list[TileTimes] = []
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
        done.append(TileTimes(key, times, before))
        # A tile for a whole width is chosen when all numbers of tokens have been tried: its row would hide the shipped
        # rows of those that are left.
        waiting = {later._replace(tokens=0) for later in list(tasks)[number + 1 :]}
        write_rows(table, merge_rows(old, choose_rows(done, source, waiting), measured=_keys(done) - waiting))
    return done


def shipped_and_persistent_tile(key: TileKey) -> tuple[Tile, ...]:
    """The tile of the table, and that of the persistent kernel."""
    return find_tile(key), PERSISTENT


def choose_rows(measurements: Sequence[TileTimes], source: str, waiting: Collection[TileKey] = ()) -> list[TableRow]:
    """Rows for the measurements: one for each width, and more where a number of tokens is better with its own tile.

    Widths that wait for more measurements have rows for numbers of tokens alone.
    """
    by_width: dict[TileKey, list[TileTimes]] = {}
    for measurement in measurements:
        by_width.setdefault(measurement.key._replace(tokens=0), []).append(measurement)
    rows = []
    for key, group in by_width.items():
        everywhere = (
            []
            if key in waiting
            else [tile for tile in group[0].median_us if all(tile in one.median_us for one in group)]
        )
        tile = min(everywhere, key=lambda tile: _slowness(tile, group), default=None)
        if tile is not None:
            rows.append(TableRow(key, tile, _source(source, tile, group)))
        for one in group:
            best = min(one.median_us, key=one.median_us.__getitem__)
            if tile is None or one.median_us[tile] > _WORTH_A_ROW * one.median_us[best]:
                rows.append(TableRow(one.key, best, _source(source, best, [one])))
    return rows


def _slowness(tile: Tile, group: Sequence[TileTimes]) -> float:
    """The mean over shapes of the logarithm of a tile's time over the best time."""
    return sum(math.log(one.median_us[tile] / min(one.median_us.values())) for one in group) / len(group)


def _source(source: str, tile: Tile, group: Sequence[TileTimes]) -> str:
    texts = []
    for one in sorted(group, key=lambda one: one.key.tokens):
        before = f"{one.median_us[one.previous_tile]:.1f}" if one.previous_tile in one.median_us else "none"
        texts.append(f"{one.median_us[tile]:.1f} µs at {one.key.tokens} tokens, before {before}")
    return f"{source}: {'; '.join(texts)}"


def _keys(measurements: Iterable[TileTimes]) -> set[TileKey]:
    """Keys whose old rows are out of date: those of the shapes and of their widths."""
    keys = {measurement.key for measurement in measurements}
    return keys | {key._replace(tokens=0) for key in keys}


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, "Measures tiles on the GPU it finds, and rewrites the package's table of them.")
    products, routings = names_parser(PRODUCTS, "product"), names_parser(ROUTINGS, "routing")
    parser.add_argument("--products", type=products, default=PRODUCTS, help=f"(default: {','.join(PRODUCTS)})")
    parser.add_argument(
        "--shapes", type=parse_shapes, default=SD_SHAPES, help="DxL, or sets: sd15, sdxl (default: both)"
    )
    parser.add_argument("--batches", type=parse_counts, default=BATCHES, help="samples (default: 2,8)")
    parser.add_argument("--routing", type=routings, default=tuple(ROUTINGS), help="dense, top-2, or all (default: all)")
    parser.add_argument(
        "--persistent",
        action="store_true",
        help="the first product with dense routing alone, by the kernel for sm_90 that no GPU has run yet, beside the "
        "tiles of the table",
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="no shape is begun after these (default: 6)")
    parser.add_argument("--table", type=Path, default=SHIPPED, help="file to write (default: the package's own)")
    add_commit_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if no candidate of a shape computed it rightly."""
    parser = _parser()
    argv, options = parse_arguments(parser, argv)
    if options.table.suffix != ".py":
        parser.error(f"--table must be a Python file, got {options.table}.")
    if not torch.cuda.is_available():
        parser.error("Tiles are measured on a CUDA device, and torch finds none.")
    if is_interpreted():
        parser.error("TRITON_INTERPRET must be unset, since interpreted kernels have no times; it is set.")
    until = deadline_after(options.minutes)
    device = torch.device("cuda", torch.cuda.current_device())
    arch = arch_of(device)
    facts = collect_provenance(command_line(MODULE, argv), device, options.commit)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    versions = f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    source = f"{MEASURED_ON}{facts['processor']}, {today}, {versions}"
    if options.persistent and arch != "sm_90":
        parser.error(f"--persistent needs a GPU of sm_90, got one of {arch}.")
    products, routings = (("expert_in",), ("dense",)) if options.persistent else (options.products, options.routing)
    tasks = tasks_by_key(products, options.shapes, arch, options.batches, routings)
    tried = shipped_and_persistent_tile if options.persistent else candidate_tiles
    tiles = {task: tried(key) for key, task in tasks.items()}
    refused = compile_ahead(tiles, arch)
    number = sum(map(len, tiles.values())) - len(refused)
    print(f"{number} candidates for {len(tasks)} shapes; {len(refused)} more spill or do not fit.")
    wrong: list[ProductTask] = []

    def measure(task: ProductTask, tiles: Sequence[Tile], keep: Sequence[Tile]) -> dict[Tile, float]:
        times = timer.time_tiles(task, tiles, keep)
        wrong.extend([] if times else [task])
        return times

    with TileTimer(device) as timer:
        done = measure_and_write_table(tasks, measure, options.table, source, tried=tried, refused=refused, until=until)
    for (task, tile), reason in timer.refused.items():
        print(f"left out: {task}, {tile}: {reason}", file=sys.stderr)
    gains = [
        one.median_us[one.previous_tile] / min(one.median_us.values())
        for one in done
        if one.previous_tile in one.median_us
    ]
    gain = geometric_mean(gains or [1.0])
    print(f"{len(done)} shapes written to {options.table}; the new tiles are {gain:.2f} times as fast as those before.")
    # One that breaks the device takes all later ones with it.
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
