"""The scores of the base model on held-out combinations of icon and colours, and on icons that it has never seen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from mtu.data.icons import catalogue
from mtu.data.icons.examples import IMAGE_SIZE, paint_icon
from mtu.recipes.icons.device import usable_device
from mtu.recipes.icons.prompts import IconPicture, icon_pictures
from mtu.recipes.icons.vae import reconstruction_psnr_by_kind
from mtu.storage import write_text


@dataclass(frozen=True)
class ScoreConfig:
    """The settings of the scores.

    Attributes:
        num_samples: number of pictures of the test split that are generated.
        validation_samples_per_guidance_scale: number of pictures of the validation split that are generated with each
            guidance scale.
        candidate_guidance_scales: guidance scales to choose from.
        inference_steps: denoising steps.
        num_retrieval_candidates: number of icons among which retrieval looks for the right one.
        reconstructions_per_kind: number of pictures of each kind for the PSNR of the autoencoder.
        seed: seed of the chosen pictures and of the noise.
    """

    num_samples: int = 256
    validation_samples_per_guidance_scale: int = 40
    candidate_guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 7.5)
    inference_steps: int = 20
    num_retrieval_candidates: int = 100
    reconstructions_per_kind: int = 100
    seed: int = 0


def sample_icon_pictures(split: catalogue.Split, count: int, seed: int) -> list[IconPicture]:
    """Draw different pictures of a split, of plain and outlined icons.

    Args:
        split: the split of the combinations of icon, colour and background.
        count: number of pictures.
        seed: seed of the choice.
    """
    rng = np.random.default_rng([seed, 5])
    pictures = [picture for picture in icon_pictures(split) if not picture.name.endswith(catalogue.CROSSED_OUT_SUFFIX)]
    chosen = rng.permutation(len(pictures))[:count]
    return [pictures[i] for i in chosen]


@torch.no_grad()
def generate_from_captions(
    pipeline: StableDiffusionPipeline, pictures: Sequence[IconPicture], scale: float, steps: int, seed: int
) -> np.ndarray:
    """Generate an image from the caption of each picture.

    Args:
        pipeline: the base model.
        pictures: n pictures.
        scale: guidance scale.
        steps: denoising steps.
        seed: seed of the noise.

    Returns:
        (n, 64, 64, 3) float32 in 0 … 255.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images: list[Tensor] = []
    for start in range(0, len(pictures), 64):
        prompts = [catalogue.icon_caption(*picture) for picture in pictures[start : start + 64]]
        output = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="pt"
        )
        images.append(output.images.cpu())
    return torch.cat(images).permute(0, 2, 3, 1).numpy() * 255


def nearest_colour_names(colours: np.ndarray, named: dict[str, tuple[int, int, int]]) -> list[str]:
    """Return the name of the nearest named colour for each of (n, 3) colours."""
    table = np.array(list(named.values()), dtype=np.float64)
    distances = np.square(colours[:, None] - table).sum(-1)
    return [tuple(named)[i] for i in distances.argmin(1)]


def classify_colours(images: np.ndarray) -> tuple[list[str], list[str]]:
    """Name the colour of the icon and the background of images.

    The background is the median of the outermost two rows and columns, which no icon reaches. The colour of the icon is
    the mean over the pixels that differ from the background at least half as much as the most different pixel.

    Args:
        images: (n, h, w, 3) in 0 … 255.

    Returns:
        The names of the colours and the names of the backgrounds.
    """
    frame = np.ones(images.shape[1:3], dtype=bool)
    frame[2:-2, 2:-2] = False
    behind = np.median(images[:, frame], axis=1)
    distance = np.sqrt(np.square(images - behind[:, None, None]).sum(-1))
    inside = distance >= 0.5 * distance.max(axis=(1, 2), keepdims=True)
    colours = (images * inside[..., None]).sum((1, 2)) / inside.sum((1, 2))[:, None]
    icon_colours = nearest_colour_names(colours, catalogue.ICON_COLOURS)
    return icon_colours, nearest_colour_names(behind, catalogue.BACKGROUND_COLOURS)


