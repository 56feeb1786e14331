"""`python -m benchmarks.kernels.compiled_candidates expert_in --arch sm_90`: compiles the tuner's candidate tiles.

No GPU is needed. For each tile that the tuner would try: registers, waits for the tensor cores in the main loop (more
than one: they are serialised), instructions, programs on a multiprocessor, and the time that
`benchmarks.kernels.kernel_model` predicts at each shape, for the GPUs that it knows. The best ones come first.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton
from tqdm import tqdm

from benchmarks.harness.arguments import parse_shapes
from benchmarks.harness.commands import exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.report import geometric_mean
from benchmarks.kernels.ahead_of_time import (
    CHIPS,
    CompiledLaunch,
    check_not_interpreted,
    compile_once,
    programs_per_processor,
)
from benchmarks.kernels.compiled_kernels import CompiledKernel, describe_faults, format_table_tile
from benchmarks.kernels.kernel_calls import SD_SHAPES, NamedLaunch
from benchmarks.kernels.kernel_model import GPUS, predict_grid_us, read_tile
from benchmarks.kernels.products import ProductShape, draw_operands, prepare_product
from benchmarks.kernels.sass import count_waits
from benchmarks.kernels.tile_candidates import candidate_tiles
from mtu_kernels.triton.tiles import PRODUCTS, TileConfig


class CompiledCandidate(NamedTuple):
    """A tile, compiled.

    Attributes:
        predicted_us: predicted, of each shape; empty where the GPU's rates are not known.
        faults: reasons why the gate would refuse it.
    """

    tile: TileConfig
    compiled: CompiledLaunch | None
    predicted_us: tuple[float, ...]
    faults: tuple[str, ...]


def compile_candidates(
    product: str, arch: str, shapes: Sequence[ProductShape], tiles: Sequence[TileConfig]
) -> list[CompiledCandidate]:
    """Each tile at each shape; the code of the first shape stands for all, where shapes do not change it."""
    found = [_candidate(product, arch, shapes, tile) for tile in tqdm(tiles, unit="tile", file=sys.stderr)]
    return sorted(found, key=_order)


def _candidate(product: str, arch: str, shapes: Sequence[ProductShape], tile: TileConfig) -> CompiledCandidate:
    done: dict[tuple[str, ...], CompiledLaunch] = {}
    wrong: dict[str, None] = {}
    times, first = [], None
    for shape in shapes:
        total = 0.0
        for launch in prepare_product(product, draw_operands(shape, "bf16", "meta"), tile).steps:
            try:
                compiled = compile_once(launch, arch, done)
            except Exception as error:  # Compilers fail in many ways, and a candidate that does not compile is none.
                return CompiledCandidate(
                    tile, None, (), (f"{type(error).__name__}: {' '.join(str(error).split())[-120:]}",)
                )
            first = first or compiled
            named = NamedLaunch(f"{product} {shape}", "bf16", None, launch, shape)
            wrong |= dict.fromkeys(describe_faults(CompiledKernel(arch, named, (), compiled)))
            if arch in GPUS:
                program = read_tile(compiled, arch).make_program(product_depth(product, shape))
                total += predict_grid_us(program, launch.num_programs, GPUS[arch])
        times.append(total)
    return CompiledCandidate(tile, first, tuple(times) if arch in GPUS else (), tuple(wrong))


def product_depth(product: str, shape: ProductShape) -> int:
    """The number of multiply-adds for one element of a product's result; for gradients of weights, on average."""
    if product == "expert_sum":
        return shape.active_hidden
    if product == "expert_in_backward":
        return 2 * shape.active_hidden
    if product == "expert_weights":
        return shape.B * shape.L * (shape.K or shape.E) // shape.E
    return shape.D


def table_lines(found: Sequence[CompiledCandidate], arch: str, shapes: Sequence[ProductShape]) -> Iterator[str]:
    """A table of the candidates."""
    times = "".join(f"{f'{shape.D}x{shape.L}':>11}" for shape in shapes) if arch in GPUS else ""
    yield f"{'tile':38}{'registers':>10}{'shared':>8}{'a SM':>6}{'loop':>6}{'waits':>6}{'epilogue':>9}{times}  refused"
    for candidate in found:
        name = f"{format_table_tile(candidate.tile)} group_m={candidate.tile.group_m}"
        if candidate.compiled is None:
            yield f"{name:38}{'; '.join(candidate.faults)}"
            continue
        code, compiled = candidate.compiled.require_code(), candidate.compiled
        resident = programs_per_processor(compiled, CHIPS[arch])
        cells = (
            f"{code.num_registers:>10}{compiled.shared_bytes:>8}{resident:>6}{len(code.main_loop):>6}"
            f"{count_waits(code.main_loop):>6}{len(code.epilogue):>9}"
        )
        times = "".join(f"{time:>11.1f}" for time in candidate.predicted_us)
        yield f"{name:38}{cells}{times}  {'; '.join(candidate.faults)}"


def _order(candidate: CompiledCandidate) -> tuple[bool, float]:
    times = candidate.predicted_us
    return bool(candidate.faults), geometric_mean(times) if times else 0.0


def _parse_tile(text: str) -> TileConfig:
    """Parses a tile: rows, columns, depth of a step, warps, stages and, optionally, group_m."""
    numbers = text.split("x")
    if len(numbers) not in (5, 6) or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"expected a tile such as 128x64x64x4x3 (or …x8), got {text!r}.")
    rows, columns, depth, warps, stages, *group_m = map(int, numbers)
    return TileConfig(rows, columns, depth, warps, stages, False, *group_m)


def _parser() -> argparse.ArgumentParser:
    description = (
        "Compiles the tuner's candidate tiles of a product, and prints their code's figures, the best ones first."
    )
    parser = make_parser("benchmarks.kernels.compiled_candidates", description)
    parser.add_argument("product", choices=PRODUCTS)
    parser.add_argument("--arch", choices=CHIPS, default="sm_90", help="(default: sm_90)")
    parser.add_argument(
        "--shapes", type=parse_shapes, default=SD_SHAPES, help="DxL, or sets: sd15, sdxl (default: both)"
    )
    parser.add_argument("--batch", type=int, default=2, help="samples (default: 2)")
    parser.add_argument("--top-k", action="store_true", help="2 of 8 experts active (default: dense, 4 experts)")
    parser.add_argument(
        "--tiles", type=_parse_tile, nargs="+", help="rows x columns x depth x warps x stages (default: the tuner's)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    _, options = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        check_not_interpreted()
    E, K = (8, 2) if options.top_k else (4, None)
    shapes = [ProductShape(D, L, options.batch, E, K, 4 * D // E) for D, L in options.shapes]
    grid = candidate_tiles(shapes[0].tile_key(options.product, options.arch, 16))
    by_descriptor = any(tile.descriptors for tile in grid if isinstance(tile, TileConfig))
    tiles = [tile for tile in options.tiles or grid if isinstance(tile, TileConfig)]
    tiles = list(dict.fromkeys(tile._replace(descriptors=by_descriptor) for tile in tiles))
    found = compile_candidates(options.product, options.arch, shapes, tiles)
    rates = f", µs predicted for one {GPUS[options.arch].name}, not measured" if options.arch in GPUS else ""
    print(f"{options.product}, {options.arch}, Triton {triton.__version__}, {shapes[0]} and the like{rates}")
    print(*table_lines(found, options.arch, shapes), sep="\n")


if __name__ == "__main__":
    main()
