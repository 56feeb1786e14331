"""What the frozen models of a pipeline make of images and prompts: preprocessing, latents and text embeddings.

Each value equals that of diffusers' training scripts. Everything is encoded one image at a time: then an image has the
same latents to the last bit whether it is encoded before the training or within a step.
"""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtu.data.task_dataset import ExampleImages
from mtu.pipelines import MTUPipeline
from mtu.pipelines.inputs import Image, image_height_and_width, resize_and_normalize
from mtu.tasks import Resample, TaskSpec
from mtu.training import precision

__all__ = ["ExamplePixels", "PipelineEncoder", "image_key", "preprocess", "target_latents", "text_key"]

# How far the shapes of a condition image and its target may differ, relatively; sizes that are halved round by a pixel.
_SHAPE_TOLERANCE = 0.02
_PROMPTS_AT_A_TIME = 32


class ExamplePixels(NamedTuple):
    """The preprocessed images of an example.

    Args:
        target: (3, H, W) float32 in [−1, 1].
        condition: likewise; None for tasks without an image.
        sizes: (4,) int64, height and width of the original target, then top and left of the crop. SDXL embeds them.
    """

    target: Tensor
    condition: Tensor | None
    sizes: Tensor


def preprocess(
    images: ExampleImages, spec: TaskSpec, height: int, width: int, *, flip: bool, description: str
) -> ExamplePixels:
    """Resize the images of an example to cover the resolution, and crop their centre, as diffusers' scripts do.

    The shorter edge of the target becomes that of the resolution, by PIL's Lanczos filter. The condition image is
    resized to the same size by the filter of its task and cropped alike, whatever its own size.

    Args:
        images: the images.
        spec: the task.
        height, width: the resolution.
        flip: mirror the images, left to right.
        description: where a user finds the example, for messages.

    Raises:
        ValueError: the condition image is missing, there is one although the task takes none, or its shape is not that
            of the target.
    """
    if (images.condition is None) == spec.takes_image:
        needs, got = ("a", "none") if spec.takes_image else ("no", "one")
        raise ValueError(f"Task {spec.name!r} takes {needs} condition image, but {description} has {got}.")
    original = image_height_and_width(images.target)
    if images.condition is not None:
        own = image_height_and_width(images.condition)
        if abs(own[0] * original[1] / (own[1] * original[0]) - 1) > _SHAPE_TOLERANCE + 1 / min(own):
            raise ValueError(
                f"A condition image must have the shape of its target, but in {description} they have "
                f"{own[1]}×{own[0]} and {original[1]}×{original[0]} pixels."
            )
    resized = _covering_size(original, height, width)
    top, left = (round((edge - kept) / 2) for edge, kept in zip(resized, (height, width), strict=True))

    def prepare(image: Image, resample: Resample) -> Tensor:
        pixels = resize_and_normalize(image, resample, *resized)[:, top : top + height, left : left + width]
        return (pixels.flip(-1) if flip else pixels).contiguous()

    return ExamplePixels(
        prepare(images.target, "lanczos"),
        None if images.condition is None else prepare(images.condition, spec.resample),
        torch.tensor([*original, top, left]),
    )


def target_latents(moments: Tensor, noise: Tensor | None) -> Tensor:
    """Draw unscaled latents from the VAE's distribution, or return its mode.

    Args:
        moments: (n, 2c, h, w) means and log-variances, as the VAE gives them.
        noise: (n, c, h, w) standard normal; None: the mode.

    Returns:
        (n, c, h, w) float32.
    """
    distribution = DiagonalGaussianDistribution(moments)
    mean = distribution.mean.float()
    return mean if noise is None else mean + distribution.std.float() * noise


def image_key(vae_digest: str, image_digest: str, spec: TaskSpec, height: int, width: int, flip: bool) -> str:
    """The key of an example's latents in a cache: a digest of all that determines them."""
    resample = spec.resample if spec.takes_image else None
    return _digest_of("images", 1, vae_digest, image_digest, resample, height, width, flip)


def text_key(text_digest: str, prompt: str) -> str:
    """The key of a prompt's embeddings in a cache: a digest of all that determines them."""
    return _digest_of("text", 1, text_digest, prompt)


