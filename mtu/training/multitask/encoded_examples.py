"""The multi-task objective: noise or velocity prediction on all tasks at once, over examples encoded beforehand.

`encode_examples` runs the frozen VAE and text encoder once, and `MultiTaskLoss` trains the UNet on their outputs.
"""

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
from mtu.training.multitask.timesteps import timestep_loss_weights, timesteps_at_fractions
from mtu.training.parallel_loss import average_and_differentiate_losses_in_threads

__all__ = ["EncodedTask", "MultiTaskConfig", "MultiTaskLoss", "TaskExample", "encode_examples"]

_ENCODE_BATCH = 64


class TaskExample(Protocol):
    """One training example of a task."""

    @property
    def task_name(self) -> str:
        """The task's name."""
        ...

    @property
    def prompt(self) -> str:
        """Caption or instruction; empty for tasks without a prompt."""
        ...

    @property
    def condition_image(self) -> Tensor | None:
        """The condition image, (3, h, w) in [−1, 1]; None for tasks without an image."""
        ...

    @property
    def target_image(self) -> Tensor:
        """The image that the model should make, (3, H, W) in [−1, 1]."""
        ...


class EncodedTask(NamedTuple):
    """The encoded examples of one task.

    Args:
        target_latents: (n, 4, h, w) float32, scaled latents of the target images.
        condition_latents: (n, c, h, w) float32, unscaled latents of the condition images, where c is the task's
            `condition_channels`; None for tasks without an image.
        prompt_indices: (n,) int64, the row of each example's prompt in `EncodedExamples.prompt_embeds`.
    """

    target_latents: Tensor
    condition_latents: Tensor | None
    prompt_indices: Tensor


class EncodedExamples(NamedTuple):
    """The encoded examples of all tasks.

    Args:
        by_task: the encoded examples of each task, by its name.
        prompt_embeds: (P, L, D) float32, the text embeddings of all P different prompts; row 0 is the empty prompt.
    """

    by_task: Mapping[str, EncodedTask]
    prompt_embeds: Tensor


