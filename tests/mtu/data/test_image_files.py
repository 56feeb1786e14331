"""Reading image files: upright, in RGB with 8 bits a channel, or a sentence that names the file."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mtu.data.image_files import is_partly_transparent, open_image, read_image


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_cameras_is_applied(tmp_path, orientation):
    """Each orientation is a way to store the same picture, whose upper left corner is white."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    stored = upright.swapaxes(0, 1) if orientation > 4 else upright
    stored = stored[::-1] if orientation in (3, 4, 6, 7) else stored
    stored = stored[:, ::-1] if orientation in (2, 3, 7, 8) else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "photo.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path)), upright)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_with_8_bits_become_rgb_as_in_pipelines(tmp_path, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 5, 4), np.uint8))
    image = image.convert(mode) if mode in ("LA", "RGBA") else image.convert("RGB").convert(mode)
    found = read_image(save(tmp_path / "image.tif", image))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_the_colours_beneath_transparency_show(tmp_path):
    image = Image.new("P", (3, 2), 7)
    image.putpalette([*range(60)])
    palette = save(tmp_path / "palette.png", image, transparency=bytes([0] * 20))
    assert read_image(palette).getpixel((0, 0)) == (21, 22, 23)
    clear = save(tmp_path / "clear.png", Image.new("RGBA", (3, 2), (1, 2, 3, 0)))
    assert read_image(clear).getpixel((0, 0)) == (1, 2, 3)
    opaque = save(tmp_path / "opaque.png", Image.new("RGBA", (3, 2), (1, 2, 3, 255)))
    paths = (palette, clear, opaque, save(tmp_path / "rgb.png", Image.new("RGB", (3, 2))))
    assert [is_partly_transparent(open_image(path)) for path in paths] == [True, True, False, False]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_bits_are_refused(tmp_path, mode):
    path = save(tmp_path / "deep.tif", Image.new(mode, (3, 2)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} must have 8 bits a channel, but has the mode 'I|F"):
        read_image(path)


FORMATS = [".png", ".jpg", ".gif", ".bmp", ".tif", ".ppm", *([".webp"] if features.check("webp") else [])]


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_that_are_cut_short_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = save(tmp_path / f"image{suffix}", Image.fromarray(noise))
    whole = path.read_bytes()
    assert read_image(path).size == (40, 40)
    for length in (0, 1, 10, 40, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} (is no image|cannot be decoded: .+)"):
            read_image(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, message in {
        "none.png": "^There is no file {}",
        "long" * 100: "^There is no file {}",
        "": "^{} is no regular file",
        "pipe.png": "^{} is no regular file",
        "dead.png": "^{} is a link that leads to gone.png, which is missing",
        "loop.png": "^{} is a link that leads to loop.png, which is missing",
    }.items():
        path = tmp_path / name
        with pytest.raises(ValueError, match=message.format(re.escape(str(path))) + r"\.$"):
            read_image(path)
