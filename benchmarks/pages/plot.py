"""`python -m benchmarks.pages.plot`: draws all pictures that there are rows for, from the CSV files alone."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.ffn import rows as ffn_rows
from benchmarks.ffn.machine import read_roofs
from benchmarks.ffn.roofline import read_roofline_points
from benchmarks.harness.commands import make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, ROOT
from benchmarks.models import unet_targets
from benchmarks.pages import plot_ffn, plot_roofline, plot_scaling, plot_unet

IMAGES = ROOT / "docs" / "images"


def pictures_to_draw(results: Path, images: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Paths of the pictures of a folder's files, each with the function that draws it."""
    kinds = {
        "moe_ffn_*.csv": lambda file, picture: plot_ffn.write_plot(ffn_rows.TABLE.read_rows(file), picture),
        "scaling_*.csv": lambda file, picture: plot_scaling.write_plot(ffn_rows.TABLE.read_rows(file), picture),
        "unet_*.csv": lambda file, picture: plot_unet.write_plot(unet_targets.TABLE.read_rows(file), picture),
    }
    for pattern, draw in kinds.items():
        for file in sorted(results.glob(pattern)):
            picture = images / f"{file.stem}.png"
            yield picture, functools.partial(draw, file, picture)
    roofs = read_roofs(results / "machine.csv") if (results / "machine.csv").exists() else {}
    for device in sorted({device for device, _ in roofs}):
        if (results / f"moe_ffn_{device}.csv").exists():
            picture = images / f"roofline_{device}.png"
            yield picture, functools.partial(_draw_roofline, results, device, picture)


def _draw_roofline(results: Path, device: str, picture: Path) -> None:
    plot_roofline.write_plot(read_roofline_points(results, device), picture)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Files that cannot be drawn are an error, after all others were drawn."""
    parser = make_parser("benchmarks.pages.plot", "Draws all pictures that there are rows for, from the CSV files.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures (default: %(default)s)")
    _, options = parse_arguments(parser, argv)
    found, reasons = False, []
    for picture, draw in pictures_to_draw(options.results, options.output):
        found = True
        try:
            draw()
            print(picture)
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        reasons.append(f"There is no moe_ffn_*.csv in {options.results}: run python -m benchmarks.ffn.moe_ffn first.")
    if reasons:
        parser.error(" ".join(reasons))
    return 0


if __name__ == "__main__":
    sys.exit(main())
