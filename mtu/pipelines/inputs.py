"""The arguments of a pipeline call, spread to one value per sample and checked before anything runs.

The checks of latents, generators and schedulers are in the pipelines: they need the pipeline's components.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from mtu.tasks import Resample, TaskSpec

__all__ = [
    "Image",
    "PipelineInputs",
    "image_height_and_width",
    "output_height_and_width",
    "parse_pipeline_inputs",
    "prepare_condition_image",
    "resize_and_normalize",
]

_RESAMPLE = {
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
}

# PIL modes with 8 bits per channel. PIL clips wider values (modes "I", "I;16" and "F") at 255 instead of scaling them.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_DTYPES = {"uint8", "float16", "bfloat16", "float32", "float64"}

Image = PIL.Image.Image | np.ndarray | Tensor


class PipelineInputs(NamedTuple):
    """The checked inputs of one pipeline call; each list has one entry per sample.

    Args:
        prompts: the prompts; empty for tasks without a prompt.
        negative_prompts: the negative prompts; empty by default.
        tasks: the task of each sample.
        images: the condition images; None for tasks without an image.
        guidance_scales: s_text of each sample.
        image_guidance_scales: s_image of each sample.
        num_inference_steps: denoising steps of the call.
    """

    prompts: list[str]
    negative_prompts: list[str]
    tasks: list[TaskSpec]
    images: list[Image | None]
    guidance_scales: list[float]
    image_guidance_scales: list[float]
    num_inference_steps: int


def parse_pipeline_inputs(
    model_tasks: Sequence[TaskSpec],
    *,
    prompt: str | Sequence[str | None] | None,
    image: Any,
    task: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    guidance_scale: float | Sequence[float | None] | None,
    image_guidance_scale: float | Sequence[float | None] | None,
    num_inference_steps: int | None,
    num_images_per_prompt: int,
) -> PipelineInputs:
    """Check the arguments of a pipeline call, and spread single values over the samples.

    Arguments that are None get the defaults of each sample's task.

    Args:
        model_tasks: the tasks of the model.
        prompt, image, task, negative_prompt: as in `MTUPipeline.__call__`, but that a task must be given.
        guidance_scale, image_guidance_scale, num_inference_steps: as in `MTUPipeline.__call__`.
        num_images_per_prompt: images per prompt. Each sample is repeated this many times in a row.

    Returns:
        One entry per output in each list.

    Raises:
        ValueError: a task is unknown, lists have different lengths, a task lacks a prompt or image or gets one that it
            does not take, or a number or an image is out of its range.
    """
    if not _is_integer(num_images_per_prompt) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be an integer ≥ 1, but got {num_images_per_prompt!r}.")
    if isinstance(image, Tensor | np.ndarray) and image.ndim == 4:
        image = list(image)
    size = _batch_size(prompt=prompt, image=image, task=task)
    known = {spec.name: spec for spec in model_tasks}
    names = _per_sample("task", task, size)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"Unknown task {name!r}: this model has {list(known)}.")
    tasks = [known[name] for name in names]
    prompts = _checked_prompts(_per_sample("prompt", prompt, size), tasks)
    images = _per_sample("image", image, size)
    for i, (given, spec) in enumerate(zip(images, tasks, strict=True)):
        if (given is None) == spec.takes_image:
            needs, got = ("an image", "none") if spec.takes_image else ("no image", "one")
            raise ValueError(f"Task {spec.name!r} takes {needs}, but sample {i} has {got}.")
        if given is not None:
            _check_image(given, i)
    inputs = PipelineInputs(
        prompts,
        _checked_negative_prompts(_per_sample("negative_prompt", negative_prompt, size)),
        tasks,
        images,
        _scales("guidance_scale", guidance_scale, tasks),
        _scales("image_guidance_scale", image_guidance_scale, tasks),
        _steps(num_inference_steps, tasks),
    )
    repeated = [[value for value in column for _ in range(num_images_per_prompt)] for column in inputs[:-1]]
    return PipelineInputs(*repeated, num_inference_steps=inputs.num_inference_steps)


def output_height_and_width(
    inputs: PipelineInputs,
    height: int | None,
    width: int | None,
    default_size: tuple[int, int] | None,
    size_multiple: int,
) -> tuple[int, int]:
    """Choose the height and width in pixels of all outputs of a call.

    Each image implies its own size times the task's scale, rounded down to the multiple.

    Args:
        inputs: the images and tasks of the call.
        height, width: the size that the user asked for; None: the size that the images imply.
        default_size: height and width for a call without images; None if the model has no default.
        size_multiple: pixels per latent, which must divide height and width.

    Returns:
        Height and width.

    Raises:
        ValueError: the images imply different sizes, height or width is no multiple, or nothing determines the size.
    """
    for name, value in (("height", height), ("width", width)):
        if value is not None and (not _is_integer(value) or value < size_multiple or value % size_multiple):
            raise ValueError(f"{name} must be a positive multiple of {size_multiple} pixels, but got {value!r}.")
    if height is not None and width is not None:
        return int(height), int(width)
    if (height is None) != (width is None):
        raise ValueError(f"Give both height and width or neither, but got height={height} and width={width}.")
    sizes = {}
    for i, (image, spec) in enumerate(zip(inputs.images, inputs.tasks, strict=True)):
        if image is not None:
            rows, columns = (
                edge * spec.scale // size_multiple * size_multiple for edge in image_height_and_width(image)
            )
            sizes.setdefault((rows, columns), i)
    if len(sizes) > 1:
        listed = ", ".join(f"{w}×{h} (sample {i})" for (h, w), i in sizes.items())
        raise ValueError(f"The images of one call must imply one output size, but got {listed}; or give height, width.")
    size = next(iter(sizes), default_size)
    if size is None:
        raise ValueError("This model has no size of its own (sample_size is None): give height and width.")
    if min(size) < size_multiple:
        raise ValueError(f"Images must be at least {size_multiple} pixels high and wide, but got {size[1]}×{size[0]}.")
    return size


def prepare_condition_image(image: Image, spec: TaskSpec, height: int, width: int) -> Tensor:
    """Resize a condition image to the output size with the task's filter, and scale its values to [−1, 1].

    Args:
        image: PIL image, array (H, W, 3) or tensor (3, H, W); float values lie in [0, 1].
        spec: the task, which names the filter.
        height, width: the output size in pixels.

    Returns:
        (3, height, width) float32.
    """
    return resize_and_normalize(image, spec.resample, height, width)


def resize_and_normalize(image: Image, resample: Resample, height: int, width: int) -> Tensor:
    """Resize an image, and scale its values to [−1, 1].

    PIL resizes PIL images and uint8 values with the given filter. PyTorch resizes float values with antialiased
    bilinear interpolation where that is the filter, and bicubic otherwise, because it has no Lanczos filter.

    Args:
        image: PIL image, array (H, W, 3) or tensor (3, H, W); float values lie in [0, 1].
        resample: the filter.
        height, width: the new size in pixels.

    Returns:
        (3, height, width) float32.
    """
    if not isinstance(image, PIL.Image.Image) and _channels_first(image).dtype == torch.uint8:
        image = PIL.Image.fromarray(_channels_first(image).permute(1, 2, 0).contiguous().cpu().numpy())
    if isinstance(image, PIL.Image.Image):
        picture = image.convert("RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), _RESAMPLE[resample])
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    else:
        pixels = _channels_first(image).float()
        if pixels.shape[1:] != (height, width):
            mode = "bilinear" if resample == "bilinear" else "bicubic"
            pixels = F.interpolate(pixels[None], (height, width), mode=mode, antialias=True)[0].clamp(0, 1)
    return pixels * 2 - 1


def image_height_and_width(image: Image) -> tuple[int, int]:
    """Height and width of an image in pixels."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    rows, columns = image.shape[1:] if isinstance(image, Tensor) else image.shape[:2]
    return rows, columns


