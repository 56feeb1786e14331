"""Reading image files as training sees them: decoded in full, upright, and in RGB with 8 bits a channel."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageOps

__all__ = ["convert_to_rgb", "fault_of_path", "is_partly_transparent", "open_image", "read_image"]

# PIL clips wider values (modes "I", "I;16", "F") at 255 instead of scaling them.
_WIDE_MODES = ("I", "F")


def read_image(path: Path) -> PIL.Image.Image:
    """Read an image file: decode it, turn it upright as its EXIF orientation says, and convert it to RGB.

    The conversion is that of `PIL.Image.Image.convert("RGB")`, as in the pipelines: it drops an alpha channel, so that
    the colours beneath show. The image of a file with several frames is the first one.

    Raises:
        ValueError: there is no such file, it is corrupt or truncated, or it has more than 8 bits a channel. The message
            names the file.
    """
    return convert_to_rgb(open_image(path), path)


def fault_of_path(path: Path) -> str | None:
    """A sentence that says why a path leads to no regular file; None if it leads to one."""
    if os.path.isfile(path):
        return None
    if os.path.exists(path):
        return f"{path} is no regular file."
    if os.path.islink(path):
        return f"{path} is a link that leads to {os.readlink(path)}, which is missing."
    return f"There is no file {path}."


def open_image(path: Path) -> PIL.Image.Image:
    """Read an image file in its own mode, decoded in full and turned upright.

    Raises:
        ValueError: as `read_image`.
    """
    PIL.Image.init()  # Where a first thread loads the formats, a second one may miss those that it has not loaded yet.
    fault = fault_of_path(path)
    if fault is not None:  # opening a pipe would wait for ever
        raise ValueError(fault)
    try:
        with PIL.Image.open(path) as image:
            image.load()
            mode, upright = image.mode, ImageOps.exif_transpose(image)
    except PIL.UnidentifiedImageError:
        raise ValueError(f"{path} is no image in a format that Pillow knows.") from None
    except Exception as error:  # Pillow's decoders raise errors of many classes for corrupt files.
        raise ValueError(f"{path} cannot be decoded: {str(error).strip('.') or type(error).__name__}.") from None
    if mode.partition(";")[0] in _WIDE_MODES:
        raise ValueError(f"{path} must have 8 bits a channel, but has the mode {mode!r}: convert it.")
    return upright


def convert_to_rgb(image: PIL.Image.Image, name: Path | str) -> PIL.Image.Image:
    """Convert an image as `convert("RGB")` does, without its warning of palettes with transparency.

    Args:
        image: the image.
        name: the name of the image in messages.

    Raises:
        ValueError: Pillow cannot convert images of this mode.
    """
    try:
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted to RGB: {error}.") from None


def is_partly_transparent(image: PIL.Image.Image) -> bool:
    """Whether a pixel of an image lets something behind it show, which `convert("RGB")` ignores."""
    return image.has_transparency_data and bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)
