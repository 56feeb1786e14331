"""The style of all pictures: colours, letters, the legend, and the line with the provenance."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.rows import Row

# Looks of the feed-forward's contenders in the order of the legend. Families share a hue; colours are told apart by
# colour-blind readers, too. Contenders that are not listed are not drawn.
FFN_LOOKS = {
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
FLOOR_LOOK = ("#D55E00", "the bare matrix products: the floor")
_LETTERS = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_GREY = "#555555"


def text_style() -> AbstractContextManager[None]:
    """The context that pictures are drawn in: sizes of letters, no frame."""
    return mpl.rc_context(_LETTERS)


def add_legend(
    figure: Figure, panels: Sequence[Axes], title: str, labels: Sequence[str] = (), columns: int = 4
) -> None:
    """One legend above all panels, each label once, those of `labels` first; its title is that of the picture.

    A title of the figure would be laid out over the legend.
    """
    found = {}
    for axes in panels:
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    ordered = [label for label in labels if label in found]
    ordered += [label for label in found if label not in ordered]
    style = {"columnspacing": 1.5, "frameon": False, "fontsize": 9, "title_fontsize": 12}
    handles = [found[label] for label in ordered]
    place = {"loc": "outside upper left", "title": title, "alignment": "left", "ncols": columns}
    figure.legend(handles, ordered, **place, **style)


def write_picture(figure: Figure, path: Path, rows: Sequence[Row], caption: str) -> None:
    """Writes a PNG with a line below it: the caption, and the provenance of the rows."""
    device = "" if rows[0].device == "cuda" else f", threads: {_values(rows, 'threads')}"
    versions = " · ".join(f"{name} {_values(rows, name)}" for name in ("commit", "torch", "triton"))
    text = f"{_values(rows, 'processor')}{device} · {versions}"
    # As many letters of this size as fit into an inch.
    wide = len(caption) + len(text) > 15 * figure.get_figwidth()
    text = caption + ("\n" if wide else " ") + text
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=_GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _values(rows: Sequence[Row], name: str) -> str:
    return ", ".join(sorted({row.source.get(name, "unknown") for row in rows}))


def most_common_dtype(rows: Sequence[Row]) -> str | None:
    """The dtype of most rows: a picture shows one at a time."""
    dtypes = [row.workload.dtype for row in rows]
    return max(sorted(set(dtypes)), key=dtypes.count, default=None)