# ------------------------------------------------------------------------------------------------------------ parts


def _batch_size(**given: Any) -> int:
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list | tuple)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} for {name}" for name, length in lengths.items())
        raise ValueError(f"Lists must have one entry per sample, but got {listed}.")
    size = next(iter(lengths.values()), 1)
    if size == 0:
        raise ValueError("At least one sample is needed, but got empty lists.")
    if size > 1 and isinstance(given["prompt"], str) and isinstance(given["task"], list | tuple):
        raise ValueError(f"Lists must have one entry per sample, but got {size} for task and a single prompt.")
    return size


def _per_sample(name: str, value: Any, size: int) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) != size:
            raise ValueError(f"{name} must have one entry for each of {size} samples, but got {len(value)}.")
        return list(value)
    return [value] * size


def _checked_prompts(prompts: list[Any], tasks: list[TaskSpec]) -> list[str]:
    for i, (prompt, spec) in enumerate(zip(prompts, tasks, strict=True)):
        if not spec.uses_prompt and prompt:
            raise ValueError(f"Task {spec.name!r} takes no prompt, but sample {i} has {prompt!r}.")
        if spec.uses_prompt and not isinstance(prompt, str):
            raise ValueError(f"Task {spec.name!r} needs a prompt (a string), but sample {i} has {prompt!r}.")
    return [prompt or "" for prompt in prompts]


