"""The autoencoder of the icon models: 64×64×3 pixels to 16×16×4 latents and back."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mtu.data.degradation import degrade_to_half_size
from mtu.data.icons.catalogue import BACKGROUND_COLOURS, ICON_COLOURS, icon_names, split_of_combination
from mtu.data.icons.examples import EDIT_KINDS, IMAGE_SIZE, IconDataset, IconExample, paint_mask
from mtu.data.icons.font import icon_masks, mask_indices_by_icon_name
from mtu.data.images import psnr, to_normalized_tensor, upsample_bicubic
from mtu.recipes.icons.device import mixed_precision
from mtu.training import BatchPart, Objective, PartialLoss

LATENT_CHANNELS = 4


@dataclass(frozen=True)
class VAEConfig:
    """Size and loss of the autoencoder.

    Attributes:
        block_out_channels: width of each resolution, finest first; each but the last halves the picture.
        layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
        norm_num_groups: groups of each group norm.
        batch_size: pictures per step.
        l1_weight: weight of the absolute error beside the squared error.
        kl_weight: weight of the mean KL divergence per latent element.
        scene_fraction: fraction of the pictures that show half-size icons.
        degraded_fraction: fraction of the pictures that are enlarged condition images of super-resolution.
    """

    block_out_channels: tuple[int, ...] = (32, 32, 96)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    batch_size: int = 8
    l1_weight: float = 0.1
    kl_weight: float = 5e-5
    scene_fraction: float = 0.2
    degraded_fraction: float = 0.06


def build_vae(config: VAEConfig) -> AutoencoderKL:
    """Build an untrained autoencoder without attention in its middle, which would cost time and generalize worse."""
    levels = len(config.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        latent_channels=LATENT_CHANNELS,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return vae


@lru_cache(maxsize=1)
def _drawable() -> tuple[np.ndarray, np.ndarray]:
    """Mask indices of the training icons, and whether training may show (icon, colour, background), (n, 8, 4) bool."""
    names = icon_names("train")
    rows = np.array([mask_indices_by_icon_name()[name] for name in names])
    shown = [
        [[split_of_combination(n, c, b) == "train" for b in BACKGROUND_COLOURS] for c in ICON_COLOURS] for n in names
    ]
    return rows, np.array(shown)


def draw_training_pictures(rng: np.random.Generator, config: VAEConfig) -> Tensor:
    """Draw pictures of every kind that the four tasks show, from the training icons, without held-out combinations.

    Args:
        rng: source of all random choices.
        config: batch size and fractions of the kinds.

    Returns:
        (batch, 3, 64, 64) float32 in [-1, 1].
    """
    count, half = config.batch_size, IMAGE_SIZE // 2
    colours, backgrounds = np.array(list(ICON_COLOURS.values())), np.array(list(BACKGROUND_COLOURS.values()))
    rows, shown = _drawable()
    pictures = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for picture in pictures:
        # Mirrored icons add new shapes.
        mirror = slice(None, None, -1 if rng.random() < 0.5 else 1)
        if rng.random() < config.scene_fraction:
            behind = backgrounds[rng.integers(len(backgrounds))]
            picture[:] = behind
            for quadrant in rng.choice(4, rng.integers(1, 3), replace=False):
                top, left = half * (quadrant // 2), half * (quadrant % 2)
                mask = icon_masks(half)[rows[rng.integers(len(rows))]][:, mirror]
                colour = colours[rng.integers(len(colours))]
                picture[top : top + half, left : left + half] = paint_mask(mask, colour, behind)
            continue
        while True:
            draw = rng.integers(len(rows)), rng.integers(len(colours)), rng.integers(len(backgrounds))
            if shown[draw]:
                break
        mask = icon_masks(IMAGE_SIZE)[rows[draw[0]]][:, mirror]
        picture[:] = paint_mask(mask, colours[draw[1]], backgrounds[draw[2]])
    batch = to_normalized_tensor(pictures)
    for i in np.flatnonzero(rng.random(count) < config.degraded_fraction):
        batch[i] = upsample_bicubic(to_normalized_tensor(degrade_to_half_size(pictures[i], rng)), IMAGE_SIZE)
    return batch


class VAEBatch(NamedTuple):
    """Training pictures of the autoencoder.

    Args:
        pictures: (n, 3, 64, 64) float32 in [-1, 1].
        noise: (n, 4, 16, 16) float32, of the sampled latents.
    """

    pictures: Tensor
    noise: Tensor


@dataclass(frozen=True)
class VAEBatchLoader:
    """Draws the pictures of a part of a step's batch.

    Args:
        config: batch size and fractions of the kinds of pictures.
        seed: with the step, determines the pictures and the noise.
    """

    config: VAEConfig
    seed: int

    def __call__(self, part: BatchPart) -> VAEBatch:
        rng = np.random.default_rng([self.seed, 1, part.step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pictures = draw_training_pictures(rng, self.config)
        size = IMAGE_SIZE // 2 ** (len(self.config.block_out_channels) - 1)
        noise = torch.randn(len(pictures), LATENT_CHANNELS, size, size, generator=generator)
        return VAEBatch(pictures.chunk(part.count)[part.index], noise.chunk(part.count)[part.index])


class VAEObjective(Objective):
    """The mean reconstruction loss of the pictures of a step.

        mean squared error + l1_weight · mean absolute error + kl_weight · mean KL divergence

    Args:
        vae: the autoencoder to train.
        config: batch and weights.
        seed: with the step, determines the pictures and the noise.
    """

    def __init__(self, vae: AutoencoderKL, config: VAEConfig, seed: int) -> None:
        super().__init__()
        self.vae, self.config, self.seed = vae, config, seed

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the loss of a step."""
        return {**asdict(self.config), "seed": self.seed}

    def check_part_count(self, count: int) -> None:
        """Raise a ValueError if the batch cannot be split into this many equal parts."""
        if self.config.batch_size % count:
            raise ValueError(f"{self.config.batch_size} pictures of a step cannot be split into {count} equal parts.")

    @property
    def load_batch(self) -> VAEBatchLoader:
        """The function that draws a part of a batch."""
        return VAEBatchLoader(self.config, self.seed)

    def forward(self, batch: VAEBatch) -> PartialLoss:
        """Compute the summand of a part of a batch."""
        with mixed_precision(batch.pictures.device):
            posterior = self.vae.encode(batch.pictures).latent_dist
            decoded = self.vae.decode(posterior.mean + posterior.std * batch.noise.to(posterior.mean.dtype)).sample
        error = decoded.float() - batch.pictures
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.square().mean() + self.config.l1_weight * error.abs().mean() + self.config.kl_weight * kl
        return PartialLoss(loss * (len(batch.pictures) / self.config.batch_size))


