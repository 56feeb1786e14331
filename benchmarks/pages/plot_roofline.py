"""The roofline: attained FLOP/s of the feed-forward over its FLOPs a byte, under the two roofs of the machine."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.ffn.roofline import RooflinePoint
from benchmarks.pages.plot_style import FFN_LOOKS, add_legend, text_style, write_picture

_ROOF = "#D55E00"
_SHAPE = {"color": "#999999", "linewidth": 0.6, "linestyle": ":"}
_MARKS = {"eager": "x"}
_TERA = 1e12
# Between two names, as a share of the axis.
_LEAST_GAP = 0.011


def write_plot(roofline_points: Sequence[RooflinePoint], path: Path) -> None:
    """Draws a panel for each dtype on one device, and writes a PNG. Raises ValueError without points."""
    if not roofline_points:
        raise ValueError(f"{path.name} needs forward passes with dense routing at the models' shapes, got none.")
    dtypes = sorted({point.roofs.workload.dtype for point in roofline_points})
    with text_style():
        figure = Figure(figsize=(11, 1.2 + 4 * len(dtypes)), layout="constrained")
        panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            _panel(axes, [point for point in roofline_points if point.roofs.workload.dtype == dtype])
        batch = roofline_points[0].measured.workload.B
        title = f"Roofline of one feed-forward, forward, B = {batch}, dense routing: higher is faster"
        add_legend(figure, panels, title)
        caption = "Roofs: the fastest matrix product of torch, and the fastest way through memory, measured."
        write_picture(figure, path, [point.measured for point in roofline_points], caption)


def _panel(axes: Axes, roofline_points: Sequence[RooflinePoint]) -> None:
    roofs = roofline_points[0].roofs
    ridge = roofs.flops_per_s / roofs.bytes_per_s
    low, high = _span([point.cost.intensity for point in roofline_points] + [ridge], 2)
    peak, slope = roofs.flops_per_s / _TERA, roofs.bytes_per_s / _TERA
    axes.plot([low, ridge, high], [low * slope, peak, peak], color=_ROOF, label="the roofs")
    for name in dict.fromkeys(point.measured.contender for point in roofline_points):
        color, label = FFN_LOOKS[name]
        chosen = [point for point in roofline_points if point.measured.contender == name]
        xs, ys = [point.cost.intensity for point in chosen], [point.flops_per_s / _TERA for point in chosen]
        axes.plot(xs, ys, _MARKS.get(name, "o"), color=color, markersize=7, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    bottom, top = _span([*(point.flops_per_s / _TERA for point in roofline_points), peak], 1.6)
    # Names of shapes stand below all points.
    axes.set_ylim(bottom / 4, top)
    _name_shapes(axes, roofline_points)
    axes.set_xlabel("FLOP for each byte that must move (x, y and weights once)")
    axes.set_ylabel("TFLOP/s")
    roof = f"{peak:.4g} TFLOP/s, {roofs.bytes_per_s / 1e9:,.4g} GB/s"
    axes.set_title(f"{roofs.workload.dtype}: {roof}", loc="left", fontsize=10, fontweight="bold")


def _name_shapes(axes: Axes, roofline_points: Sequence[RooflinePoint]) -> None:
    low, high = axes.get_xlim()
    gap = (high / low) ** _LEAST_GAP
    free = low
    for x, shape in sorted({(point.cost.intensity, point.measured.workload[:2]) for point in roofline_points}):
        axes.axvline(x, **_SHAPE, zorder=0)
        # Neighbours' names would cover each other.
        at = max(x, free)
        text = axes.annotate("{} × {}".format(*shape), (at, axes.get_ylim()[0]), (2, 3), textcoords="offset points")
        text.set(rotation=90, va="bottom", ha="left", fontsize=7, color="#555555")
        free = at * gap


def _span(values: Sequence[float], air: float) -> tuple[float, float]:
    """Limits of a logarithmic axis, wider than the values by a factor on both sides."""
    return min(values) / air, max(values) * air
