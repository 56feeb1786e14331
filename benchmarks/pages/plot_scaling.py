"""Pictures of `results/scaling_*.csv`: µs a token by tokens, samples, tasks and experts."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ffn.scaling_lines import Panel, count_tokens, make_panels, routing_name
from benchmarks.harness.rows import TIMES, Row
from benchmarks.harness.workloads import DENSE
from benchmarks.pages.plot_style import FFN_LOOKS, add_legend, most_common_dtype, text_style, write_picture

_PRODUCTS = ("#D55E00", "the bare matrix products")
_AXES = {
    "tokens": "tokens of a sample",
    "batch": "samples in the batch",
    "tasks": "tasks in the batch",
    "experts": "experts (hidden units in all: the same)",
}
# Routing by line and mark; contenders by colour.
_DASHES = {None: ("-", "o"), 1: (":", "^"), 2: ("--", "s")}
_OTHER_DASHES = ("-.", "D")


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a panel for each quantity that was varied on one device, and writes a PNG. Raises ValueError for none."""
    dtype = most_common_dtype(rows)
    drawn = make_panels([row for row in rows if row.workload.dtype == dtype])
    if not drawn:
        raise ValueError(f"{path.name} needs rows of two token counts, batches, tasks or experts, got none.")
    with text_style():
        lines, columns = (len(drawn) + 1) // 2, min(len(drawn), 2)
        figure = Figure(figsize=(5.5 * columns, 1.4 + 3.2 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, drawn, strict=False):
            _panel(axes, panel)
        for axes in grid[len(drawn) :]:
            axes.set_axis_off()
        add_legend(figure, grid[: len(drawn)], "One feed-forward, forward: time a token, lower is faster")
        shown = [row for panel in drawn for line in panel.lines for row in line.row_by_value.values()]
        write_picture(figure, path, shown, "Medians; bands: 20th to 80th percentile.")


def _panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        color, label = _PRODUCTS if line.contender == "products" else FFN_LOOKS[line.contender]
        style, mark = _DASHES.get(line.K, _OTHER_DASHES)
        label += "" if line.K is DENSE else f", {routing_name(line.K)}"
        xs, rows = list(line.row_by_value), line.row_by_value.values()
        medians, low, high = ([getattr(row, name) / count_tokens(row) for row in rows] for name in TIMES)
        axes.plot(xs, medians, style, color=color, marker=mark, markersize=4, label=label)
        axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)
    ticks = sorted({x for line in panel.lines for x in line.row_by_value})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(_AXES[panel.name])
    axes.set_ylabel("µs a token")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{panel.name}  ({panel.fixed_text})", loc="left", fontsize=10, fontweight="bold")
