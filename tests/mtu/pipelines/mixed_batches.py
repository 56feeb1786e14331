"""A batch of all four tasks, and what the stock pipeline of each task makes of its sample."""

import PIL.Image
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

# float32 rounding of another order of operations (folded or routed, batched or alone), through a few UNet calls and
# guidance: at most 1.5e-6 was measured on images in [0, 1], for all schedulers. Another task's weights, prompt or
# image make a difference of 0.05 and more (`test_law.py`).
TOLERANCE = 2e-5

TASKS = ("text-to-image", "edit", "super-resolution", "remove")
PROMPTS = ("a red bell", "make it blue", "", "remove the bell")
NEGATIVES = ("ugly", "grey", "", "noise")
STEPS = 3


def noise(count: int = 4, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(7))


def seeds(count: int = 4) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def images(picture) -> list[PIL.Image.Image | None]:
    """Of the four tasks, all for an output of 16×16."""
    return [None, picture(16, 16, 1), picture(8, 8, 2), picture(16, 16, 3)]


def run_stock(pipe, name, prompt, image, latents, *, text=None, dual=None, steps=STEPS, **given):
    """What the stock pipeline of a task makes; `image` already has the size of the output, as it must."""
    spec = next(spec for spec in pipe.unet.tasks if spec.name == name)
    stock = pipe.export_task(name)
    stock.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": spec.guidance_scale if text is None else text}
    if spec.takes_image:
        assert isinstance(stock, StableDiffusionInstructPix2PixPipeline)
        # Without dual guidance, i − u drops out of the stock formula at the scale 1.
        default = 1.0 if spec.image_guidance_scale is None else spec.image_guidance_scale
        guidance |= {"image": image, "image_guidance_scale": default if dual is None else dual}
    if latents is None:
        given |= {} if spec.takes_image else {"height": 16, "width": 16}
    return stock(prompt, latents=latents, num_inference_steps=steps, output_type="pt", **{**guidance, **given}).images


def at_output_size(image: PIL.Image.Image | None) -> PIL.Image.Image | None:
    return None if image is None else image.resize((16, 16), PIL.Image.Resampling.BICUBIC)


def assert_same(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def count_unet_rows(pipe) -> list[int]:
    """A list to which each UNet call appends its number of rows."""
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls
