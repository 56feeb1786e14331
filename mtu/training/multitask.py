"""The multi-task objective: noise prediction on all tasks at once, over latents encoded beforehand."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mtu.compat import parameter_access
from mtu.pipelines import MTUPipeline
from mtu.pipelines.inputs import prepare_condition_image
from mtu.tasks import TaskSpec
from mtu.training import precision
from mtu.training.parallel_loss import average_loss_in_threads
from mtu.training.timesteps import timestep_loss_weights, timesteps_at_fractions

__all__ = ["MultiTaskConfig", "MultiTaskLoss", "TaskExample", "TaskLatents", "encode_examples"]

_ENCODE_BATCH = 64


class TaskExample(Protocol):
    """One training example of a task."""

    @property
    def task(self) -> str:
        """The task's name."""
        ...

    @property
    def prompt(self) -> str:
        """Caption or instruction; empty for tasks without a prompt."""
        ...

    @property
    def image(self) -> Tensor | None:
        """The condition, (3, h, w) in [−1, 1]; None for tasks without an image."""
        ...

    @property
    def target(self) -> Tensor:
        """(3, H, W) in [−1, 1]."""
        ...


class TaskLatents(NamedTuple):
    """The encoded examples of one task.

    Args:
        target: (n, 4, h, w) float32, scaled latents of the targets.
        condition: (n, c, h, w) float32, unscaled latents of the conditions, c the task's `condition_channels`; None for
            tasks without an image.
        prompt_index: (n,) int64, rows of the table of prompt embeddings.
    """

    target: Tensor
    condition: Tensor | None
    prompt_index: Tensor


class EncodedExamples(NamedTuple):
    """All tasks' latents, and the embeddings of all prompts: (P, L, D) float32, row 0 for the empty prompt."""

    latents: Mapping[str, TaskLatents]
    prompt_embeds: Tensor


@dataclass(frozen=True)
class MultiTaskConfig:
    """How batches are made.

    Args:
        batch_per_task: examples of each task in a step.
        conditioning_dropout_prob: part of the examples that lose their prompt, and for dual guidance as large a part
            each that loses prompt and image, so that the other branches of guidance are learned. Tasks without
            guidance lose nothing.
        snr_gamma, max_inverse_snr: weights of timesteps (see `timestep_loss_weights`); None and 0: plain mean squared
            error.
        autocast_dtype: compute dtype; None: that of the parameters.
        loss_threads: parts of the batch, each with its share of every task, computed by a thread of its own (see
            `average_loss_in_threads`); must divide batch_per_task.
        seed: with the step, determines examples, timesteps and noise.
    """

    batch_per_task: int = 16
    conditioning_dropout_prob: float = 0.05
    snr_gamma: float | None = None
    max_inverse_snr: float = 0.0
    autocast_dtype: torch.dtype | None = None
    loss_threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_per_task < 1:
            raise ValueError(f"batch_per_task must be at least 1, but got {self.batch_per_task}.")
        if self.loss_threads < 1 or self.batch_per_task % self.loss_threads:
            raise ValueError(
                f"loss_threads must divide batch_per_task = {self.batch_per_task}, but got {self.loss_threads}."
            )
        if not 0 <= self.conditioning_dropout_prob <= 0.5:
            raise ValueError(
                f"conditioning_dropout_prob must lie in [0, 0.5], but got {self.conditioning_dropout_prob}."
            )


@torch.no_grad()
def encode_examples(
    pipeline: MTUPipeline,
    examples: Mapping[str, Sequence[TaskExample]],
    *,
    autocast_dtype: torch.dtype | None = None,
    threads: int = 1,
    description: str = "encoding",
) -> EncodedExamples:
    """Encode examples once, with the pipeline's own VAE, text encoder and resizing.

    Args:
        pipeline: its `vae`, `text_encoder` and `unet.tasks` are used.
        examples: the examples of each task, by its name.
        autocast_dtype: compute dtype of the VAE; None: that of its parameters.
        threads: batches in work at once; on a CPU with `intra_op_threads(1)`, one per core.
        description: shown beside the progress bar.

    Raises:
        ValueError: a task that the model does not have, that has no examples, or whose condition is no image's latents;
            or an example that does not fit its task or is of another size.
        FloatingPointError: the VAE gives latents that are not finite.
    """
    for name, items in examples.items():
        _check_examples(pipeline, pipeline.unet.tasks[pipeline.unet.task_index(name)], items)
    rows: dict[str, int] = {"": 0}
    encoded = {}
    total = sum(map(len, examples.values()))
    with tqdm(total=total, desc=description, unit="image") as bar, ThreadPoolExecutor(threads) as pool:
        for name, items in examples.items():
            spec = pipeline.unet.tasks[pipeline.unet.task_index(name)]
            chunks = [items[start : start + _ENCODE_BATCH] for start in range(0, len(items), _ENCODE_BATCH)]
            targets, conditions = [], []
            for target, condition in pool.map(functools.partial(_encode, pipeline, spec, autocast_dtype), chunks):
                for latents in (target,) if condition is None else (target, condition):
                    if not latents.isfinite().all():
                        raise FloatingPointError(
                            f"The VAE, in {pipeline.vae.dtype}, gives latents that are not finite for examples of task "
                            f"{name!r} from number {sum(map(len, targets))} on."
                        )
                targets.append(target)
                conditions.append(condition)
                bar.update(len(target))
            prompts = torch.tensor([rows.setdefault(item.prompt, len(rows)) for item in items])
            encoded[name] = TaskLatents(
                torch.cat(targets), torch.cat(conditions) if spec.takes_image else None, prompts
            )
    return EncodedExamples(encoded, _embed(pipeline, list(rows)))


