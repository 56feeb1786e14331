"""The denoising loop that all multi-task pipelines share: build the UNet's inputs, call it, step the scheduler.

Pipelines differ in how they encode text and decode latents, so neither is here.
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
    """The conditioning of B samples that stays the same through all steps of a call.

    Args:
        tasks: the task of each sample.
        task_ids: (B,) int64, the same tasks as the UNet numbers them.
        condition_latents: (B, 4, h, w), zero for samples without an image; None if no sample has an image.
        timestep_cond: (B, W) embedded guidance scales; None if the UNet does not take them.
    """

    tasks: Sequence[TaskSpec]
    task_ids: Tensor
    condition_latents: Tensor | None
    timestep_cond: Tensor | None


class BranchInputs(NamedTuple):
    """The inputs of the UNet, besides the noisy latents, for N guidance branches.

    Args:
        plan: the sample of each branch, and its part in the guidance.
        prompt_embeds: (N, L, D) text embeddings.
        condition_latents: (N, 4, h, w), zero for branches without an image; None if no sample has an image.
        task_ids: (N,) int64.
        timestep_cond: (N, W) embedded guidance scales; None if the UNet does not take them.
    """

    plan: GuidancePlan
    prompt_embeds: Tensor
    condition_latents: Tensor | None
    task_ids: Tensor
    timestep_cond: Tensor | None


def build_branch_inputs(samples: SampleConditioning, plan: GuidancePlan, prompt_embeds: Tensor) -> BranchInputs:
    """Spread the conditioning of B samples over their N guidance branches.

    Args:
        samples: the conditioning of the samples.
        plan: the branches.
        prompt_embeds: (N, L, D) text embeddings of the branches.
    """
    condition_latents, timestep_cond = samples.condition_latents, samples.timestep_cond
    if condition_latents is not None:
        use_image = plan.use_image_per_branch[:, None, None, None].to(condition_latents.dtype)
        condition_latents = condition_latents[plan.sample_indices] * use_image
    if timestep_cond is not None:
        timestep_cond = timestep_cond[plan.sample_indices]
    return BranchInputs(plan, prompt_embeds, condition_latents, samples.task_ids[plan.sample_indices], timestep_cond)


def select_prompt_embeds(plan: GuidancePlan, positive: Tensor, negative: Tensor | None) -> Tensor:
    """Select the text embedding of each guidance branch.

    Args:
        plan: the N branches.
        positive: (B, L, D) embeddings of the prompts.
        negative: (B, L, D) embeddings of the negative prompts; None if no branch needs them.

    Returns:
        (N, L, D).
    """
    positive = positive[plan.sample_indices]
    if negative is None:
        return positive
    return torch.where(plan.use_prompt_per_branch[:, None, None], positive, negative[plan.sample_indices])


def encode_condition_images(
    vae: AutoencoderKL, inputs: PipelineInputs, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Encode the condition images of a call into unscaled latents, the mode of the VAE's posterior.

    Args:
        vae: the VAE of the pipeline.
        inputs: the images and tasks of B samples.
        size: height and width of the outputs in pixels, to which the images are resized.
        device: the device of the VAE.
        dtype: the dtype of the latents.

    Returns:
        (B, 4, h, w), zero for samples without an image; None if no sample has an image.
    """
    with_image = [i for i, image in enumerate(inputs.images) if image is not None]
    if not with_image:
        return None
    # Image tensors may be on different devices, so each goes to the VAE's device before they are stacked.
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
    """Denoise latents: at each timestep, call the UNet once for all branches, apply guidance and step the scheduler.

    Args:
        pipeline: the pipeline whose UNet, scheduler (with its timesteps set), progress bar and `interrupt` are used.
        latents: (B, 4, h, w) initial noise.
        branches: inputs of the UNet in the first step.
        num_inference_steps: number of steps that the user asked for, which the progress bar counts.
        scheduler_kwargs: further arguments of `scheduler.step`.
        on_step_end: called with step, timestep, latents and branch inputs; returns the latents and branch inputs of
            the next step.

    Returns:
        (B, 4, h, w) denoised latents.
    """
    scheduler = pipeline.scheduler
    timesteps, order = scheduler.timesteps, scheduler.order
    # Some schedulers (PNDM) have more timesteps than steps. As in diffusers, the progress bar skips the first ones.
    warmup = len(timesteps) - num_inference_steps * order
    with pipeline.unet.precomputed_routing_context(), pipeline.progress_bar(total=num_inference_steps) as progress_bar:
        for i, t in enumerate(timesteps):
            if pipeline.interrupt:
                continue
            model_input = scheduler.scale_model_input(latents[branches.plan.sample_indices], t)
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