def retrieval_hits(images: np.ndarray, pictures: Sequence[IconPicture], candidates: int, seed: int) -> np.ndarray:
    """Tell for each image whether the right icon is the nearest of many candidates.

    The candidates are the right icon, the same name in the other style, and random other icons, all painted in the
    right colour and background. The nearest one has the smallest mean squared pixel error.

    Args:
        images: (n, 64, 64, 3) in 0 … 255.
        pictures: the n pictures that the images should show.
        candidates: number of candidates, including the right icon; all icons if there are fewer.
        seed: seed of the random candidates.

    Returns:
        (n,) bool, True for a hit.
    """
    rng = np.random.default_rng([seed, 6])
    outline = catalogue.OUTLINE_SUFFIX
    pool = [name + style for name in catalogue.text_to_image_icon_names() for style in ("", outline)]
    hits = []
    for image, (name, colour, background) in zip(images, pictures, strict=True):
        other = name.removesuffix(outline) if name.endswith(outline) else name + outline
        rest = [candidate for candidate in pool if candidate not in (name, other)]
        drawn = [rest[i] for i in rng.permutation(len(rest))[: candidates - 2]]
        painted = np.stack([paint_icon(candidate, colour, background) for candidate in (name, other, *drawn)])
        errors = np.square(painted.astype(np.float32) - image).mean((1, 2, 3))
        hits.append(errors.argmin() == 0)
    return np.array(hits)


def generate_and_score_images(
    pipeline: StableDiffusionPipeline, pictures: Sequence[IconPicture], scale: float, config: ScoreConfig
) -> tuple[dict[str, float], np.ndarray]:
    """Generate images from the captions of pictures, and score them.

    Args:
        pipeline: the base model.
        pictures: the pictures that the images should show.
        scale: guidance scale.
        config: the settings of the scores.

    Returns:
        Rates in [0, 1] and the median PSNR against the true pictures, and the (n, 64, 64, 3) images.
    """
    images = generate_from_captions(pipeline, pictures, scale, config.inference_steps, config.seed)
    colours, backgrounds = classify_colours(images)
    hits = retrieval_hits(images, pictures, config.num_retrieval_candidates, config.seed)
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
        The best scale, and the retrieval rate among all icons at each scale.
    """
    pictures = sample_icon_pictures("validation", config.validation_samples_per_guidance_scale, config.seed)
    scores = {
        scale: generate_and_score_images(pipeline, pictures, scale, config)[0]
        for scale in config.candidate_guidance_scales
    }
    best = max(scores, key=lambda scale: (scores[scale]["retrieval_top1_of_all"], scores[scale]["psnr_median"]))
    return best, {str(scale): score["retrieval_top1_of_all"] for scale, score in scores.items()}


def generated_above_true_grid(
    images: np.ndarray, pictures: Sequence[IconPicture], columns: int = 8, rows: int = 3
) -> Image.Image:
    """Arrange generated images, each above the true picture."""
    grid = Image.new("RGB", (columns * IMAGE_SIZE, 2 * rows * IMAGE_SIZE))
    for i in range(min(columns * rows, len(pictures))):
        left, top = i % columns * IMAGE_SIZE, i // columns * 2 * IMAGE_SIZE
        generated = np.clip(np.rint(images[i]), 0, 255).astype(np.uint8)
        grid.paste(Image.fromarray(generated), (left, top))
        grid.paste(Image.fromarray(pictures[i].paint()), (left, top + IMAGE_SIZE))
    return grid


def score_base_pipeline_in_folder(
    folder: Path, config: ScoreConfig, device: str | torch.device = "cpu"
) -> dict[str, object]:
    """Score the model in a folder, and write `metrics.json` and `samples.png` into it.

    Args:
        folder: the folder of a pipeline of diffusers.
        config: the settings of the scores.
        device: the device of the model.

    Returns:
        The contents of `metrics.json`.

    Raises:
        ValueError: the device cannot be used.
    """
    device = usable_device(device)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    scale, by_scale = choose_guidance_scale(pipeline, config)
    pictures = sample_icon_pictures("test", config.num_samples, config.seed)
    scores, images = generate_and_score_images(pipeline, pictures, scale, config)
    modules = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    metrics: dict[str, object] = {
        "text_to_image": scores,
        "samples": len(pictures),
        "guidance_scale": scale,
        "steps": config.inference_steps,
        "candidates": config.num_retrieval_candidates,
        "validation_retrieval_by_guidance_scale": by_scale,
        "vae_psnr": reconstruction_psnr_by_kind(pipeline.vae, config.reconstructions_per_kind),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    generated_above_true_grid(images, pictures).save(folder / "samples.png", optimize=True)
    return metrics
