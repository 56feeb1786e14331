"""The evaluation of the demo: held-out examples of all four icon tasks, generated in mixed batches and measured."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from mtu.compat.private_interfaces import progress_bar_settings
from mtu.data.icons.examples import EDIT_KINDS, IMAGE_SIZE, IconDataset, IconExample
from mtu.data.images import psnr
from mtu.pipelines import MTUPipeline
from mtu.pipelines.inputs import prepare_condition_image
from mtu.recipes.icons.prompts import IconPicture
from mtu.recipes.icons.score import classify_colours, retrieval_hits
from mtu.storage import write_text

__all__ = [
    "Measurement",
    "before_after_grid",
    "format_measurements",
    "generate_example_images",
    "held_out_examples",
    "measure_quality",
    "write_measurements_csv",
]

_BATCH = 32
_CANDIDATES = 100
# One for each field of a `Measurement`.
_CSV_COLUMNS = ("task", "metric", "examples", "copy", "before", "after", "ceiling")


class Measurement(NamedTuple):
    """One row of the metrics table.

    Args:
        task: the task, and the kind of edit.
        metric: name and unit of the metric.
        num_examples: number of examples.
        copied_input: metric of the condition image itself, as if it were the output; None for tasks without one.
        before_training: metric of the upcycled model before training.
        after_training: metric of the trained model.
        vae_ceiling: metric of the target, encoded and decoded by the VAE.
    """

    task: str
    metric: str
    num_examples: int
    copied_input: float | None
    before_training: float
    after_training: float
    vae_ceiling: float


def held_out_examples(examples_per_row: int, seed: int) -> list[IconExample]:
    """Return test examples for every row of the table. The tasks take turns, so that every batch mixes them.

    Image-to-image tasks show icons that training never shows in any variant. Text-to-image shows names of the training
    set in held-out combinations with colour and background.

    Args:
        examples_per_row: number of examples of each row.
        seed: seed of the examples.
    """
    icons = IconDataset("test", seed)
    rows: dict[str, list[IconExample]] = {}
    for task in ("text-to-image", "super-resolution", "remove"):
        rows[task] = icons.get_examples(task, range(examples_per_row))
    for kind in EDIT_KINDS:
        rows[kind] = []
    index = 0
    while any(len(rows[kind]) < examples_per_row for kind in EDIT_KINDS):
        example = icons.get_example("edit", index)
        if len(rows[example.edit_kind]) < examples_per_row:
            rows[example.edit_kind].append(example)
        index += 1
    return [rows[row][i] for i in range(examples_per_row) for row in rows]


def generate_example_images(
    pipeline: MTUPipeline,
    examples: Sequence[IconExample],
    seed: int,
    description: str,
    steps: int | None = None,
) -> Tensor:
    """Generate an image for every example, in batches that mix the tasks.

    Args:
        pipeline: the multi-task pipeline.
        examples: the examples.
        seed: seed of the noise. Each image has its own generator.
        description: label of the progress bar.
        steps: denoising steps; None: the tasks' own number.

    Returns:
        (n, 3, 64, 64) float32 in [−1, 1].
    """
    quiet = progress_bar_settings(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with tqdm(total=len(examples), desc=description, unit="image") as bar:
        for start in range(0, len(examples), _BATCH):
            chunk = examples[start : start + _BATCH]
            numbers = range(start, start + len(chunk))
            output = pipeline(
                [example.prompt for example in chunk],
                [None if example.condition_image is None else example.condition_image / 2 + 0.5 for example in chunk],
                [example.task_name for example in chunk],
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(1000 * seed + number) for number in numbers],
                output_type="pt",
            )
            images.append(output.images.float().cpu() * 2 - 1)
            bar.update(len(chunk))
    pipeline.set_progress_bar_config(**quiet)
    return torch.cat(images)


@torch.no_grad()
def measure_quality(
    pipeline: MTUPipeline, examples: Sequence[IconExample], before: Tensor, after: Tensor
) -> list[Measurement]:
    """Compare images of the model before and after training with the true targets.

    Image-to-image tasks are measured by median PSNR, and text-to-image by the icon and colours of its caption.

    Args:
        pipeline: the pipeline, whose VAE gives the ceiling.
        examples: n held-out examples.
        before, after: (n, 3, 64, 64) in [−1, 1], the images of the examples.

    Returns:
        The rows of the metrics table.
    """
    targets = torch.stack([example.target_image for example in examples])
    vae = pipeline.vae
    latents = vae.encode(targets.to(vae.device, vae.dtype)).latent_dist.mode()
    ceiling = vae.decode(latents).sample.float().cpu().clamp(-1, 1)
    specs = {spec.name: spec for spec in pipeline.unet.tasks}
    copies = torch.stack(
        [
            torch.zeros_like(example.target_image)
            if example.condition_image is None
            else prepare_condition_image(
                example.condition_image / 2 + 0.5, specs[example.task_name], IMAGE_SIZE, IMAGE_SIZE
            )
            for example in examples
        ]
    )
    rows = []
    for row in dict.fromkeys(_row_name(example) for example in examples):
        where = [i for i, example in enumerate(examples) if _row_name(example) == row]
        if row == "text-to-image":
            shown = [_parse_caption(examples[i].prompt) for i in where]
            for metric, score in (("icon top-1 of 100 (%)", _retrieval), ("colours right (%)", _colours)):
                values = [score(images[where], shown) for images in (before, after, ceiling)]
                rows.append(Measurement(row, metric, len(where), None, *values))
        else:
            values = [
                statistics.median(psnr(images[where], targets[where]).tolist())
                for images in (copies, before, after, ceiling)
            ]
            rows.append(Measurement(row, "PSNR (dB)", len(where), *values))
    return rows


def format_measurements(rows: Sequence[Measurement]) -> str:
    """Format measurements as a Markdown table."""
    lines = [
        "| task | metric | examples | copying the input | before | after | VAE's ceiling |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        copy = "–" if row.copied_input is None else f"{row.copied_input:.1f}"
        lines.append(
            f"| {row.task} | {row.metric} | {row.num_examples} | {copy} | {row.before_training:.1f} | "
            f"{row.after_training:.1f} | {row.vae_ceiling:.1f} |"
        )
    return "\n".join(lines)


def write_measurements_csv(path: Path, rows: Sequence[Measurement], provenance: dict[str, object]) -> None:
    """Write measurements as CSV, with the provenance in every row."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*_CSV_COLUMNS, *provenance])
    for row in rows:
        values = ["" if v is None else round(v, 3) if isinstance(v, float) else v for v in row]
        writer.writerow([*values, *provenance.values()])
    write_text(path, text.getvalue())


