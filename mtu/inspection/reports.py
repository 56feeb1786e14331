"""Reports: a table with its notes, and how numbers of parameters and FLOPs are written in it."""

from collections.abc import Sequence
from typing import NamedTuple

from mtu.example_inputs import CLIP_TEXT_TOKENS

__all__ = ["Report", "flop_counting_note", "format_count", "format_flops"]


class Report(NamedTuple):
    """A table, and the text around it; `str` gives it as plain text with aligned columns.

    Attributes:
        summary: the text above the table.
        table: the cells of each line, the header first.
        footer: the text below the table.
        num_left_aligned_columns: number of first columns that are aligned to the left; the others are to the right.
    """

    summary: str
    table: Sequence[Sequence[str]]
    footer: str
    num_left_aligned_columns: int = 0

    def __str__(self) -> str:
        return f"{self.summary}\n\n{self.format_table()}\n\n{self.footer}"

    def format_table(self) -> str:
        """The table as lines of text, with columns two spaces apart."""
        widths = [max(len(cell) for cell in column) for column in zip(*self.table, strict=True)]
        sides = ["<" if i < self.num_left_aligned_columns else ">" for i in range(len(widths))]
        aligned = ([f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)] for line in self.table)
        return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def flop_counting_note(image_size: int, latent_size: int) -> str:
    """Explain the FLOPs of a table in two lines of text.

    Args:
        image_size: edge of the image in pixels.
        latent_size: edge of its latents.
    """
    return (
        f"FLOPs: one forward of the UNet at {image_size} x {image_size} (latents {latent_size} x {latent_size}), "
        f"batch 1, {CLIP_TEXT_TOKENS} text tokens.\nA multiply-add counts as two. Convolutions and linear layers; the "
        "two products inside attention only where named."
    )


def format_count(count: int) -> str:
    """Format a number of parameters: 1.524 B, 859.5 M, 12.3 K, 16."""
    for unit, symbol, digits in ((10**9, "B", 3), (10**6, "M", 1), (10**3, "K", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {symbol}"
    return str(count)


def format_flops(count: int) -> str:
    """Format a number of FLOPs: 0.677 T, 2.350 G, 0.075 G."""
    for unit, symbol in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        # Papers write 0.677 T instead of 677 G, so a unit serves from a tenth of it on.
        if count >= unit // 10:
            return f"{count / unit:.3f} {symbol}"
    return str(count)
