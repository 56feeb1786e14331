"""How good the base model is, measured on held-out combinations and unseen icons."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from mtu.data.icons.catalogue import (
    BACKGROUND_COLOURS,
    CROSSED_OUT_SUFFIX,
    ICON_COLOURS,
    OUTLINE_SUFFIX,
    Split,
    caption,
    text_to_image_names,
)
from mtu.data.icons.examples import IMAGE_SIZE, paint_icon
from mtu.recipes.icons.device import usable_device
from mtu.recipes.icons.prompts import IconPicture, icon_pictures
from mtu.recipes.icons.vae import reconstruction_psnr
from mtu.storage import write_text


@dataclass(frozen=True)
class ScoreConfig:
    """How to score.

    Attributes:
        samples: pictures generated for the scores on the test split.
        validation_samples: pictures per guidance scale when the scale is chosen, on the validation split.
        guidance_scales: scales to choose from.
        steps: denoising steps.
        candidates: pictures among which retrieval looks for the right one.
        reconstructions: pictures per kind for the autoencoder's PSNR.
        seed: of the requests and of the noise.
    """

    samples: int = 256
    validation_samples: int = 40
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 7.5)
    steps: int = 20
    candidates: int = 100
    reconstructions: int = 100
    seed: int = 0


def sample_icon_pictures(split: Split, count: int, seed: int) -> list[IconPicture]:
    """Draw plain and outlined icons, at equal rates, in combinations that are in a split, none twice."""
    rng = np.random.default_rng([seed, 5])
    pictures = [picture for picture in icon_pictures(split) if not picture.name.endswith(CROSSED_OUT_SUFFIX)]
    chosen = rng.permutation(len(pictures))[:count]
    return [pictures[i] for i in chosen]


@torch.no_grad()
def generate_from_captions(
    pipeline: StableDiffusionPipeline, pictures: Sequence[IconPicture], scale: float, steps: int, seed: int
) -> np.ndarray:
    """Generate a picture for the caption of each request.

    Returns:
        (n, 64, 64, 3) float32 in 0 … 255.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images: list[Tensor] = []
    for start in range(0, len(pictures), 64):
        prompts = [caption(*picture) for picture in pictures[start : start + 64]]
        output = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="pt"
        )
        images.append(output.images.cpu())
    return torch.cat(images).permute(0, 2, 3, 1).numpy() * 255


def nearest_colour_names(colours: np.ndarray, named: dict[str, tuple[int, int, int]]) -> list[str]:
    """Return the name of the nearest named colour for each row of (n, 3)."""
    table = np.array(list(named.values()), dtype=np.float64)
    distances = np.square(colours[:, None] - table).sum(-1)
    return [tuple(named)[i] for i in distances.argmin(1)]


def classify_colours(images: np.ndarray) -> tuple[list[str], list[str]]:
    """Read an icon's colour and background off pictures.

    The background is the median of the outermost two rows and columns, which no icon reaches. The icon's colour is
    the mean over pixels at least half as far from that background as the farthest pixel is.

    Args:
        images: (n, h, w, 3) in 0 … 255.

    Returns:
        Names of colours and names of backgrounds.
    """
    frame = np.ones(images.shape[1:3], dtype=bool)
    frame[2:-2, 2:-2] = False
    behind = np.median(images[:, frame], axis=1)
    distance = np.sqrt(np.square(images - behind[:, None, None]).sum(-1))
    inside = distance >= 0.5 * distance.max(axis=(1, 2), keepdims=True)
    colours = (images * inside[..., None]).sum((1, 2)) / inside.sum((1, 2))[:, None]
    return nearest_colour_names(colours, ICON_COLOURS), nearest_colour_names(behind, BACKGROUND_COLOURS)


def retrieval_hits(images: np.ndarray, pictures: Sequence[IconPicture], candidates: int, seed: int) -> np.ndarray:
    """Tell for which pictures the requested icon is the nearest of many candidates.

    All candidates are painted in the requested colour and background, so only the shape decides. They are the
    requested icon, the same name in the other style, and random other (name, style) pairs; the nearest is that of
    the smallest mean squared pixel error.

    Args:
        images: (n, 64, 64, 3) in 0 … 255.
        pictures: what was requested.
        candidates: number of candidates, the right one included; all icons if there are fewer.
        seed: of the random candidates.

    Returns:
        (n,) bool.
    """
    rng = np.random.default_rng([seed, 6])
    pool = [name + style for name in text_to_image_names() for style in ("", OUTLINE_SUFFIX)]
    hits = []
    for image, (name, colour, background) in zip(images, pictures, strict=True):
        other = name.removesuffix(OUTLINE_SUFFIX) if name.endswith(OUTLINE_SUFFIX) else name + OUTLINE_SUFFIX
        rest = [candidate for candidate in pool if candidate not in (name, other)]
        drawn = [rest[i] for i in rng.permutation(len(rest))[: candidates - 2]]
        painted = np.stack([paint_icon(candidate, colour, background) for candidate in (name, other, *drawn)])
        errors = np.square(painted.astype(np.float32) - image).mean((1, 2, 3))
        hits.append(errors.argmin() == 0)
    return np.array(hits)