def before_after_grid(
    examples: Sequence[IconExample], before: Tensor, after: Tensor, examples_per_row: int = 4
) -> Image.Image:
    """Arrange input, image before training, image after training and target of examples side by side.

    Args:
        examples: n examples.
        before, after: (n, 3, 64, 64) in [−1, 1], the images of the examples.
        examples_per_row: number of examples of each task or kind of edit, which form a row.
    """
    cell, gap, label_height, names_width = IMAGE_SIZE, 6, 26, 112
    block = 4 * (cell + 2) + 2 * gap
    rows: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        rows.setdefault(_row_name(example), []).append(i)
    width = names_width + examples_per_row * block
    height = label_height + len(rows) * (cell + label_height)
    grid = Image.new("RGB", (width, height), "#eceff1")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(11)
    for column in range(examples_per_row):
        for k, heading in enumerate(("input", "before", "after", "target")):
            draw.text((names_width + column * block + k * (cell + 2), 8), heading, "gray", font)
    for line, (row, where) in enumerate(rows.items()):
        top = label_height + line * (cell + label_height)
        draw.text((4, top + cell // 2 - 6), row, "black", font)
        for column, i in enumerate(where[:examples_per_row]):
            left = names_width + column * block
            shown = (examples[i].condition_image, before[i], after[i], examples[i].target_image)
            for k, image in enumerate(shown):
                if image is not None:
                    grid.paste(_picture(image, cell), (left + k * (cell + 2), top))
            draw.text((left, top + cell + 4), examples[i].prompt[:44], "black", font)
    return grid


def _row_name(example: IconExample) -> str:
    return f"{example.task_name}: {example.edit_kind}" if example.edit_kind else example.task_name


def _parse_caption(prompt: str) -> IconPicture:
    """The icon that a caption of the data set describes."""
    words = prompt.removeprefix("a ").split()
    style = "-outline" if words[1] == "outlined" else ""
    name = words[-3]
    return IconPicture(name + style, words[0], words[-1])


def _bytes(images: Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def _retrieval(images: Tensor, shown: Sequence[IconPicture]) -> float:
    return 100 * float(retrieval_hits(_bytes(images), shown, _CANDIDATES, 0).mean())


def _colours(images: Tensor, shown: Sequence[IconPicture]) -> float:
    colours, backgrounds = classify_colours(_bytes(images))
    right = [
        (colour, background) == (picture.colour, picture.background)
        for colour, background, picture in zip(colours, backgrounds, shown, strict=True)
    ]
    return 100 * statistics.fmean(right)


def _picture(image: Tensor, size: int) -> Image.Image:
    picture = Image.fromarray(np.rint(_bytes(image[None])[0]).astype(np.uint8))
    return picture if picture.width == size else picture.resize((size, size), Image.Resampling.NEAREST)
