"""`python -m benchmarks.kernels.product_profile`: one product of the feed-forward alone, with its shipped tile.

It prints the time and the rate. Then the product runs once more between the calls by which a profiler starts and stops,
so that `ncu --profile-from-start off` records that run alone.
"""

import sys
from collections.abc import Sequence

import torch

from benchmarks.harness.arguments import parse_count, parse_shapes
from benchmarks.harness.commands import make_parser, parse_arguments
from benchmarks.kernels.products import ProductShape, draw_operands, prepare_product
from benchmarks.kernels.tile_measure import ProductTask, TileTimer
from mtu_kernels.triton.launch import arch_of, execute_launch, is_interpreted
from mtu_kernels.triton.tile_choice import find_tile
from mtu_kernels.triton.tiles import PAIR_PRODUCTS, PRODUCTS

_SHAPES = ((1280, 1024), (320, 4096))
# The name of the interpreter in the table.
_INTERPRETED_ARCH = "interpreter"


def time_and_profile(task: ProductTask, device: torch.device, arch: str) -> str:
    """Times a product, then runs it once under the profiler, if there is one. Returns a line for people.

    Raises:
        RuntimeError: the tile does not run here, or its result is wrong.
    """
    shape = task.shape
    tile = find_tile(shape.tile_key(task.product, arch, 16))
    with TileTimer(device) as timer:
        times = timer.time_tiles(task, (tile,))
        if tile not in times:
            raise RuntimeError(f"{task} must run with its tile {tile}, got: {timer.refused[task, tile]}")
        work = prepare_product(task.product, draw_operands(shape, task.dtype, device), tile)
        work.run(execute_launch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        work.run(execute_launch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
    pairs = 2 if task.product in PAIR_PRODUCTS else 1
    flops = 2 * shape.B * shape.L * shape.D * shape.active_hidden * pairs
    return f"{task}: {tile}: {times[tile]:.1f} µs, {flops / times[tile] / 1e6:.1f} TFLOP/s"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a product does not run."""
    parser = make_parser("benchmarks.kernels.product_profile", "Times one product alone, with its shipped tile.")
    names = [name for name in PRODUCTS if name in ("expert_in", "expert_sum")]
    parser.add_argument("--product", choices=names, default="expert_in", help="(default: expert_in)")
    parser.add_argument(
        "--shapes", type=parse_shapes, default=_SHAPES, help="DxL, or sets (default: 1280x1024,320x4096)"
    )
    parser.add_argument("--batch", type=parse_count, default=2, help="samples (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny shape, also in Triton's interpreter")
    _, options = parse_arguments(parser, argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not (options.quick and is_interpreted()):
        parser.error("Products are profiled on a CUDA device, and torch finds none.")
    device = torch.device("cuda" if on_gpu else "cpu")
    for D, L in ((16, 16),) if options.quick else options.shapes:
        # The interpreter computes bfloat16 wrongly.
        task = ProductTask(options.product, ProductShape(D, L, options.batch, 4, None, D), "bf16" if on_gpu else "fp16")
        try:
            print(time_and_profile(task, device, arch_of(device) if on_gpu else _INTERPRETED_ARCH), flush=True)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
