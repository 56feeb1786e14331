"""Pictures of fixed examples in the course of a training: condition image, output and truth side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtu.compat.private_interfaces import progress_bar_settings
from mtu.data.task_dataset import TaskDataset
from mtu.pipelines import MTUPipeline
from mtu.tasks import TaskSpec
from mtu.training import precision
from mtu.training.multitask.encoding import ExamplePixels, on_device_context, preprocess
from mtu.training.multitask.multitask_config import MultiTaskConfig
from mtu.training.runs.run_config import ValidationConfig

__all__ = ["ValidationExample", "choose_examples", "draw_example_grid", "generate_outputs"]

_EXAMPLES_AT_A_TIME = 4
_GAP, _MARGIN, _LEAST_CELL, _MOST_CELL = 6, 12, 160, 320


class ValidationExample(NamedTuple):
    """An example whose picture is made again and again.

    Args:
        prompt: its prompt.
        pixels: its images, preprocessed as in training.
    """

    prompt: str
    pixels: ExamplePixels


def choose_examples(
    dataset: TaskDataset, spec: TaskSpec, count: int, config: MultiTaskConfig
) -> list[ValidationExample]:
    """Choose examples of a task, spread evenly over its rows.

    Args:
        dataset: the data of the task.
        spec: the task.
        count: number of examples; all rows if there are fewer.
        config: the settings of the objective, whose resolution the examples get.

    Raises:
        ValueError: an image cannot be read.
    """
    count = min(count, len(dataset))
    examples = []
    for row in (index * len(dataset) // count for index in range(count)):
        pixels = preprocess(
            dataset.load_images(row, 0),
            spec,
            *config.height_and_width,
            flip=False,
            description=dataset.describe_row(row),
        )
        examples.append(ValidationExample(dataset.prompts(row)[0][0] if spec.uses_prompt else "", pixels))
    return examples


def generate_outputs(
    pipeline: MTUPipeline,
    examples: Mapping[str, Sequence[ValidationExample]],
    config: MultiTaskConfig,
    validation: ValidationConfig,
) -> dict[str, list[Tensor]]:
    """Generate the output of each example, from the same noise each time.

    Args:
        pipeline: the pipeline; its UNet is on the device of the training, and its other models may be elsewhere.
        examples: the examples of each task.
        config: the settings of the objective, which say in what precision to compute.
        validation: the settings of the pictures.

    Returns:
        The outputs of each task, (3, H, W) float32 in [0, 1].
    """
    unet = pipeline.unet
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    quiet, was_training, checker = progress_bar_settings(pipeline), unet.training, pipeline.safety_checker
    pipeline.set_progress_bar_config(disable=True)
    # A safety checker would paint unfinished pictures black.
    pipeline.safety_checker = None
    unet.eval()
    outputs: dict[str, list[Tensor]] = {}
    try:
        with (
            on_device_context([pipeline.vae, pipeline.text_encoder], unet.device),
            precision.autocast_to(unet.device.type, dtype),
        ):
            for task, chosen in examples.items():
                outputs[task] = []
                for start in range(0, len(chosen), _EXAMPLES_AT_A_TIME):
                    some = chosen[start : start + _EXAMPLES_AT_A_TIME]
                    outputs[task] += _call_pipeline(pipeline, task, some, start, config, validation)
    finally:
        unet.train(was_training)
        pipeline.safety_checker = checker
        pipeline.set_progress_bar_config(**quiet)
    return outputs


def _call_pipeline(
    pipeline: MTUPipeline,
    task: str,
    examples: Sequence[ValidationExample],
    first: int,
    config: MultiTaskConfig,
    validation: ValidationConfig,
) -> list[Tensor]:
    height, width = config.height_and_width
    conditions = [None if e.pixels.condition is None else e.pixels.condition / 2 + 0.5 for e in examples]
    images = pipeline(
        [example.prompt for example in examples],
        conditions,
        task,
        height=height,
        width=width,
        num_inference_steps=validation.inference_steps,
        generator=[torch.Generator().manual_seed(1000 * validation.seed + first + i) for i in range(len(examples))],
        output_type="pt",
    ).images
    return list(images.float().cpu().clamp(0, 1))


def draw_example_grid(title: str, examples: Sequence[ValidationExample], outputs: Sequence[Tensor]) -> Image.Image:
    """Draw a row for each example: condition image (if the task takes one), output and truth, above the prompt.

    Args:
        title: the heading.
        examples: the examples of one task.
        outputs: (3, H, W) in [0, 1] of each.
    """
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)
    rows = []
    for example, output in zip(examples, outputs, strict=True):
        shown = [] if example.pixels.condition is None else [_picture(example.pixels.condition / 2 + 0.5)]
        rows.append([*shown, _picture(output), _picture(example.pixels.target / 2 + 0.5)])
    headings = ["condition", "output", "truth"][-len(rows[0]) :]
    cell_width, cell_height = rows[0][-1].size
    width = max(2 * _MARGIN + len(headings) * (cell_width + _GAP) - _GAP, 2 * _MARGIN + int(bold.getlength(title)))
    lines = [_wrap(example.prompt, font, width - 2 * _MARGIN) for example in examples]
    heights = [cell_height + 4 + 17 * len(wrapped) + 12 for wrapped in lines]
    grid = Image.new("RGB", (width, 66 + sum(heights)), "#eceff1")
    draw = ImageDraw.Draw(grid)
    draw.text((_MARGIN, 12), title, "black", bold)
    for column, heading in enumerate(headings):
        draw.text((_MARGIN + column * (cell_width + _GAP), 42), heading, "#546e7a", font)
    top = 62
    for row, wrapped, height in zip(rows, lines, heights, strict=True):
        for column, picture in enumerate(row):
            grid.paste(picture, (_MARGIN + column * (cell_width + _GAP), top))
        for number, line in enumerate(wrapped):
            draw.text((_MARGIN, top + cell_height + 4 + 17 * number), line, "black", font)
        top += height
    return grid


def _picture(pixels: Tensor) -> Image.Image:
    """A picture in the size of a cell: small ones are enlarged without smoothing, so that pixels can be seen."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    longest = max(picture.size)
    if longest < _LEAST_CELL:
        factor = -(-_LEAST_CELL // longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if longest > _MOST_CELL:
        size = (max(1, picture.width * _MOST_CELL // longest), max(1, picture.height * _MOST_CELL // longest))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of a text, at most three, which fit a width in pixels."""
    if not text:
        return []
    letters = max(8, int(width / (font.getlength("abcdefghij klmnopqrst") / 21)))
    return textwrap.wrap(text, letters, max_lines=3, placeholder=" …")