class PipelineEncoder:
    """Encodes images and prompts by the frozen models of a pipeline, in their own dtypes.

    Args:
        pipeline: the pipeline.
    """

    def __init__(self, pipeline: MTUPipeline | StableDiffusionXLPipeline) -> None:
        self.pipeline = pipeline
        self.is_xl = isinstance(pipeline, StableDiffusionXLPipeline)

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE."""
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        """The text encoders."""
        both = (self.pipeline.text_encoder, self.pipeline.text_encoder_2 if self.is_xl else None)
        return [encoder for encoder in both if encoder is not None]

    @functools.cached_property
    def vae_digest(self) -> str:
        """A digest of the weights, dtype and configuration of the VAE."""
        return _module_digest(self.vae, dict(self.vae.config))

    @functools.cached_property
    def text_digest(self) -> str:
        """A digest of the text encoders and tokenizers."""
        both = (self.pipeline.tokenizer, self.pipeline.tokenizer_2 if self.is_xl else None)
        tokenizers = [[sorted(one.get_vocab().items()), one.model_max_length] for one in both if one is not None]
        return _digest_of(tokenizers, *(_module_digest(one, one.config.to_dict()) for one in self.text_encoders))

    @torch.no_grad()
    def encode_images(self, pixels: ExamplePixels, description: str) -> dict[str, Tensor]:
        """Encode the images of an example on the VAE's device.

        Args:
            pixels: the preprocessed images.
            description: where a user finds the example, for messages.

        Returns:
            "target" (2c, h, w) moments of the target; "condition" (c, h, w) mode of the condition image, for tasks that
            take one; "sizes" as in `ExamplePixels`. Nothing is scaled.

        Raises:
            FloatingPointError: latents are not finite.
        """
        encoded = {"target": self._moments(pixels.target), "sizes": pixels.sizes}
        if pixels.condition is not None:
            moments = self._moments(pixels.condition)
            encoded["condition"] = DiagonalGaussianDistribution(moments[None]).mode()[0]
        for name, tensor in encoded.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"The VAE, in {self.vae.dtype}, gives latents that are not finite for the {name} image of "
                    f"{description}."
                )
        return encoded

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode prompts on the text encoders' device, as the pipeline does.

        On a CPU, prompts are encoded one by one, so that an embedding does not depend on the others. On other devices,
        where that would take long, embeddings may differ by rounding.

        Returns:
            "prompt_embeds" (L, D) of each prompt, and for SDXL "pooled_prompt_embeds" (P,).
        """
        device = next(self.text_encoders[0].parameters()).device
        step = 1 if device.type == "cpu" else _PROMPTS_AT_A_TIME
        encoded = []
        with precision.autocast_to(device.type, None), _silent_diffusers_context():
            for start in range(0, len(prompts), step):
                some = list(prompts[start : start + step])
                if isinstance(self.pipeline, StableDiffusionXLPipeline):
                    embeds, _, pooled, _ = self.pipeline.encode_prompt(
                        some, device=device, do_classifier_free_guidance=False
                    )
                    parts = zip(embeds, pooled, strict=True)
                    encoded += [{"prompt_embeds": one, "pooled_prompt_embeds": other} for one, other in parts]
                else:
                    embeds = self.pipeline.encode_prompt(some, device, 1, False)[0]
                    encoded += [{"prompt_embeds": one} for one in embeds]
        return encoded

    def _moments(self, image: Tensor) -> Tensor:
        with precision.autocast_to(self.vae.device.type, None):
            posterior = self.vae.encode(image[None].to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.parameters[0]


@contextlib.contextmanager
def on_device_context(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep modules on a device within this context, and bring them back to where they were afterwards."""
    before = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.to(old)


@contextlib.contextmanager
def _silent_diffusers_context() -> Iterator[None]:
    """Silence the pipelines, which warn of each prompt that is too long and is cut off, as in diffusers' scripts."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _covering_size(original: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The smallest height and width of an image's shape that cover a resolution, as torchvision's `Resize` rounds."""
    rows, columns = original
    if rows * width <= columns * height:
        return height, int(height * columns / rows)
    return int(width * rows / columns), width


def _module_digest(module: nn.Module, config: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    # Names and versions of files do not determine what a model computes.
    names = sorted(key for key in config if not key.startswith("_") and key not in ("transformers_version", "dtype"))
    return _digest_of(digest.hexdigest(), {name: config[name] for name in names})


def _digest_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
