"""The UNet of the icon base model, and the loss that trains it with the text encoder on latents encoded beforehand."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mtu.data.images import to_normalized_tensor
from mtu.recipes.icons.device import mixed_precision
from mtu.recipes.icons.prompts import (
    IconPicture,
    PromptConfig,
    ScenePicture,
    draw_prompt,
    draw_scene_pictures,
    icon_pictures,
)
from mtu.recipes.icons.text_encoder import tokenize
from mtu.recipes.icons.vae import encode_to_unscaled_latents
from mtu.training import BatchPart, Objective, PartialLoss
from mtu.training.multitask.parallel_loss import average_and_differentiate_losses_in_threads
from mtu.training.multitask.timesteps import timestep_loss_weights, timesteps_at_fractions

LATENT_SIZE = 16
# Stable Diffusion's noise schedule.
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}


@dataclass(frozen=True)
class DenoiserConfig:
    """Size and loss of the UNet.

    Attributes:
        block_out_channels: width of each resolution, finest first. Every resolution has cross-attention.
        layers_per_block: residual and transformer blocks per resolution.
        heads: attention heads of every transformer block.
        norm_num_groups: groups of each group norm.
        batch_size: pictures per step.
        loss_threads: number of threads that compute equal parts of the batch on a CPU.
        snr_gamma: γ of `timestep_loss_weights`.
        max_inverse_snr: κ of `timestep_loss_weights`.
        prompts: fractions of the kinds of training examples.
    """

    block_out_channels: tuple[int, ...] = (64, 96, 160)
    layers_per_block: int = 1
    heads: int = 4
    norm_num_groups: int = 16
    batch_size: int = 32
    loss_threads: int = 2
    snr_gamma: float = 5.0
    max_inverse_snr: float = 10.0
    prompts: PromptConfig = field(default_factory=PromptConfig)


def build_unet(config: DenoiserConfig, text_width: int) -> UNet2DConditionModel:
    """Build an untrained UNet with the structure of Stable Diffusion's, but much smaller.

    Args:
        config: size of the UNet.
        text_width: width of the text encoder's output.
    """
    levels = len(config.block_out_channels)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        # diffusers calls the number of heads so.
        attention_head_dim=config.heads,
        cross_attention_dim=text_width,
        norm_num_groups=config.norm_num_groups,
    )


class LatentDataset:
    """All pictures that the base model learns from, with their latents.

    Args:
        vae: the trained autoencoder, with its scaling factor.
        config: the number of scenes, and the fractions of the kinds of examples.
        seed: seed of the scenes.
    """

    def __init__(self, vae: AutoencoderKL, config: PromptConfig, seed: int) -> None:
        self.icons = icon_pictures("train")
        self.scenes = draw_scene_pictures(np.random.default_rng([seed, 3]), config)
        pictures: list[IconPicture | ScenePicture] = [*self.icons, *self.scenes]
        chunks = [pictures[start : start + 256] for start in range(0, len(pictures), 256)]
        latents = [
            encode_to_unscaled_latents(vae, to_normalized_tensor(np.stack([picture.paint() for picture in chunk])))
            for chunk in chunks
        ]
        self.latents = torch.cat(latents) * vae.config.scaling_factor
        self.config = config

    def draw_batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """Draw pictures, and a prompt for each.

        Args:
            rng: source of all random choices.
            count: number of pictures.

        Returns:
            (count, 4, 16, 16) float32 scaled latents, and the prompts.
        """
        scene = rng.random(count) < self.config.scene_fraction
        rows = np.where(scene, rng.integers(len(self.scenes), size=count), rng.integers(len(self.icons), size=count))
        drawn = [self.scenes[row] if is_scene else self.icons[row] for row, is_scene in zip(rows, scene, strict=True)]
        latents = self.latents[torch.from_numpy(rows + scene * len(self.icons))]
        return latents, [draw_prompt(picture, rng, self.config) for picture in drawn]


class DenoiserBatch(NamedTuple):
    """Noisy latents of training pictures, and what the UNet should predict.

    Args:
        noisy: (n, 4, 16, 16) float32.
        noise: (n, 4, 16, 16) float32, the target.
        timesteps: (n,) int64.
        tokens: (n, L) int64.
    """

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class DenoiserBatchLoader:
    """Draws a part of a step's batch.

    Args:
        tokenizer: the tokenizer of the prompts.
        data: latents and prompts.
        scheduler: the noise schedule.
        batch_size: pictures of a step.
        seed: with the step, determines pictures, prompts, timesteps and noise.
    """

    tokenizer: CLIPTokenizer
    data: LatentDataset
    scheduler: DDPMScheduler
    batch_size: int
    seed: int

    def __call__(self, part: BatchPart) -> DenoiserBatch:
        rng = np.random.default_rng([self.seed, 4, part.step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        count = self.batch_size
        latents, prompts = self.data.draw_batch(rng, count)
        # Each of `count` equal stretches of the schedule gives one timestep: the loss varies less from step to step.
        spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = timesteps_at_fractions(spread, len(self.scheduler.alphas_cumprod))[
            torch.randperm(count, generator=generator)
        ]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        batch = DenoiserBatch(noisy, noise, timesteps, tokenize(self.tokenizer, prompts))
        return DenoiserBatch(*(tensor.chunk(part.count)[part.index] for tensor in batch))


class DenoiserObjective(Objective):
    """The mean noise-prediction loss of the pictures of a step, weighted by `timestep_loss_weights`.

    Args:
        unet: the UNet to train.
        text_encoder: the text encoder to train with it.
        tokenizer: the tokenizer of the prompts.
        data: latents and prompts.
        config: batch size and weights.
        seed: with the step, determines pictures, prompts, timesteps and noise.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        data: LatentDataset,
        config: DenoiserConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.config, self.seed = config, seed
        scheduler = DDPMScheduler(**NOISE_SCHEDULE)
        self._load_batch = DenoiserBatchLoader(tokenizer, data, scheduler, config.batch_size, seed)
        self.timestep_weights = timestep_loss_weights(
            scheduler.alphas_cumprod, config.snr_gamma, config.max_inverse_snr
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the loss of a step. The number of threads is not among them."""
        return {k: v for k, v in asdict(self.config).items() if k != "loss_threads"} | {"seed": self.seed}

    def check_part_count(self, count: int) -> None:
        """Raise a ValueError if the batch cannot be split into this many equal parts."""
        if self.config.batch_size % (count * self.config.loss_threads):
            raise ValueError(
                f"{self.config.batch_size} pictures of a step cannot be split into {count} equal parts for "
                f"{self.config.loss_threads} threads each."
            )

    @property
    def load_batch(self) -> DenoiserBatchLoader:
        """The function that draws a part of a batch."""
        return self._load_batch

    def forward(self, batch: DenoiserBatch) -> PartialLoss:
        """Compute the summand of a part of a batch."""
        share = len(batch.noisy) / self.config.batch_size
        if batch.noisy.device.type != "cpu" or self.config.loss_threads == 1:
            return PartialLoss(self._mean_loss(*batch) * share)
        rows = torch.arange(len(batch.noisy)).chunk(self.config.loss_threads)
        losses = [partial(self._mean_loss, *(tensor[part] for tensor in batch)) for part in rows]
        return PartialLoss(average_and_differentiate_losses_in_threads(losses, list(self.parameters())) * share)

    def _mean_loss(self, noisy: Tensor, noise: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The weighted loss of some pictures."""
        # autocast's cache of converted weights would gain nothing, because a forward uses each weight once.
        with mixed_precision(noisy.device, cache_weights=False):
            states = self.text_encoder(tokens)[0]
            predicted = self.unet(noisy, timesteps, states).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * self.timestep_weights.to(error.device)[timesteps]).mean()