@torch.no_grad()
def encode_to_unscaled_latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures on the CPU, (n, 3, 64, 64) in [-1, 1], to unscaled latents on the CPU, (n, 4, 16, 16) float32."""
    batches = []
    for chunk in pictures.split(64):
        with mixed_precision(vae.device):
            batches.append(vae.encode(chunk.to(vae.device)).latent_dist.mode().float().cpu())
    return torch.cat(batches)


def measure_and_set_scaling_factor(vae: AutoencoderKL, seed: int, pictures: int = 512) -> float:
    """Set the autoencoder's scaling factor to 1 / (standard deviation of the latents), and return it.

    Args:
        vae: the trained autoencoder.
        seed: seed of the training pictures whose latents are measured.
        pictures: number of these pictures.

    Raises:
        FloatingPointError: all latents are equal, or some are not finite.
    """
    rng = np.random.default_rng([seed, 2])
    deviation = float(
        encode_to_unscaled_latents(vae, draw_training_pictures(rng, VAEConfig(batch_size=pictures))).std()
    )
    if not 0 < deviation < math.inf:
        raise FloatingPointError(f"The autoencoder is of no use: its latents have the standard deviation {deviation}.")
    factor = 1 / deviation
    vae.register_to_config(scaling_factor=factor)
    return factor


def reconstruction_examples_by_kind(count: int) -> dict[str, list[IconExample]]:
    """Return test examples by kind of picture: each kind of edit, scenes, and plain icons.

    Args:
        count: number of examples of each kind.
    """
    icons = IconDataset("test")
    edits = icons.get_examples("edit", range(8 * count))
    kinds = {kind: [e for e in edits if e.edit_kind == kind][:count] for kind in EDIT_KINDS}
    indices = range(count)
    kinds["scene"] = [
        e._replace(target_image=e.condition_image)
        for e in icons.get_examples("remove", indices)
        if e.condition_image is not None
    ]
    kinds["super-resolution"] = icons.get_examples("super-resolution", indices)
    return kinds


@torch.no_grad()
def reconstruction_psnr_by_kind(vae: AutoencoderKL, count: int = 48) -> Mapping[str, float]:
    """Measure how well the autoencoder reconstructs pictures of test icons, which training never shows in any variant.

    Args:
        vae: the trained autoencoder, in any dtype that its device supports.
        count: number of pictures of each kind.

    Returns:
        The median PSNR in dB of each kind of picture, and of all pictures under "all".
    """
    values = {}
    for kind, examples in reconstruction_examples_by_kind(count).items():
        pictures = torch.stack([example.target_image for example in examples]).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        values[kind] = psnr(decoded.float(), pictures.float()).cpu()
    medians = {kind: float(value.median()) for kind, value in values.items()}
    return medians | {"all": float(torch.cat(list(values.values())).median())}