class MultiTaskLoss:
    """The loss of a step: `Σ_task mean_samples ‖ε − ε_θ(x_t, t, prompt, condition; task)‖² / elements`.

    Args:
        pipeline: its UNet is trained; its scheduler's configuration gives the noise schedule and the prediction type.
        data: what `encode_examples` returned.
        config: how batches are made.

    Raises:
        ValueError: a prediction type that is neither "epsilon" nor "v_prediction", or "epsilon" on a schedule that ends
            in noise alone; data without tasks or examples, or of other tasks or shapes than the model's; or a UNet that
            is offloaded or under layerwise casting.

    Source: MTU (arXiv 2503.11905) eq. 2; dropout of conditions: InstructPix2Pix (arXiv 2211.09800) §3.2.
    """

    def __init__(self, pipeline: MTUPipeline, data: EncodedExamples, config: MultiTaskConfig) -> None:
        parameter_access.check_trainable(pipeline.unet, "MultiTaskLoss")
        self.unet, self.data, self.config = pipeline.unet, data, config
        self.scheduler: DDPMScheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"Training predicts 'epsilon' or 'v_prediction', but got {self.prediction_type!r}.")
        signal = self.scheduler.alphas_cumprod
        if self.prediction_type == "epsilon" and signal.min() <= 0:
            raise ValueError(
                "Training that predicts 'epsilon' needs a signal at every timestep, but this schedule ends in noise "
                "alone (rescale_betas_zero_snr): predict 'v_prediction', or use another schedule."
            )
        _check_data(self.unet.tasks, data)
        weights = timestep_loss_weights(signal, config.snr_gamma, config.max_inverse_snr)
        # At a given x_t an error in v is that in the noise / √ᾱ; with its square taken out, both types learn the same.
        # Without a signal the noise is given, and v, the picture, is all there is to learn: that error counts in full.
        if self.prediction_type == "v_prediction":
            weights = weights * torch.where(signal > 0, signal, 1.0)
        self.timestep_weights = weights

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the loss of a step; how it is computed, as the device may have it, is left out."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("autocast_dtype", "loss_threads")}
        # In their order, as the draws follow it.
        examples = [[name, len(latents.target)] for name, latents in self.data.latents.items()]
        return {**config, "examples": examples, "prediction_type": self.prediction_type}

    def __call__(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.config.seed, 7, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        count, names = self.config.batch_per_task, list(self.data.latents)
        parts = [self._draw(rng, name) for name in names]
        target, prompt = (torch.cat(column) for column in zip(*((part[0], part[2]) for part in parts), strict=True))
        # As wide as the widest: the UNet ignores channels beyond a task's own.
        width = max(part[1].shape[1] for part in parts)
        condition = torch.cat([F.pad(part[1], (0, 0, 0, 0, 0, width - part[1].shape[1])) for part in parts])
        noise = torch.randn(target.shape, generator=generator)
        # One timestep from each of equal stretches, within each task: the loss varies less from step to step.
        fractions = (torch.rand(len(names), count, generator=generator) + torch.arange(count)) / count
        timesteps = timesteps_at_fractions(fractions.flatten(), len(self.timestep_weights))
        noisy = self.scheduler.add_noise(target, noise, timesteps)
        wanted = noise if self.prediction_type == "epsilon" else self.scheduler.get_velocity(target, noise, timesteps)
        task_ids = self.unet.task_ids(names, "cpu").repeat_interleave(count)
        batch = (torch.cat([noisy, condition], 1), timesteps, prompt, task_ids, wanted)
        batch = [tensor.to(self.unet.device) for tensor in batch]
        if self.config.loss_threads == 1:
            return self._loss(*batch)
        rows = torch.arange(len(names) * count).view(len(names), count).chunk(self.config.loss_threads, dim=1)
        parts = [functools.partial(self._loss, *(tensor[part.flatten()] for tensor in batch)) for part in rows]
        return average_loss_in_threads(parts, self.unet.trainable_parameters())

    def _loss(self, sample: Tensor, timesteps: Tensor, prompt: Tensor, task_ids: Tensor, wanted: Tensor) -> Tensor:
        """The weighted loss of a batch that has equally many examples of each task, task by task."""
        with precision.autocast_to(
            sample.device.type, self.config.autocast_dtype, cache_weights=self.config.loss_threads == 1
        ):
            sample, prompt = sample.to(self.unet.dtype), prompt.to(self.unet.dtype)
            predicted = self.unet(sample, timesteps, prompt, task_ids=task_ids).sample
        error = (predicted.float() - wanted).square().mean(dim=(1, 2, 3))
        weighed = error * self.timestep_weights.to(error.device)[timesteps]
        return weighed.view(len(self.data.latents), -1).mean(1).sum()

    def _draw(self, rng: np.random.Generator, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Target latents, condition latents (no channels where there are none) and prompt embeddings of one task."""
        latents, count = self.data.latents[name], self.config.batch_per_task
        spec = self.unet.tasks[self.unet.task_index(name)]
        rows = torch.from_numpy(rng.integers(len(latents.target), size=count))
        condition = latents.target[rows][:, :0] if latents.condition is None else latents.condition[rows]
        prompt = latents.prompt_index[rows]
        lot, part = torch.from_numpy(rng.random(count)), self.config.conditioning_dropout_prob
        if spec.guidance != "none":
            prompt = torch.where(lot < (2 if spec.guidance == "dual" else 1) * part, 0, prompt)
        if spec.guidance == "dual":
            condition = torch.where((lot < part)[:, None, None, None], 0.0, condition)
        return latents.target[rows], condition, self.data.prompt_embeds[prompt]


def _check_examples(pipeline: MTUPipeline, spec: TaskSpec, items: Sequence[TaskExample]) -> None:
    """Raise a ValueError unless these are examples of a task, of one size."""
    if not items:
        raise ValueError(f"Task {spec.name!r} has no examples: give it some, or leave it out.")
    channels = pipeline.vae.config.latent_channels
    if spec.condition_channels not in (0, channels):
        raise ValueError(
            f"Task {spec.name!r} reads {spec.condition_channels} condition channels, but an image has {channels} "
            "latent channels: encode its examples by other means."
        )
    for item in items:
        if (item.image is None) == spec.takes_image or item.task != spec.name:
            raise ValueError(f"An example of {item.task!r} does not fit task {spec.name!r}: {spec}.")
        if item.target.shape != items[0].target.shape:
            raise ValueError(
                f"Targets of task {spec.name!r} must be of one size, but got {tuple(items[0].target.shape)} and "
                f"{tuple(item.target.shape)}."
            )


def _check_data(tasks: Sequence[TaskSpec], data: EncodedExamples) -> None:
    """Raise a ValueError unless all tasks of the data are the model's, with examples of one size."""
    if not data.latents:
        raise ValueError("There is nothing to train on: expected encoded examples of at least one task.")
    specs, sizes = {spec.name: spec for spec in tasks}, {}
    for name, latents in data.latents.items():
        if name not in specs:
            raise ValueError(f"Unknown task {name!r}: this model has {list(specs)}.")
        if len(latents.target) == 0:
            raise ValueError(f"Task {name!r} has no examples: give it some, or leave it out.")
        channels = 0 if latents.condition is None else latents.condition.shape[1]
        if channels != specs[name].condition_channels:
            raise ValueError(
                f"Task {name!r} reads {specs[name].condition_channels} condition channels, but its examples have "
                f"{channels}."
            )
        sizes.setdefault(latents.target.shape[1:], name)
    if len(sizes) > 1:
        listed = " and ".join(f"{tuple(size)} for {name!r}" for size, name in sizes.items())
        raise ValueError(f"Target latents must be of one shape for all tasks, but got {listed}.")


@torch.no_grad()  # a thread has a grad mode of its own
def _encode(
    pipeline: MTUPipeline, spec: TaskSpec, autocast_dtype: torch.dtype | None, chunk: Sequence[TaskExample]
) -> tuple[Tensor, Tensor | None]:
    """Target latents, scaled, and condition latents, unscaled, of some examples."""
    vae = pipeline.vae

    def latents(pictures: list[Tensor]) -> Tensor:
        with precision.autocast_to(vae.device.type, autocast_dtype, cache_weights=False):
            pixels = torch.stack(pictures).to(vae.device, vae.dtype)
            return vae.encode(pixels).latent_dist.mode().float().cpu()

    target = latents([item.target for item in chunk]) * vae.config.scaling_factor
    return target, latents([_condition(item, spec) for item in chunk]) if spec.takes_image else None


def _condition(example: TaskExample, spec: TaskSpec) -> Tensor:
    if example.image is None:
        raise ValueError(f"An example of {spec.name!r} needs a condition image, but has none.")
    height, width = example.target.shape[1:]
    return prepare_condition_image(example.image / 2 + 0.5, spec, height, width)


def _embed(pipeline: MTUPipeline, prompts: Iterable[str]) -> Tensor:
    prompts = list(prompts)
    chunks = [prompts[start : start + _ENCODE_BATCH] for start in range(0, len(prompts), _ENCODE_BATCH)]
    return torch.cat([pipeline.encode_prompt(chunk, pipeline.device, 1, False)[0].float().cpu() for chunk in chunks])