def _checked_negative_prompts(prompts: list[Any]) -> list[str]:
    for i, prompt in enumerate(prompts):
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"A negative prompt is a string or None, but sample {i} has {prompt!r}.")
    return [prompt or "" for prompt in prompts]


def _is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy. Booleans do not count as integers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _scales(name: str, value: Any, tasks: list[TaskSpec]) -> list[float]:
    scales = []
    for given, spec in zip(_per_sample(name, value, len(tasks)), tasks, strict=True):
        default = getattr(spec, name)
        scale = (1.0 if default is None else default) if given is None else given
        is_number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
        if not is_number or not math.isfinite(scale) or scale < 0:
            raise ValueError(f"{name} must be a finite number ≥ 0, but got {scale!r}.")
        scales.append(float(scale))
    return scales


def _steps(given: int | None, tasks: list[TaskSpec]) -> int:
    if given is not None:
        if not _is_integer(given) or given < 1:
            raise ValueError(f"num_inference_steps must be an integer ≥ 1, but got {given!r}.")
        return int(given)
    defaults = {spec.name: spec.num_inference_steps for spec in tasks}
    if len(set(defaults.values())) > 1:
        raise ValueError(f"Tasks of one call share their steps, but have {defaults}: give num_inference_steps.")
    return next(iter(defaults.values()))


def _check_image(image: Any, sample: int) -> None:
    if isinstance(image, PIL.Image.Image):
        if image.mode not in _MODES:
            raise ValueError(f"Pictures have 8 bits per channel, but that of sample {sample} has mode {image.mode!r}.")
        shape, shape_ok = image.size, min(image.size) > 0
    elif isinstance(image, np.ndarray | Tensor):
        shape = tuple(image.shape)
        shape_ok = len(shape) == 3 and min(shape) > 0 and shape[0 if isinstance(image, Tensor) else 2] == 3
    else:
        raise ValueError(f"An image is a PIL image, an array or a tensor, but sample {sample} has a {type(image)}.")
    if not shape_ok:
        raise ValueError(
            f"An image has three colours and at least one pixel (PIL, array (H, W, 3), tensor (3, H, W)), but sample "
            f"{sample} has the size {shape}."
        )
    if isinstance(image, PIL.Image.Image):
        image.load()  # finds a truncated file now, before anything is computed
        return
    dtype = image.dtype.name if isinstance(image, np.ndarray) else str(image.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"Image arrays are float in [0, 1] or uint8, but sample {sample} has {dtype}.")
    values = _channels_first(image)
    if values.is_floating_point():
        if not torch.isfinite(values).all():
            raise ValueError(f"Image values must be finite, but the image of sample {sample} has NaN or infinity.")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 1:
            raise ValueError(f"Image values must be in [0, 1], but sample {sample} has {low} to {high}.")


def _channels_first(image: np.ndarray | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image
    # torch refuses flipped arrays and foreign byte orders, and warns of read-only arrays, so it gets a copy.
    return torch.from_numpy(image.astype(image.dtype.newbyteorder("="))).permute(2, 0, 1)
