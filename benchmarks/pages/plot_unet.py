"""Pictures of `results/unet_*.csv`: a denoising step of each contender relative to that of the original."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from benchmarks.harness.rows import TIMES, Row
from benchmarks.models.steps import Case, MeasuredStep, ModelSetup, Steps, steps_by_setup, usual_cases
from benchmarks.pages.plot_style import text_style, write_picture

# Families as in the pictures of one feed-forward; folded ones darker, peers apart from all.
_COLORS = {
    "stock": "#000000",
    "stock-recipe": "#E69F00",
    "mtu-eager": "#56B4E9",
    "mtu-cpp": "#009E73",
    "mtu-triton": "#0072B2",
    "mtu-cpp-folded": "#005C43",
    "mtu-triton-folded": "#00466E",
    "four-unets": "#CC79A7",
    "swapped-unets": "#CC79A7",
    "lora-hotswap": "#B8A429",
    "lora-per-sample": "#B8A429",
}
_OTHER = "#999999"
_ORIGINAL = "#D55E00"
# A bar that is many times as long as the others would leave them no room: it is cut, and its number stands in it.
_LONGEST = 3.0


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a panel for each model and batch, of dense routing with mixed tasks on one device, and writes a PNG.

    Raises ValueError where no contender was measured beside the original.
    """
    drawn = {setup: _relative(usual_cases(cases)) for setup, cases in steps_by_setup(rows).items()}
    drawn = {setup: cases for setup, cases in drawn.items() if cases}
    if not drawn:
        raise ValueError(f"{path.name} needs rows of stock and of contenders in its group, got none.")
    batches = max((sorted({B for steps in cases.values() for B in steps}) for cases in drawn.values()), key=len)
    with text_style():
        heights = [0.6 + 0.24 * len(cases) for cases in drawn.values()]
        figure = Figure(figsize=(max(6.0, 2.2 + 2.2 * len(batches)), 1.2 + sum(heights)), layout="constrained")
        title = "One denoising step, time / the original's, run eagerly: shorter is faster"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        parts = figure.subfigures(len(drawn), squeeze=False, height_ratios=heights)[:, 0]
        for part, (setup, cases) in zip(parts, drawn.items(), strict=True):
            _setup(part, setup, cases)
        shown = [step.measured for cases in drawn.values() for steps in cases.values() for step in steps.values()]
        write_picture(figure, path, shown, "Medians; whiskers: 20th to 80th percentile.")


def _relative(cases: Steps) -> Steps:
    paired_rows = {case: {B: step for B, step in steps.items() if step.original_row} for case, steps in cases.items()}
    return {case: steps for case, steps in paired_rows.items() if steps}


def _setup(part: SubFigure, setup: ModelSetup, cases: Steps) -> None:
    batches = sorted({B for steps in cases.values() for B in steps})
    longest = max(
        step.relative_to_original(step.measured.p80_us) for steps in cases.values() for step in steps.values()
    )
    limit = min(longest, _LONGEST) * 1.25
    part.suptitle(str(setup), x=0.01, ha="left", fontsize=10, fontweight="bold")
    panels = part.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, B in zip(panels, batches, strict=True):
        steps = {case: steps[B] for case, steps in cases.items() if B in steps}
        original = next(step.original_row for step in steps.values() if step.original_row is not None)
        axes.set_title(f"B = {B}  ({original.median_us / 1e3:,.0f} ms)", loc="left", fontsize=9)
        _bars(axes, list(cases), steps, limit)
    panels[0].set_yticks(range(len(cases)), list(map(str, cases)), fontsize=8)
    panels[0].set_ylim(len(cases) - 0.4, -0.6)


def _bars(axes: Axes, cases: Sequence[Case], steps: dict[Case, MeasuredStep], limit: float) -> None:
    for at, case in enumerate(cases):
        if case not in steps:
            continue
        step = steps[case]
        median, low, high = (step.relative_to_original(getattr(step.measured, column)) for column in TIMES)
        axes.barh(at, min(median, limit), 0.8, color=_COLORS.get(case.family, _OTHER))
        axes.hlines(at, min(low, limit), min(high, limit), color="#444444", linewidth=0.8)
        cut = high > limit * 0.85
        x, away, side, color = (min(median, limit), -3, "right", "white") if cut else (high, 3, "left", "black")
        text = axes.annotate(f"{median:.2f}", (x, at), (away, 0), textcoords="offset points")
        # The line of the original must not run through a number.
        box = {} if cut else {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.4}}
        text.set(ha=side, va="center", fontsize=7, color=color, **box)
    axes.axvline(1, color=_ORIGINAL, linewidth=1, linestyle="--")
    axes.set_xlim(0, limit)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