@dataclass(frozen=True)
class MultiTaskConfig:
    """The settings of the multi-task loss.

    Args:
        batch_per_task: examples of each task in a step.
        conditioning_dropout_prob: fraction of the examples that lose their prompt, so that the model learns the other
            branches of guidance. With dual guidance, a further fraction of the same size loses prompt and image. Tasks
            without guidance lose nothing.
        snr_gamma, max_inverse_snr: γ and κ of `timestep_loss_weights`; None and 0: the plain mean squared error.
        autocast_dtype: compute dtype; None: that of the parameters.
        loss_threads: number of threads that compute equal parts of the batch (see
            `average_and_differentiate_losses_in_threads`); must divide `batch_per_task`.
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
        pipeline: the pipeline whose `vae`, `text_encoder` and `unet.tasks` are used.
        examples: the examples of each task, by its name.
        autocast_dtype: compute dtype of the VAE; None: that of its parameters.
        threads: number of threads that encode batches; on a CPU with `intra_op_threads_context(1)`, one per core.
        description: label of the progress bar.

    Returns:
        Latents and prompt embeddings, on the CPU.

    Raises:
        ValueError: the model does not have a task, a task has no examples or a condition other than an image, or an
            example does not fit its task or differs in size.
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
            encoded[name] = EncodedTask(
                torch.cat(targets), torch.cat(conditions) if spec.takes_image else None, prompts
            )
    return EncodedExamples(encoded, _embed(pipeline, list(rows)))


class MultiTaskLoss:
    """Computes the loss of a step, the sum over tasks of the mean squared error of the predicted noise.

        Σ_task mean_samples weight(t) · ‖ε − ε_θ(x_t, t, prompt, condition; task)‖² / elements

    Under velocity prediction, v takes the place of ε, and the weights make both types learn the same.

    Args:
        pipeline: the pipeline whose UNet is trained. The configuration of its scheduler determines the noise schedule
            and the prediction type.
        data: the examples that `encode_examples` returned.
        config: the settings of the loss.

    Attributes:
        timestep_weights: (timesteps,) weight of each timestep.

    Raises:
        ValueError: the prediction type is neither "epsilon" nor "v_prediction", or is "epsilon" on a schedule that ends
            in noise alone; the data lack tasks or examples, or do not fit the model; or the UNet is offloaded or under
            layerwise casting.

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
        # At a given x_t, the error in v is the error in the noise divided by √ᾱ, so the factor ᾱ makes both types learn
        # the same. Where ᾱ is 0, x_t is the noise itself and v is the negated picture, whose error counts in full.
        if self.prediction_type == "v_prediction":
            weights = weights * torch.where(signal > 0, signal, 1.0)
        self.timestep_weights = weights

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the loss of a step, without those that say how a device computes it."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("autocast_dtype", "loss_threads")}
        # The random numbers depend on the order of the tasks, so the list keeps it.
        examples = [[name, len(task.target_latents)] for name, task in self.data.by_task.items()]
        return {**config, "examples": examples, "prediction_type": self.prediction_type}

    def __call__(self, step: int) -> Tensor:
        """Compute the () loss of a step, whose batch depends on the step and the seed alone."""
        batch = [tensor.to(self.unet.device) for tensor in self._draw_batch(step)]
        threads, count = self.config.loss_threads, self.config.batch_per_task
        if threads == 1:
            return self._loss(*batch)
        # Each thread gets an equal share of every task.
        rows = torch.arange(len(batch[0])).view(-1, count).chunk(threads, dim=1)
        losses = [functools.partial(self._loss, *(tensor[part.flatten()] for tensor in batch)) for part in rows]
        return average_and_differentiate_losses_in_threads(losses, self.unet.trainable_parameters())

    def _draw_batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """UNet input, timesteps, prompt embeddings, task ids and targets of a step's batch, task by task."""
        rng = np.random.default_rng([self.config.seed, 7, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        count, names = self.config.batch_per_task, list(self.data.by_task)
        latents, conditions, prompts = zip(*(self._draw_examples(rng, name) for name in names), strict=True)
        clean, prompt = torch.cat(latents), torch.cat(prompts)
        # The UNet ignores channels beyond a task's own, so all tasks are padded to the widest one.
        width = max(condition.shape[1] for condition in conditions)
        condition = torch.cat([F.pad(part, (0, 0, 0, 0, 0, width - part.shape[1])) for part in conditions])
        noise = torch.randn(clean.shape, generator=generator)
        # Within each task, each of equal stretches of the schedule gives one timestep: the loss then varies less from
        # step to step.
        fractions = (torch.rand(len(names), count, generator=generator) + torch.arange(count)) / count
        timesteps = timesteps_at_fractions(fractions.flatten(), len(self.timestep_weights))
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        target = noise if self.prediction_type == "epsilon" else self.scheduler.get_velocity(clean, noise, timesteps)
        task_ids = self.unet.task_ids(names, "cpu").repeat_interleave(count)
        return torch.cat([noisy, condition], 1), timesteps, prompt, task_ids, target

    def _loss(self, sample: Tensor, timesteps: Tensor, prompt: Tensor, task_ids: Tensor, target: Tensor) -> Tensor:
        """The weighted loss of a batch with equally many examples of each task, ordered by task."""
        with precision.autocast_to(
            sample.device.type, self.config.autocast_dtype, cache_weights=self.config.loss_threads == 1
        ):
            sample, prompt = sample.to(self.unet.dtype), prompt.to(self.unet.dtype)
            predicted = self.unet(sample, timesteps, prompt, task_ids=task_ids).sample
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        weighted = error * self.timestep_weights.to(error.device)[timesteps]
        return weighted.view(len(self.data.by_task), -1).mean(1).sum()

    def _draw_examples(self, rng: np.random.Generator, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Target latents, condition latents and prompt embeddings of one task; without an image, zero channels."""
        encoded, count = self.data.by_task[name], self.config.batch_per_task
        spec = self.unet.tasks[self.unet.task_index(name)]
        rows = torch.from_numpy(rng.integers(len(encoded.target_latents), size=count))
        condition = (
            encoded.target_latents[rows][:, :0]
            if encoded.condition_latents is None
            else encoded.condition_latents[rows]
        )
        prompt = encoded.prompt_indices[rows]
        uniform, prob = torch.from_numpy(rng.random(count)), self.config.conditioning_dropout_prob
        if spec.guidance != "none":
            prompt = torch.where(uniform < (2 if spec.guidance == "dual" else 1) * prob, 0, prompt)
        if spec.guidance == "dual":
            condition = torch.where((uniform < prob)[:, None, None, None], 0.0, condition)
        return encoded.target_latents[rows], condition, self.data.prompt_embeds[prompt]


def _check_examples(pipeline: MTUPipeline, spec: TaskSpec, items: Sequence[TaskExample]) -> None:
    """Raise a ValueError unless the items are examples of the task and have one size."""
    if not items:
        raise ValueError(f"Task {spec.name!r} has no examples: give it some, or leave it out.")
    channels = pipeline.vae.config.latent_channels
    if spec.condition_channels not in (0, channels):
        raise ValueError(
            f"Task {spec.name!r} reads {spec.condition_channels} condition channels, but an image has {channels} "
            "latent channels: encode its examples by other means."
        )
    for item in items:
        if (item.condition_image is None) == spec.takes_image or item.task_name != spec.name:
            raise ValueError(f"An example of {item.task_name!r} does not fit task {spec.name!r}: {spec}.")
        if item.target_image.shape != items[0].target_image.shape:
            raise ValueError(
                f"Targets of task {spec.name!r} must be of one size, but got {tuple(items[0].target_image.shape)} and "
                f"{tuple(item.target_image.shape)}."
            )


def _check_data(tasks: Sequence[TaskSpec], data: EncodedExamples) -> None:
    """Raise a ValueError unless the model has all tasks of the data, and their latents have one size."""
    if not data.by_task:
        raise ValueError("There is nothing to train on: expected encoded examples of at least one task.")
    specs, sizes = {spec.name: spec for spec in tasks}, {}
    for name, encoded in data.by_task.items():
        if name not in specs:
            raise ValueError(f"Unknown task {name!r}: this model has {list(specs)}.")
        if len(encoded.target_latents) == 0:
            raise ValueError(f"Task {name!r} has no examples: give it some, or leave it out.")
        channels = 0 if encoded.condition_latents is None else encoded.condition_latents.shape[1]
        if channels != specs[name].condition_channels:
            raise ValueError(
                f"Task {name!r} reads {specs[name].condition_channels} condition channels, but its examples have "
                f"{channels}."
            )
        sizes.setdefault(encoded.target_latents.shape[1:], name)
    if len(sizes) > 1:
        listed = " and ".join(f"{tuple(size)} for {name!r}" for size, name in sizes.items())
        raise ValueError(f"Target latents must be of one shape for all tasks, but got {listed}.")


@torch.no_grad()  # the threads of `encode_examples` do not inherit its grad mode
def _encode(
    pipeline: MTUPipeline, spec: TaskSpec, autocast_dtype: torch.dtype | None, chunk: Sequence[TaskExample]
) -> tuple[Tensor, Tensor | None]:
    """Scaled target latents and unscaled condition latents of some examples."""
    vae = pipeline.vae

    def encode(images: list[Tensor]) -> Tensor:
        with precision.autocast_to(vae.device.type, autocast_dtype, cache_weights=False):
            pixels = torch.stack(images).to(vae.device, vae.dtype)
            return vae.encode(pixels).latent_dist.mode().float().cpu()

    target = encode([item.target_image for item in chunk]) * vae.config.scaling_factor
    return target, encode([_condition(item, spec) for item in chunk]) if spec.takes_image else None


def _condition(example: TaskExample, spec: TaskSpec) -> Tensor:
    if example.condition_image is None:
        raise ValueError(f"An example of {spec.name!r} needs a condition image, but has none.")
    height, width = example.target_image.shape[1:]
    return prepare_condition_image(example.condition_image / 2 + 0.5, spec, height, width)


def _embed(pipeline: MTUPipeline, prompts: Iterable[str]) -> Tensor:
    prompts = list(prompts)
    chunks = [prompts[start : start + _ENCODE_BATCH] for start in range(0, len(prompts), _ENCODE_BATCH)]
    return torch.cat([pipeline.encode_prompt(chunk, pipeline.device, 1, False)[0].float().cpu() for chunk in chunks])
