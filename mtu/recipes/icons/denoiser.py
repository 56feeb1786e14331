"""The UNet of the icon base model, and the loss that trains it with the text encoder on latents encoded beforehand."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

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
from mtu.training.multitask.timesteps import timestep_loss_weights, timesteps_at_fractions
from mtu.training.parallel_loss import average_and_differentiate_losses_in_threads

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


class DenoiserLoss:
    """Computes the noise-prediction loss of a step, weighted by `timestep_loss_weights`.

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
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.data, self.config, self.seed = data, config, seed
        self.parameters = [*unet.parameters(), *text_encoder.parameters()]
        self.scheduler = DDPMScheduler(**NOISE_SCHEDULE)
        self.timestep_weights = timestep_loss_weights(
            self.scheduler.alphas_cumprod, config.snr_gamma, config.max_inverse_snr
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the loss of a step. The number of threads is not among them."""
        return {k: v for k, v in asdict(self.config).items() if k != "loss_threads"} | {"seed": self.seed}

    def __call__(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, 4, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        count = self.config.batch_size
        latents, prompts = self.data.draw_batch(rng, count)
        # Each of `count` equal stretches of the schedule gives one timestep: the loss varies less from step to step.
        spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = timesteps_at_fractions(spread, len(self.timestep_weights))[
            torch.randperm(count, generator=generator)
        ]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        tokens = tokenize(self.tokenizer, prompts)
        batch = [tensor.to(self.unet.device) for tensor in (noisy, noise, timesteps, tokens)]
        if self.unet.device.type != "cpu":
            return self._loss(*batch)
        rows = torch.arange(count).chunk(self.config.loss_threads)
        losses = [partial(self._loss, *(tensor[part] for tensor in batch)) for part in rows]
        return average_and_differentiate_losses_in_threads(losses, self.parameters)

    def _loss(self, noisy: Tensor, noise: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The weighted loss of a part of the batch."""
        # autocast's cache of converted weights would gain nothing, because a forward uses each weight once.
        with mixed_precision(noisy.device, cache_weights=False):
            states = self.text_encoder(tokens)[0]
            predicted = self.unet(noisy, timesteps, states).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * self.timestep_weights.to(error.device)[timesteps]).mean()
