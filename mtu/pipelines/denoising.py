"""The denoising loop: the rows of each UNet call of a pipeline, and the steps of the scheduler between them.

Pipelines differ in how they encode text and finish images. They share all that is here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from mtu.compat.private_interfaces import retrieve_latents
from mtu.pipelines.guidance import GuidancePlan, apply_guidance
from mtu.pipelines.inputs import PipelineInputs, prepare_condition_image
from mtu.tasks import TaskSpec

__all__ = [
    "BranchInputs",
    "SampleConditioning",
    "build_branch_inputs",
    "denoise",
    "encode_condition_images",
    "select_prompt_embeds",
]


class SampleConditioning(NamedTuple):
    """What stays the same through all steps, a row for each of B samples.

    Args:
        tasks: B task specs.
        task_ids: (B,) int64.
        condition_latents: (B, 4, h, w) condition latents, zero for samples without an image; None if none has one.
        timestep_cond: (B, W) embedded guidance scales, for UNets that take them; else None.
    """

    tasks: Sequence[TaskSpec]
    task_ids: Tensor
    condition_latents: Tensor | None
    timestep_cond: Tensor | None


class BranchInputs(NamedTuple):
    """What the UNet is called with, a row for each of N guidance branches.

    Args:
        plan: which branch is what.
        prompt_embeds: (N, L, D).
        condition_latents: (N, 4, h, w) condition latents; None if no sample has an image.
        task_ids: (N,) int64.
        timestep_cond: (N, W), or None.
    """

    plan: GuidancePlan
    prompt_embeds: Tensor
    condition_latents: Tensor | None
    task_ids: Tensor
    timestep_cond: Tensor | None


def build_branch_inputs(samples: SampleConditioning, plan: GuidancePlan, prompt_embeds: Tensor) -> BranchInputs:
    """The rows of a plan, whose text embeddings are `prompt_embeds` (N, L, D)."""
    condition_latents, timestep_cond = samples.condition_latents, samples.timestep_cond
    if condition_latents is not None:
        condition_latents = condition_latents[plan.sample_index] * plan.use_image[:, None, None, None].to(
            condition_latents.dtype
        )
    if timestep_cond is not None:
        timestep_cond = timestep_cond[plan.sample_index]
    return BranchInputs(plan, prompt_embeds, condition_latents, samples.task_ids[plan.sample_index], timestep_cond)


def select_prompt_embeds(plan: GuidancePlan, positive: Tensor, negative: Tensor | None) -> Tensor:
    """The text embedding of each branch, (N, L, D), out of those of the prompts and negative prompts, (B, L, D)."""
    chosen = positive[plan.sample_index]
    if negative is None:
        return chosen
    return torch.where(plan.use_prompt[:, None, None], chosen, negative[plan.sample_index])


def encode_condition_images(
    vae: AutoencoderKL, inputs: PipelineInputs, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The condition latents of each sample, the mode of what the VAE encodes, unscaled.

    Args:
        vae: of the pipeline.
        inputs: images and tasks of B samples.
        size: height and width of the outputs in pixels.
        device: where the VAE runs.
        dtype: of the result.

    Returns:
        (B, 4, h, w), zero for samples without an image; None if no sample has any.
    """
    with_image = [i for i, image in enumerate(inputs.images) if image is not None]
    if not with_image:
        return None
    # Each goes to the device first: tensors may come from several places.
    pixels = [
        prepare_condition_image(inputs.images[i], inputs.tasks[i], *size).to(device, vae.dtype) for i in with_image
    ]
    encoded = retrieve_latents(vae.encode(torch.stack(pixels)), sample_mode="argmax").to(dtype)
    condition_latents = encoded.new_zeros(len(inputs.images), *encoded.shape[1:])
    condition_latents[with_image] = encoded
    return condition_latents


def denoise(
    pipeline: DiffusionPipeline,
    latents: Tensor,
    branches: BranchInputs,
    num_inference_steps: int,
    scheduler_kwargs: dict[str, Any],
    on_step_end: Callable[[int, Tensor, Tensor, BranchInputs], tuple[Tensor, BranchInputs]] | None = None,
) -> Tensor:
    """Run the scheduler's timesteps: one UNet call over all branches each, combined by their guidance.

    Args:
        pipeline: its UNet, its scheduler with the timesteps set, its progress bar, and its interruption.
        latents: (B, 4, h, w) initial noise.
        branches: of the first step.
        num_inference_steps: as the user counts them, for the progress bar.
        scheduler_kwargs: arguments of `scheduler.step`.
        on_step_end: called with the step, the timestep, the latents and the branches; returns those to go on with.

    Returns:
        (B, 4, h, w) denoised latents.
    """
    scheduler = pipeline.scheduler
    timesteps, order = scheduler.timesteps, scheduler.order
    # Some schedulers (PNDM) have more timesteps than steps: as in diffusers, the first ones do not count.
    warmup = len(timesteps) - num_inference_steps * order
    with pipeline.unet.precomputed_routing(), pipeline.progress_bar(total=num_inference_steps) as progress_bar:
        for i, t in enumerate(timesteps):
            if pipeline.interrupt:
                continue
            model_input = scheduler.scale_model_input(latents[branches.plan.sample_index], t)
            if branches.condition_latents is not None:
                model_input = torch.cat([model_input, branches.condition_latents], dim=1)
            predictions: Tensor = pipeline.unet(
                model_input,
                t,
                encoder_hidden_states=branches.prompt_embeds,
                timestep_cond=branches.timestep_cond,
                cross_attention_kwargs=pipeline.cross_attention_kwargs,
                return_dict=False,
                task_ids=branches.task_ids,
            )[0]
            noise = apply_guidance(predictions, branches.plan)
            latents = scheduler.step(noise, t, latents, **scheduler_kwargs, return_dict=False)[0]
            if on_step_end is not None:
                latents, branches = on_step_end(i, t, latents, branches)
            # Schedulers of higher order have several timesteps per step.
            if i == len(timesteps) - 1 or (i + 1 > warmup and (i + 1) % order == 0):
                progress_bar.update()
    return latents
