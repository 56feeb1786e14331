"""The icons of the Material Design Icons font as masks, rendered once and kept in memory."""

import importlib.util
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

FONT_PACKAGE = "fonticon_mdi7"
FONT_FILE = "fonts/materialdesignicons-webfont.ttf"
# The em square fills this fraction of the image, so that strokes at its edge keep a margin of background.
EM_FRACTION = 7 / 8


def font_path() -> Path:
    """Find the icon font, without importing the package that carries it.

    Returns:
        The path of the TrueType file.

    Raises:
        FileNotFoundError: The font package is not installed.
    """
    spec = importlib.util.find_spec(FONT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / FONT_FILE
        if path.is_file():
            return path
    raise FileNotFoundError('The icon font is not installed; run: pip install "mtu[train]".')


@lru_cache(maxsize=1)
def code_points_by_icon_name() -> dict[str, int]:
    """Return the code point of every icon name of the font, sorted by name.

    Returns:
        A dictionary from icon name to Unicode code point; 7,279 entries in version 7 of the font.

    Raises:
        ValueError: The font maps no Unicode code points.
    """
    # The font's `post` table ends in two stray bytes; fontTools warns of them at every opening.
    logger = logging.getLogger("fontTools.ttLib.tables._p_o_s_t")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with TTFont(font_path(), lazy=True) as font:
            code_points = font.getBestCmap()
    finally:
        logger.setLevel(level)
    if code_points is None:
        raise ValueError(f"The icon font must map Unicode code points to icons, but {font_path()} maps none.")
    # Some names have two code points. The smallest one does not depend on the order within the font.
    names: dict[str, int] = {}
    for code_point, name in sorted(code_points.items()):
        names.setdefault(name, code_point)
    return dict(sorted(names.items()))


@lru_cache(maxsize=1)
def mask_indices_by_icon_name() -> dict[str, int]:
    """Return the index of each icon name in the arrays of `icon_masks`."""
    return {name: row for row, name in enumerate(code_points_by_icon_name())}


@lru_cache(maxsize=4)
def icon_masks(size: int) -> np.ndarray:
    """Render all icons as antialiased masks.

    The font places icons within their em square, so an icon and its outlined variant coincide exactly.

    Args:
        size: height and width in pixels.

    Returns:
        (N, size, size) uint8, read-only: 0 outside the icon and 255 inside, in the order of `code_points_by_icon_name`.
    """
    em = round(size * EM_FRACTION)
    font = ImageFont.truetype(str(font_path()), em)
    ascent, _ = font.getmetrics()
    margin = (size - em) // 2
    rendered = np.zeros((len(code_points_by_icon_name()), size, size), dtype=np.uint8)
    for row, code_point in enumerate(code_points_by_icon_name().values()):
        canvas = Image.new("L", (size, size))
        ImageDraw.Draw(canvas).text((margin, margin + ascent), chr(code_point), font=font, fill=255, anchor="ls")
        rendered[row] = np.asarray(canvas)
    rendered.setflags(write=False)
    return rendered
