"""Pictures of `results/moe_ffn_*.csv`: each contender's time relative to the floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ffn.targets import paired_rows
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Setting, Workload
from benchmarks.pages.plot_style import FFN_LOOKS, FLOOR_LOOK, add_legend, most_common_dtype, text_style, write_picture

_FLOOR = "products"
_EXPERTS = 4
_PASSES = ("forward", "forward+backward")


class RelativeTime(NamedTuple):
    """A contender's time over that of the two (or six) bare products, at its median and the percentiles 20 and 80."""

    row: Row
    median: float
    p20: float
    p80: float


def last_relative_times(rows: Sequence[Row], batch: int, experts: int) -> dict[tuple[str, Workload], RelativeTime]:
    """For each contender and workload of this batch size the last measurement with dense routing.

    Rows of contenders that depend on the routing are those of `experts` experts and one task.
    """
    drawn = {}
    for name in FFN_LOOKS:
        for row, floor in paired_rows(rows, name, _FLOOR):
            if batch == row.workload.B and row.setting in (Setting(), Setting(E=experts)):
                times = (time / floor.median_us for time in (row.median_us, row.p20_us, row.p80_us))
                # Where one expert was measured, too, the row of several experts counts.
                known = drawn.get((name, row.workload))
                if known is None or row.setting.E >= known.row.setting.E:
                    drawn[name, row.workload] = RelativeTime(row, *times)
    return drawn


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a panel for each pass that was measured on one device, and writes a PNG.

    The batch is 8, or the largest that was measured. Raises ValueError without rows of the bare products.
    """
    dtype = most_common_dtype(rows)
    rows = [row for row in rows if row.workload.dtype == dtype]
    batches = {row.workload.B for row in rows}
    batch = 8 if 8 in batches else max(batches, default=1)
    drawn = last_relative_times(rows, batch, _EXPERTS)
    passes = [name for name in _PASSES if any(workload.direction == name for _, workload in drawn)]
    if not passes:
        raise ValueError(f"{path.name} needs rows of {_FLOOR} and of other contenders at B = {batch}, got none.")
    with text_style():
        figure = Figure(figsize=(11, 1.6 + 3.4 * len(passes)), layout="constrained")
        panels = figure.subplots(len(passes), squeeze=False)[:, 0]
        for axes, name in zip(panels, passes, strict=True):
            _panel(axes, {key: point for key, point in drawn.items() if key[1].direction == name}, name)
        title = f"One feed-forward, B = {batch}, {dtype}, {_EXPERTS} experts, dense routing: lower is faster"
        add_legend(figure, panels, title, [label for _, label in FFN_LOOKS.values()])
        write_picture(
            figure, path, [point.row for point in drawn.values()], "Medians; whiskers: 20th to 80th percentile."
        )


def _panel(axes: Axes, drawn: dict[tuple[str, Workload], RelativeTime], direction: str) -> None:
    workloads = sorted({workload for _, workload in drawn}, key=lambda workload: (workload.D, -workload.L))
    width = min(0.14, 0.84 / len({name for name, _ in drawn}))
    crowded = len(drawn) > 30
    for at, workload in enumerate(workloads):
        # Bars stand side by side, without gaps for missing contenders.
        names = [name for name in FFN_LOOKS if (name, workload) in drawn]
        for number, name in enumerate(names):
            point, (color, label) = drawn[name, workload], FFN_LOOKS[name]
            x = at + (number - (len(names) - 1) / 2) * width
            axes.bar(x, point.median, width * 0.9, color=color, label=label)
            axes.vlines(x, point.p20, point.p80, color="#444444", linewidth=0.8)
            text = axes.annotate(f"{point.median:.2f}", (x, point.p80), (0, 2), textcoords="offset points")
            text.set(ha="center", va="bottom", fontsize=7, rotation=90 if crowded else 0)
    axes.axhline(1, color=FLOOR_LOOK[0], linewidth=1.2, linestyle="--", label=FLOOR_LOOK[1])
    axes.set_xticks(range(len(workloads)), [f"{workload.D} × {workload.L}" for workload in workloads])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("width D × tokens L")
    axes.set_ylabel("time / bare products")
    axes.set_title(direction.replace("+", " + "), loc="left", fontsize=10, fontweight="bold")
    axes.set_xlim(-0.5, len(workloads) - 0.5)
    axes.margins(y=0.12)
