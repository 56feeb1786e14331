"""A folder of edited icons as training data, with more rows than images: what a long training reads, on little disk."""

import json
from pathlib import Path

from PIL import Image
from torch import Tensor

from mtu.data.icons.examples import IconDataset

# The icons' own size in pixels.
EDGE = 64


def write_icon_folder(folder: Path, rows: int, images: int) -> None:
    """Write pairs of images and a metadata.jsonl that mtu and `datasets.load_dataset("imagefolder")` read.

    Args:
        folder: an empty folder, made if it is not there.
        rows: rows of the file, which take turns at the images.
        images: pairs of images.
    """
    icons = IconDataset("train", seed=0)
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        example = icons.get_example("edit", number)
        assert example.condition_image is not None
        files = {"condition_file_name": f"before-{number}.png", "target_file_name": f"after-{number}.png"}
        for name, image in zip(files.values(), (example.condition_image, example.target_image), strict=True):
            _to_image(image).save(folder / name)
        lines.append(json.dumps({**files, "prompt": example.prompt}))
    text = "".join(f"{lines[row % images]}\n" for row in range(rows))
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def _to_image(image: Tensor) -> Image.Image:
    return Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
