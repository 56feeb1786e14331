"""Figures of a training: the routing weights of its model, and the losses of its tasks.

They need matplotlib, which the extra `train` installs and which is imported when a figure is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mtu.training.loss_log import LogEntry

__all__ = ["plot_losses", "plot_routing", "save_figure"]

# Colours that people with colour blindness can tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")


def plot_routing(weights: Tensor, tasks: Sequence[str], layers: Sequence[str], step: int) -> "Figure":
    """Draw the routing weights of each task by layer and expert, and the load of the experts.

    Weights are shown as shares: those of one layer and task sum to 1. The load of an expert is its mean share over all
    layers.

    Args:
        weights: (layers, T, E) routing weights.
        tasks: T names.
        layers: the names of the layers, from the UNet's input to its output.
        step: number of steps made.

    Source: MTU (arXiv 2503.11905), figure 5.
    """
    from matplotlib.figure import Figure

    shares = (weights / weights.sum(-1, keepdim=True)).float().cpu().numpy()
    count, _, experts = shares.shape
    # Equal shares then have the colour in the middle, unless some share is very large.
    largest = max(min(1.0, 2 / experts), shares.max())
    height = 0.9 + len(tasks) * (0.55 + 0.16 * experts) + 2.0
    figure = Figure(figsize=(max(7.0, 2.6 + 0.22 * count), height), layout="constrained", dpi=120)
    ratios = [0.4 + 0.16 * experts] * len(tasks) + [1.7]
    axes = figure.subplots(len(tasks) + 1, 1, height_ratios=ratios)
    image = None
    for axis, task, index in zip(axes, tasks, range(len(tasks)), strict=False):
        image = axis.imshow(shares[:, index].T, aspect="auto", cmap="viridis", vmin=0, vmax=largest, origin="lower")
        axis.set_title(task, loc="left", fontsize=10)
        axis.set_ylabel("expert")
        axis.set_yticks(range(experts), [str(number + 1) for number in range(experts)], fontsize=8)
        _label_layers(axis, layers, shows_names=index == len(tasks) - 1)
    figure.colorbar(image, ax=list(axes[:-1]), label="share of the weight", shrink=0.9, pad=0.01)
    _plot_load(axes[-1], shares.mean(0), tasks)
    figure.suptitle(f"Routing weights after {step} steps", fontsize=12)
    return figure


def plot_losses(entries: Sequence["LogEntry"], tasks: Sequence[str]) -> "Figure":
    """Draw the loss of each task by step, as the log has them, in the colours of `plot_routing`.

    Args:
        entries: the entries of the log, at least one.
        tasks: the tasks of the model.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8.0, 4.8), layout="constrained", dpi=120)
    axis = figure.subplots()
    shown = []
    for task, colour in zip(tasks, _COLOURS * len(tasks), strict=False):
        points = [(entry.step, entry.terms[task]) for entry in entries if task in entry.terms]
        if points:
            marker = "o" if len(points) < 30 else ""
            axis.plot(*zip(*points, strict=True), label=task, color=colour, marker=marker, markersize=3, linewidth=1.3)
            shown += [loss for _, loss in points]
    if shown and max(shown) > 10 * min(shown) > 0:
        axis.set_yscale("log")
        # Over few decades, the usual powers of ten label next to nothing.
        subdivisions = (1, 2, 5) if max(shown) < 1000 * min(shown) else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subdivisions))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("step")
    axis.set_ylabel("loss, mean since the previous point")
    axis.grid(True, which="both", alpha=0.25)
    figure.legend(frameon=False, loc="outside lower center", ncols=min(4, len(tasks)))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png")


def _plot_load(axis: Any, load: np.ndarray, tasks: Sequence[str]) -> None:
    """Bars of the mean share of each expert, one colour a task."""
    experts = load.shape[1]
    width = 0.8 / len(tasks)
    for index, (task, colour) in enumerate(zip(tasks, _COLOURS * len(tasks), strict=False)):
        positions = np.arange(experts) + (index - (len(tasks) - 1) / 2) * width
        axis.bar(positions, load[index], width * 0.92, label=task, color=colour)
    axis.axhline(1 / experts, color="#78909c", linewidth=0.8, linestyle="--")
    axis.set_title("load of the experts, mean over all layers (dashed: equal shares)", loc="left", fontsize=10)
    axis.set_xticks(range(experts), [str(number + 1) for number in range(experts)])
    axis.set_xlabel("expert")
    axis.set_ylabel("share")
    axis.legend(frameon=False, fontsize=8, ncols=min(4, len(tasks)), loc="upper center", bbox_to_anchor=(0.5, -0.28))
    axis.spines[["top", "right"]].set_visible(False)


def _label_layers(axis: Any, layers: Sequence[str], shows_names: bool) -> None:
    """Lines between the blocks of the UNet, with their names below the last heatmap."""
    blocks = [_block_name(layer) for layer in layers]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="white", linewidth=1.2)
    ends = [*starts[1:], len(blocks)]
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axis.set_xticks(centres, [blocks[start] for start in starts] if shows_names else [""] * len(starts), fontsize=8)
    axis.tick_params(axis="x", length=0)


def _block_name(layer: str) -> str:
    """The block of a layer: "down 1" of down_blocks.1.attentions.0.transformer_blocks.0."""
    kind, number = layer.split(".")[:2]
    return {"down_blocks": f"down {number}", "up_blocks": f"up {number}"}.get(kind, "mid")
