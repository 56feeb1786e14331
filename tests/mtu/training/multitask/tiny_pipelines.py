"""Tiny pipelines to train, data sets in memory, and one call that computes a loss."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import mtu
from mtu.data.task_dataset import ExampleImages, TaskDataset
from mtu.tasks import TaskSpec
from mtu.training import Trainer, TrainerConfig
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective
from mtu.training.objective import BatchPart, PartialLoss

from ...pipelines.conftest import MAX_LENGTH, byte_tokenizer, randomise_, stock_pipeline
from ...tiny import SDXL, upcycled_unet

SIZE = 16  # pixels
TASKS = ("text-to-image", "edit", "super-resolution", "remove")


@dataclass
class NoiseImages:
    """Rows of random images with made-up prompts."""

    spec: TaskSpec
    rows: int = 5
    variants: int = 1
    captions: int = 1
    size: tuple[int, int] = (SIZE, SIZE)  # width and height
    seed: int = 0

    def __len__(self) -> int:
        return self.rows

    def prompts(self, row: int) -> Sequence[Sequence[str]]:
        def prompt(variant: int, caption: int) -> str:
            return f"{self.spec.name} {row}.{variant}.{caption}" if self.spec.uses_prompt else ""

        return [[prompt(variant, caption) for caption in range(self.captions)] for variant in range(self.variants)]

    def load_images(self, row: int, variant: int) -> ExampleImages:
        width, height = self.size
        condition = None
        if self.spec.takes_image:
            condition = self._draw(row, variant, 1, width // self.spec.scale, height // self.spec.scale)
        return ExampleImages(self._draw(row, variant, 0, width, height), condition)

    def image_digest(self, row: int, variant: int) -> str:
        content = (self.spec.name, self.size, self.seed, row, variant)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def describe_row(self, row: int) -> str:
        return f"noise, line {row + 1}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def _draw(self, row: int, variant: int, kind: int, width: int, height: int) -> PIL.Image.Image:
        rng = np.random.default_rng([self.seed, row, variant, kind])
        return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def sd_pipeline() -> mtu.MTUPipeline:
    pipe = mtu.upcycle(stock_pipeline())
    randomise_(pipe.unet)
    pipe.vae.register_to_config(scaling_factor=0.5)  # at 1, scaled latents would look like others
    return pipe


def xl_pipeline(force_zeros_for_empty_prompt: bool = True) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    parts = stock_pipeline()
    tokenizer = byte_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=upcycled_unet(SDXL, num_experts=2),  # with one expert, routers learn nothing
        scheduler=DDIMScheduler.from_config(parts.scheduler.config),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    pipe.vae.register_to_config(scaling_factor=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_data(pipe: Any, names: Sequence[str] = TASKS, **settings: Any) -> dict[str, TaskDataset]:
    return {name: NoiseImages(pipe.unet.tasks[pipe.unet.task_index(name)], **settings) for name in names}


def make_objective(
    pipe: Any, data: Mapping[str, TaskDataset] | None = None, *, prepare: bool = True, **settings: Any
) -> MultiTaskObjective:
    defaults = {"batch_size": 8, "resolution": SIZE, "latent_cache": "memory", "text_cache": "memory"}
    objective = MultiTaskObjective(pipe, noise_data(pipe) if data is None else data, config(**{**defaults, **settings}))
    if prepare:
        objective.prepare(Accelerator(cpu=True))
    return objective


def config(**settings: Any) -> MultiTaskConfig:
    return MultiTaskConfig(**settings)


def loss_of(objective: MultiTaskObjective, step: int = 0, index: int = 0, count: int = 1) -> PartialLoss:
    return objective(objective.load_batch(BatchPart(step, index, count)))


def train_with_a_cache_on_disk(directory: str, **trainer: Any) -> tuple[list[float], int]:
    """The losses of a training of the tiny SDXL, and how many images this process encoded for it."""
    pipe = xl_pipeline()
    encoded = []
    real = pipe.vae.encode
    pipe.vae.encode = lambda pixels: encoded.append(len(pixels)) or real(pixels)
    settings = {"latent_cache": "disk", "text_cache": "disk", "cache_directory": directory}
    objective = make_objective(pipe, noise_data(pipe, ["edit"]), prepare=False, **settings)
    entries = Trainer(objective, TrainerConfig(steps=3, learning_rate=1e-3, log_every=1, **trainer)).train()
    return [entry.loss for entry in entries], len(encoded)
