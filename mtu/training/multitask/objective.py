"""`MultiTaskObjective`: noise or velocity prediction on all tasks at once, the paper's loss."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import Parameter

from mtu.data.task_dataset import TaskDataset
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.pipelines import MTUPipeline
from mtu.training import precision
from mtu.training.multitask.batches import (
    Batch,
    BatchLoader,
    FoundEncodings,
    MissingImages,
    MissingPrompt,
    ModelCache,
)
from mtu.training.multitask.checking import check_pipeline, trained_tasks, training_scheduler
from mtu.training.multitask.encoded_cache import EncodedCache
from mtu.training.multitask.encoding import ExamplePixels, PipelineEncoder, on_device_context, target_latents
from mtu.training.multitask.multitask_config import MultiTaskConfig
from mtu.training.multitask.parallel_loss import average_and_differentiate_losses_in_threads
from mtu.training.multitask.precomputing import encode_missing_items
from mtu.training.multitask.step_plan import StepPlan
from mtu.training.multitask.timesteps import timestep_loss_weights
from mtu.training.objective import BatchPart, Objective, PartialLoss

__all__ = ["MultiTaskObjective"]

# What determines the noise schedule in the configuration of a scheduler.
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


class _UNetInputs(NamedTuple):
    """What the UNet gets for n examples, and what it should predict.

    Args:
        sample: (n, c or 2c, h, w) noisy latents, and condition latents if any task of the model takes an image.
        timesteps, task_ids: (n,) int64.
        prompt_embeds: (n, L, D).
        pooled_prompt_embeds: (n, P); None but for SDXL.
        time_ids: (n, 6) original size, crop and target size; None but for SDXL.
        target: (n, c, h, w) float32.
    """

    sample: Tensor
    timesteps: Tensor
    task_ids: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    time_ids: Tensor | None
    target: Tensor


class _Constants(NamedTuple):
    """What weighs the errors and describes the images of all steps, on one device.

    Args:
        timestep_weights: (timesteps,) float32.
        task_weights: (T,) float32.
        resolution: (2,) int64, height and width.
    """

    timestep_weights: Tensor
    task_weights: Tensor
    resolution: Tensor


class MultiTaskObjective(Objective):
    """The sum over the tasks of a step of the mean squared error of the predicted noise.

        Σ_task loss_weight(task) · mean_examples weight(t) · ‖ε − ε_θ(x_t, t, prompt, condition; task)‖² / elements

    Under velocity prediction, v takes the place of ε. `timestep_loss_weights` gives the weights.

    Images, latents, embeddings, dropout and targets are those of diffusers' `train_text_to_image`,
    `train_text_to_image_sdxl` and `train_instruct_pix2pix`. These scripts differ in the following. They draw timesteps
    independently, which are stratified here, within each task of a step. They crop images at random by default, and the
    last script stretches them to the resolution instead. With `snr_gamma`, they ignore a timestep of noise alone.

    Args:
        pipeline: the pipeline, whose UNet is upcycled and is trained in place. The configuration of its scheduler
            determines the noise schedule and the prediction type, unless `config` does.
        datasets: the examples by task. The rows of tasks without data do not move.
        config: the settings.

    Attributes:
        unet: the UNet, the only submodule.
        prediction_type: "epsilon" or "v_prediction".
        timestep_weights: (timesteps,) weight of each timestep.

    Raises:
        ValueError: the prediction type is neither "epsilon" nor "v_prediction", or is "epsilon" on a schedule that ends
            in noise alone; the model does not have a task, or a task has no rows, or no condition of an image; or the
            UNet is not upcycled, is offloaded or is under layerwise casting.

    Example:
        >>> config = MultiTaskConfig(batch_size=8, resolution=512, cache_directory="cache")
        >>> objective = MultiTaskObjective(pipe, {"edit": ImageFolder("edits", mtu.tasks.EDIT)}, config)
        >>> Trainer(objective, TrainerConfig(steps=1000), Path("run")).train()

    Source: MTU (arXiv 2503.11905) eq. 2; dropout of conditions: InstructPix2Pix (arXiv 2211.09800) §3.2.
    """

    def __init__(
        self,
        pipeline: MTUPipeline | StableDiffusionXLPipeline,
        datasets: Mapping[str, TaskDataset],
        config: MultiTaskConfig,
    ) -> None:
        super().__init__()
        check_pipeline(pipeline, config)
        self._tasks = trained_tasks(pipeline, datasets, config)
        self.pipeline, self.config = pipeline, config
        self._warned_of: set[str] = set()
        self._is_prepared = self._enabled_checkpointing = False
        self._constants: _Constants | None = None
        self.unet: MTUUNet2DConditionModel = pipeline.unet
        self._takes_images = any(spec.takes_image for spec in pipeline.unet.tasks)
        self._encoder = PipelineEncoder(pipeline)
        self.noise_scheduler = training_scheduler(pipeline, config)
        self.prediction_type: str = self.noise_scheduler.config.prediction_type
        self._zeros_for_dropped_prompt = bool(
            isinstance(pipeline, StableDiffusionXLPipeline) and pipeline.config.force_zeros_for_empty_prompt
        )
        self.timestep_weights = timestep_loss_weights(
            self.noise_scheduler.alphas_cumprod, config.snr_gamma, config.max_inverse_snr, self.prediction_type
        )
        names = [task.spec.name for task in self._tasks]
        self.plan = StepPlan(
            {task.spec.name: len(task.dataset) for task in self._tasks},
            {name: config.shares.get(name, 1) for name in names},
            config.batch_size,
            config.seed,
        )

    # ----------------------------------------------------------------------------------------- what the trainer asks

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the loss of a step up to rounding in float32.

        They leave out into how many parts a batch is split, on which the masks of dropout layers depend.
        """
        return {
            **self.config.settings,
            "data": {task.spec.name: [len(task.dataset), task.dataset.digest] for task in self._tasks},
            "tasks": [spec.to_dict() for spec in self.unet.tasks],
            "prediction_type": self.prediction_type,
            "noise_schedule": {name: self.noise_scheduler.config[name] for name in _NOISE_SCHEDULE},
            "zeros_for_dropped_prompt": self._zeros_for_dropped_prompt,
            "vae": self._encoder.vae_digest,
            "text_encoders": self._encoder.text_digest,
        }

    def prepare(self, accelerator: Accelerator) -> None:
        """Encode what is not in the caches yet, and put each model where the steps need it.

        From then on, the pipeline samples by the noise schedule that is trained.
        """
        self.set_pipeline_scheduler_()
        if self.config.gradient_checkpointing and not self.unet.is_gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self._enabled_checkpointing = True
        # The trainer has moved the UNet to the device of training, which need not be that of the accelerator.
        device = self.unet.conv_in.weight.device
        self._is_prepared = True
        encode_missing_items(self._encoder, self.load_batch, accelerator, device, self.config.loss_threads)
        # What is cached needs no model on the accelerator, whose memory the training can use.
        for cache, modules in (
            (self.config.latent_cache, [self._encoder.vae]),
            (self.config.text_cache, self._encoder.text_encoders),
        ):
            for module in modules:
                module.to(device if cache == "none" else "cpu")

    def finish(self) -> None:
        """Make the pipeline ready to sample: all models on the UNet's device, no gradient checkpointing but its own."""
        if self._enabled_checkpointing:
            self.unet.disable_gradient_checkpointing()
        if self._is_prepared:
            for module in (self._encoder.vae, *self._encoder.text_encoders):
                module.to(self.unet.conv_in.weight.device)
        self._is_prepared = self._enabled_checkpointing = False

    def check_part_count(self, count: int) -> None:
        """Raise a ValueError if the batch cannot be split into this many equal parts."""
        size, threads = self.config.batch_size, self.config.loss_threads
        if size % (count * threads):
            split = f"{count} parts" if threads == 1 else f"{count} parts for {threads} loss threads each"
            raise ValueError(
                f"batch_size = {size} must be a multiple of {count * threads}, because processes and accumulation "
                f"steps split it into {split}."
            )

    @functools.cached_property
    def load_batch(self) -> BatchLoader:
        """The function that loads a part of a batch. Worker processes call it."""
        height, width = self.config.height_and_width
        factor, channels = self.pipeline.vae_scale_factor, self.pipeline.vae.config.latent_channels
        return BatchLoader(
            self._tasks,
            self.plan,
            self.config,
            num_timesteps=len(self.timestep_weights),
            latent_shape=(channels, height // factor, width // factor),
            zeros_for_dropped_prompt=self._zeros_for_dropped_prompt,
            latent_cache=self._open_cache(self.config.latent_cache, "latents", lambda: self._encoder.vae_digest),
            text_cache=self._open_cache(self.config.text_cache, "texts", lambda: self._encoder.text_digest),
        )

    def forward(self, batch: Batch) -> PartialLoss:
        """Compute the summand of a part of a batch."""
        self._warn_of_damage(batch)
        with torch.no_grad():
            inputs = self._unet_inputs(batch)
        constants = self._constants_on(inputs.timesteps.device)
        weights = constants.timestep_weights[inputs.timesteps] / batch.counts
        loss, errors = self._weighted_loss(inputs, weights * constants.task_weights[inputs.task_ids])
        names = [spec.name for spec in self.unet.tasks]
        with torch.no_grad():
            # Not by a product with 0 or 1: an error that is not finite must not spread to other tasks.
            terms = {
                name: torch.where(inputs.task_ids == names.index(name), weights * errors, 0.0).sum()
                for name in batch.tasks
            }
        return PartialLoss(loss, terms, errors)

    def describe_examples(self, part: BatchPart) -> Sequence[str]:
        """Tell a user which examples a part consists of."""
        return self.load_batch.describe(part)

    def row_parameters(self) -> Sequence[Parameter]:
        """The trained parameters with one row per task."""
        modules = self.unet.per_task_modules_by_name().values()
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def trained_rows(self, step: int) -> Sequence[int]:
        """The ids of the tasks that a step has examples of."""
        return sorted({self._tasks[example.task].task_id for example in self.plan.examples(step)})

    def sharding_units(self) -> Sequence[nn.Module]:
        """The transformer blocks with experts."""
        return list(self.unet.routed_blocks_by_name().values())

    def set_pipeline_scheduler_(self) -> None:
        """Let the scheduler of the pipeline sample what the training taught: prediction type and noise schedule.

        A schedule that ends in noise alone is sampled from its last timestep ("trailing"), as otherwise that timestep
        would have been trained in vain. A scheduler that knows no such schedule, such as PNDM, makes way for DDIM. One
        that samples so already stays the same object. `prepare` calls this method.
        """
        scheduler = self.pipeline.scheduler
        changes: dict[str, Any] = {"prediction_type": self.prediction_type}
        kind: Any = type(scheduler)
        if self.noise_scheduler.config.rescale_betas_zero_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
                kind = DDIMScheduler
        if kind is not type(scheduler) or any(scheduler.config.get(name) != value for name, value in changes.items()):
            self.pipeline.scheduler = kind.from_config(scheduler.config, **changes)

    # ------------------------------------------------------------------------------------------- the loss of a part

    def _unet_inputs(self, batch: Batch) -> _UNetInputs:
        """Encode what is missing, add the noise, and gather the inputs of the UNet."""
        count, device = len(batch.task_ids), batch.timesteps.device
        latents = _merged(batch.latents, self._encode_images(batch.missing_images), count)
        texts = _merged(batch.texts, self._encode_prompts(batch.missing_prompts, device), count)
        clean = target_latents(latents["target"], batch.latent_noise) * self.pipeline.vae.config.scaling_factor
        condition = latents["condition"].float() * batch.keeps_image.view(-1, 1, 1, 1)
        noisy = self.noise_scheduler.add_noise(clean, batch.noise, batch.timesteps)
        target = batch.noise
        if self.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(clean, batch.noise, batch.timesteps)

        def embeds(name: str) -> Tensor:
            dropped = batch.has_zero_text.view(-1, *(1,) * (texts[name].dim() - 1))
            return torch.where(dropped, 0, texts[name])

        pooled = time_ids = None
        if self._encoder.is_xl:
            pooled = embeds("pooled_prompt_embeds")
            resolution = self._constants_on(device).resolution
            # In float32: the pipelines round the sizes to the dtype of the text embeddings.
            time_ids = torch.cat([latents["sizes"], resolution.expand(count, 2)], dim=1).float()
        return _UNetInputs(
            torch.cat([noisy, condition], dim=1) if self._takes_images else noisy,
            batch.timesteps,
            batch.task_ids,
            embeds("prompt_embeds"),
            pooled,
            time_ids,
            target,
        )

    def _constants_on(self, device: torch.device) -> _Constants:
        """The constants of the loss, which are copied to a device once."""
        if self._constants is None or self._constants.resolution.device != device:
            weights = [self.config.loss_weights.get(spec.name, 1.0) for spec in self.unet.tasks]
            self._constants = _Constants(
                self.timestep_weights.to(device),
                torch.tensor(weights, device=device),
                torch.tensor(self.config.height_and_width, device=device),
            )
        return self._constants

    def _encode_images(self, missing: MissingImages | None) -> dict[int, dict[str, Tensor]]:
        """The latents of images that were not in the cache, by position. They are put into it now."""
        encoded, cache = {}, self.load_batch.latent_cache
        if missing is None:
            return encoded
        with on_device_context([self._encoder.vae], missing.targets.device):
            for i, position in enumerate(missing.positions):
                condition = missing.conditions[i] if missing.have_condition[i] else None
                pixels = ExamplePixels(missing.targets[i], condition, missing.sizes[i])
                entry = self._encoder.encode_images(pixels, missing.descriptions[i])
                self._put(cache, missing.keys[i], entry)
                mean = entry["target"].chunk(2)[0]
                encoded[position] = {"condition": torch.zeros_like(mean), **entry}
        return encoded

    def _encode_prompts(self, missing: list[MissingPrompt], device: torch.device) -> dict[int, dict[str, Tensor]]:
        """The embeddings of prompts that were not in the cache, by position. They are put into it now."""
        cache = self.load_batch.text_cache
        if not missing:
            return {}
        keys = {item.prompt: item.key for item in missing}
        with on_device_context(self._encoder.text_encoders, device):
            embeds = dict(zip(keys, self._encoder.encode_prompts(list(keys)), strict=True))
        for prompt, key in keys.items():
            self._put(cache, key, embeds[prompt])
        return {item.position: embeds[item.prompt] for item in missing}

    def _put(self, cache: ModelCache | None, key: str, entry: Mapping[str, Tensor]) -> None:
        """Put an entry into a cache, if there is one. A step goes on without it, so a full disk does not end it."""
        if cache is None:
            return
        try:
            cache.entries.put(key, entry)
        except OSError as error:
            reason = error.strerror or error
            self._warn_once("full", f"The cache does not keep what a step encodes, which costs time: {reason}.")

    def _warn_of_damage(self, batch: Batch) -> None:
        if batch.num_damaged_entries:
            message = (
                f"The caches in {self.config.cache_directory} have damaged files, whose contents are encoded anew."
            )
            self._warn_once("damaged", message)

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned_of:
            self._warned_of.add(subject)
            warnings.warn(message, stacklevel=2)

    def _weighted_loss(self, inputs: _UNetInputs, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the examples' errors, and the detached errors."""
        threads = self.config.loss_threads
        if threads == 1 or not torch.is_grad_enabled():
            errors = self._errors(inputs)
            return (errors * weights).sum(), errors.detach()
        size = len(weights) // threads
        parts = [slice(start, start + size) for start in range(0, len(weights), size)]
        errors = torch.empty_like(weights)

        def compute(part: slice) -> Tensor:
            own = self._errors(_UNetInputs(*(None if tensor is None else tensor[part] for tensor in inputs)))
            errors[part] = own.detach()
            return (own * weights[part]).sum()

        trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        mean = average_and_differentiate_losses_in_threads([functools.partial(compute, one) for one in parts], trained)
        return mean * threads, errors

    def _errors(self, inputs: _UNetInputs) -> Tensor:
        """The (n,) mean squared errors of the predictions, in float32."""
        dtype = self.unet.conv_in.weight.dtype
        added = None
        if inputs.pooled_prompt_embeds is not None:
            added = {"text_embeds": inputs.pooled_prompt_embeds.to(dtype), "time_ids": inputs.time_ids}
        autocast_dtype = torch.bfloat16 if self.config.precision == "bf16" else None
        cache_weights = self.config.loss_threads == 1
        with precision.autocast_to(inputs.sample.device.type, autocast_dtype, cache_weights=cache_weights):
            predicted = self.unet(
                inputs.sample.to(dtype),
                inputs.timesteps,
                inputs.prompt_embeds.to(dtype),
                added_cond_kwargs=added,
                task_ids=inputs.task_ids,
            ).sample
        return (predicted.float() - inputs.target).square().mean(dim=(1, 2, 3))

    def _open_cache(self, kind: str, folder: str, digest: Callable[[], str]) -> ModelCache | None:
        if kind == "none":
            return None
        directory = None if kind == "memory" else Path(self.config.cache_directory) / folder
        return ModelCache(EncodedCache(directory), digest())


def _merged(found: FoundEncodings, encoded: dict[int, dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The tensors of n examples by name, (n, …), of which a cache had some, and the others were encoded now."""
    if not encoded:
        return found.tensors
    had = {position: i for i, position in enumerate(found.positions)}

    def row(name: str, position: int) -> Tensor:
        return encoded[position][name] if position in encoded else found.tensors[name][had[position]]

    names = next(iter(encoded.values()))
    return {name: torch.stack([row(name, position) for position in range(count)]) for name in names}