def text_to_image_scores(
    pipeline: StableDiffusionPipeline, pictures: Sequence[IconPicture], scale: float, config: ScoreConfig
) -> tuple[dict[str, float], np.ndarray]:
    """Generate pictures for requests and score them.

    Returns:
        Rates in 0 … 1 and the median PSNR against the true pictures; and the generated pictures.
    """
    images = generate_from_captions(pipeline, pictures, scale, config.steps, config.seed)
    colours, backgrounds = classify_colours(images)
    hits = retrieval_hits(images, pictures, config.candidates, config.seed)
    everything = retrieval_hits(images, pictures, 10**9, config.seed)
    true = np.stack([picture.paint() for picture in pictures])
    error = np.square((images - true) / 255).mean((1, 2, 3))
    return {
        "colour_accuracy": float(np.mean([c == p.colour for c, p in zip(colours, pictures, strict=True)])),
        "background_accuracy": float(np.mean([b == p.background for b, p in zip(backgrounds, pictures, strict=True)])),
        "retrieval_top1": float(hits.mean()),
        "retrieval_top1_of_all": float(everything.mean()),
        "psnr_median": float(np.median(-10 * np.log10(np.maximum(error, 1e-10)))),
    }, images


def choose_guidance_scale(pipeline: StableDiffusionPipeline, config: ScoreConfig) -> tuple[float, dict[str, float]]:
    """Choose the guidance scale on the validation split, by retrieval and then by PSNR against the true pictures.

    Returns:
        The scale, and the retrieval rate among all icons at each scale.
    """
    pictures = sample_icon_pictures("validation", config.validation_samples, config.seed)
    scores = {scale: text_to_image_scores(pipeline, pictures, scale, config)[0] for scale in config.guidance_scales}
    best = max(scores, key=lambda scale: (scores[scale]["retrieval_top1_of_all"], scores[scale]["psnr_median"]))
    return best, {str(scale): score["retrieval_top1_of_all"] for scale, score in scores.items()}


def sample_grid(images: np.ndarray, pictures: Sequence[IconPicture], columns: int = 8, rows: int = 3) -> Image.Image:
    """Arrange generated pictures, each above the true picture of the same request."""
    grid = Image.new("RGB", (columns * IMAGE_SIZE, 2 * rows * IMAGE_SIZE))
    for i in range(min(columns * rows, len(pictures))):
        left, top = i % columns * IMAGE_SIZE, i // columns * 2 * IMAGE_SIZE
        generated = np.clip(np.rint(images[i]), 0, 255).astype(np.uint8)
        grid.paste(Image.fromarray(generated), (left, top))
        grid.paste(Image.fromarray(pictures[i].paint()), (left, top + IMAGE_SIZE))
    return grid


def score_model(folder: Path, config: ScoreConfig, device: str | torch.device = "cpu") -> dict[str, object]:
    """Score the model in a folder; writes `metrics.json` and `samples.png` beside it.

    Args:
        folder: a folder in diffusers' layout.
        config: how to score.
        device: where the model runs.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: the device cannot be used.
    """
    device = usable_device(device)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    scale, by_scale = choose_guidance_scale(pipeline, config)
    pictures = sample_icon_pictures("test", config.samples, config.seed)
    scores, images = text_to_image_scores(pipeline, pictures, scale, config)
    modules = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    metrics: dict[str, object] = {
        "text_to_image": scores,
        "samples": len(pictures),
        "guidance_scale": scale,
        "steps": config.steps,
        "candidates": config.candidates,
        "validation_retrieval_by_guidance_scale": by_scale,
        "vae_psnr": reconstruction_psnr(pipeline.vae, config.reconstructions),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    sample_grid(images, pictures).save(folder / "samples.png", optimize=True)
    return metrics
