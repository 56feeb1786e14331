"""`python -m benchmarks.plot`: pictures of `results/moe_ffn_*.csv`, each contender's time relative to the floor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.provenance import RESULTS, ROOT
from benchmarks.report import comparisons
from benchmarks.rows import Row, read_rows
from benchmarks.sweeps import Setting, Workload

IMAGES = ROOT / "docs" / "images"
_FLOOR = "products"
_PASSES = ("forward", "forward+backward")
# Looks of the contenders in the order of the legend. Families share a hue; colours are told apart by colour-blind
# readers, too. Contenders that are not listed are not drawn.
_LOOKS = {
    "eager": ("#000000", "diffusers, eager"),
    "loop": ("#999999", "loop over experts"),
    "compile-folded": ("#E69F00", "torch.compile, folded"),
    "compile-folded-max": ("#F5C767", "torch.compile, folded, max-autotune"),
    "compile-routed": ("#CC79A7", "torch.compile, routed"),
    "compile-routed-max": ("#E3B5CF", "torch.compile, routed, max-autotune"),
    "mtu-eager": ("#56B4E9", "mtu, eager"),
    "mtu-triton": ("#0072B2", "mtu, Triton"),
    "mtu-triton-recompute": ("#00466E", "mtu, Triton, recompute"),
    "mtu-cpp": ("#009E73", "mtu, C++"),
    "mtu-cpp-recompute": ("#005C43", "mtu, C++, recompute"),
}


class Point(NamedTuple):
    """A contender's time over that of the two (or six) bare products, at its median and the percentiles 20 and 80."""

    row: Row
    median: float
    p20: float
    p80: float


def points(rows: Sequence[Row], batch: int, experts: int) -> dict[tuple[str, Workload], Point]:
    """What is drawn: for each contender and workload of this batch size the last measurement with dense routing.

    Rows of contenders that heed the routing are those of `experts` experts and one task.
    """
    drawn = {}
    for name in _LOOKS:
        for row, floor in comparisons(rows, name, _FLOOR):
            if batch == row.workload.B and row.setting in (Setting(), Setting(E=experts)):
                times = (time / floor.median_us for time in (row.median_us, row.p20_us, row.p80_us))
                # One expert is measured beside several of them: the ones asked for go first.
                known = drawn.get((name, row.workload))
                if known is None or row.setting.E >= known.row.setting.E:
                    drawn[name, row.workload] = Point(row, *times)
    return drawn


def plot(rows: Sequence[Row], path: Path, batch: int | None = None, experts: int = 4) -> None:
    """Draws a panel for each pass that was measured, and writes a PNG.

    Args:
        rows: of one device.
        path: of the picture.
        batch: samples; by default 8, or the largest that was measured.
        experts: E of the contenders that heed the routing.

    Raises:
        ValueError: no contender was measured beside the bare products.
    """
    # One dtype at a time: that of most rows.
    dtypes = [row.workload.dtype for row in rows]
    dtype = max(sorted(set(dtypes)), key=dtypes.count, default=None)
    rows = [row for row in rows if row.workload.dtype == dtype]
    batches = {row.workload.B for row in rows}
    batch = batch or (8 if 8 in batches else max(batches, default=1))
    drawn = points(rows, batch, experts)
    passes = [name for name in _PASSES if any(workload.direction == name for _, workload in drawn)]
    if not passes:
        raise ValueError(f"{path.name} needs rows of {_FLOOR} and of other contenders at B = {batch}, got none.")
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 1.6 + 3.4 * len(passes)), layout="constrained")
        panels = figure.subplots(len(passes), squeeze=False)[:, 0]
        for axes, name in zip(panels, passes, strict=True):
            _panel(axes, {key: point for key, point in drawn.items() if key[1].direction == name}, name)
        _legend(
            figure, panels, f"One feed-forward, B = {batch}, {dtype}, {experts} experts, dense routing: lower is faster"
        )
        footer = _footer([point.row for point in drawn.values()])
        figure.supxlabel(footer, x=0.01, ha="left", fontsize=8, color="#555555")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _panel(axes: Axes, drawn: dict[tuple[str, Workload], Point], direction: str) -> None:
    workloads = sorted({workload for _, workload in drawn}, key=lambda workload: (workload.D, -workload.L))
    width = min(0.14, 0.84 / len({name for name, _ in drawn}))
    crowded = len(drawn) > 30
    for at, workload in enumerate(workloads):
        # Bars stand side by side, whoever is missing.
        names = [name for name in _LOOKS if (name, workload) in drawn]
        for number, name in enumerate(names):
            point, (color, label) = drawn[name, workload], _LOOKS[name]
            x = at + (number - (len(names) - 1) / 2) * width
            axes.bar(x, point.median, width * 0.9, color=color, label=label)
            axes.vlines(x, point.p20, point.p80, color="#444444", linewidth=0.8)
            text = axes.annotate(f"{point.median:.2f}", (x, point.p80), (0, 2), textcoords="offset points")
            text.set(ha="center", va="bottom", fontsize=7, rotation=90 if crowded else 0)
    axes.axhline(1, color="#D55E00", linewidth=1.2, linestyle="--", label="the bare matrix products: the floor")
    axes.set_xticks(range(len(workloads)), [f"{workload.D} × {workload.L}" for workload in workloads])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("width D × tokens L")
    axes.set_ylabel("time / bare products")
    axes.set_title(direction.replace("+", " + "), loc="left", fontsize=10, fontweight="bold")
    axes.set_xlim(-0.5, len(workloads) - 0.5)
    axes.margins(y=0.12)


def _legend(figure: Figure, panels: Sequence[Axes], title: str) -> None:
    # The title of the legend is that of the picture: a title of the figure would be laid out over the legend.
    found = {}
    for axes in panels:
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [label for label in (label for _, label in _LOOKS.values()) if label in found]
    labels += [label for label in found if label not in labels]
    handles = [found[label] for label in labels]
    style = {"ncols": 4, "columnspacing": 1.5, "frameon": False, "fontsize": 9, "title_fontsize": 12}
    figure.legend(handles, labels, loc="outside upper left", title=title, alignment="left", **style)


def _footer(rows: Sequence[Row]) -> str:
    def values(name: str) -> str:
        return ", ".join(sorted({row.source.get(name, "unknown") for row in rows}))

    threads = "" if rows[0].device == "cuda" else f", threads: {values('threads')}"
    versions = f"commit {values('commit')} · torch {values('torch')} · triton {values('triton')}"
    return f"Medians; whiskers: 20th to 80th percentile. {values('processor')}{threads} · {versions}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.partition(": ")[2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of moe_ffn_*.csv (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="samples (default: 8, or the most that were measured)")
    parser.add_argument("--experts", type=int, default=4, help="(default: 4)")
    options = parser.parse_args(argv)
    try:
        files = sorted(options.results.glob("moe_ffn_*.csv"))
        if not files:
            raise ValueError(f"There is no moe_ffn_*.csv in {options.results}: run python -m benchmarks.moe_ffn first.")
        for file in files:
            picture = options.output / f"{file.stem}.png"
            plot(read_rows(file), picture, options.batch, options.experts)
            print(picture)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
