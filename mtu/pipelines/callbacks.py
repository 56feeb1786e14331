"""Callbacks of the user between two denoising steps, and the changes that they may make.

A callback may change latents, prompt embeddings and guidance scales, and the following steps use the changed ones.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from mtu.pipelines.denoising import BranchInputs, SampleConditioning, build_branch_inputs
from mtu.pipelines.guidance import GuidancePlan, plan_guidance

__all__ = ["StepEndCallback", "collapse_guidance_scales"]


def collapse_guidance_scales(scales: Sequence[float], is_guided: Sequence[bool]) -> float | Tensor:
    """Turn the guidance scales of all samples into the value that a pipeline shows to callbacks.

    Args:
        scales: the scale of each of B samples.
        is_guided: whether the scale has an effect on the sample.

    Returns:
        One number if all guided samples have the same scale (1 if there is no guided sample), else (B,) float64.
    """
    guided_scales = {scale for scale, guided in zip(scales, is_guided, strict=True) if guided}
    if len(guided_scales) > 1:
        return torch.tensor(scales, dtype=torch.float64)
    return next(iter(guided_scales), 1.0)


class StepEndCallback:
    """Calls a user's callback after each step, and applies its changes to the steps that follow.

    Args:
        callback: called as `callback(pipeline, step, timestep, tensors)`; returns a dictionary of changed tensors.
        tensor_names: the names of the tensors that the callback gets.
        pipeline: the pipeline whose guidance scales the callback may change.
        samples: the conditioning of the samples of this call.
        embeds_guidance_scale: whether the UNet takes the guidance scale of text as an input.
    """

    def __init__(
        self,
        callback: Callable,
        tensor_names: Sequence[str],
        pipeline: DiffusionPipeline,
        samples: SampleConditioning,
        embeds_guidance_scale: bool,
    ) -> None:
        self._callback = callback
        self._tensor_names = tensor_names
        self._pipeline = pipeline
        self._samples = samples
        self._embeds_guidance_scale = embeds_guidance_scale
        self._scales = self._current_scales()

    def __call__(
        self, step: int, timestep: Tensor, latents: Tensor, branches: BranchInputs
    ) -> tuple[Tensor, BranchInputs]:
        """Run the callback after a step.

        Args:
            step: number of the step, from 0.
            timestep: () timestep of the step.
            latents: (B, 4, h, w) latents after the step.
            branches: the inputs that the UNet got in the step.

        Returns:
            The latents and the branch inputs of the next step.

        Raises:
            ValueError: the callback returned tensors that do not fit the branches, or set a guidance scale that is no
                finite number.
        """
        tensors = {"latents": latents, "prompt_embeds": branches.prompt_embeds}
        if len(branches.prompt_embeds) > len(self._samples.tasks):
            tensors["prompt_embeds"] = branches.prompt_embeds[_stock_order(branches.plan)]
        changed = self._callback(self._pipeline, step, timestep, {name: tensors[name] for name in self._tensor_names})
        if not isinstance(changed, dict):
            raise ValueError(f"callback_on_step_end must return its dictionary of tensors, but returned {changed!r}.")
        if self._pipeline._guidance_rescale:
            raise ValueError(
                "This pipeline does not rescale guidance: _guidance_rescale must stay 0, but a callback set it to "
                f"{self._pipeline._guidance_rescale!r}."
            )
        scales, plan = self._current_scales(), branches.plan
        if scales != self._scales:
            plan = plan_guidance(
                self._samples.tasks, *scales, latents.device, embeds_guidance_scale=self._embeds_guidance_scale
            )
            self._scales = scales
        _check_shapes(changed, tensors, {len(branches.plan.sample_indices), len(plan.sample_indices)})
        latents = changed.get("latents", latents)
        embeds = changed.get("prompt_embeds", tensors["prompt_embeds"])
        if plan is branches.plan and embeds is tensors["prompt_embeds"]:
            return latents, branches
        # A callback that changes the number of branches may return the rows of the old plan or those of the new one.
        embeds_plan = branches.plan if len(embeds) == len(branches.prompt_embeds) else plan
        return latents, build_branch_inputs(self._samples, plan, _reorder_embeds(embeds, embeds_plan, plan))

    def _current_scales(self) -> tuple[list[float], list[float]]:
        count, pipeline = len(self._samples.tasks), self._pipeline
        return (
            _per_sample("_guidance_scale", pipeline._guidance_scale, count),
            _per_sample("_image_guidance_scale", pipeline._image_guidance_scale, count),
        )


def _stock_order(plan: GuidancePlan) -> Tensor:
    """The order of the branches in the stock pipelines; the plan's own order if samples differ in their branches.

    Stable Diffusion puts the negative prompts first, and InstructPix2Pix the prompts.
    """
    samples, branches = len(plan.text_branch_of_sample), len(plan.sample_indices)
    if branches == 2 * samples and bool((plan.text_branch_of_sample != plan.unconditional_branch_of_sample).all()):
        return torch.cat([plan.unconditional_branch_of_sample, plan.text_branch_of_sample])
    if branches == 3 * samples and bool((plan.image_branch_of_sample != plan.unconditional_branch_of_sample).all()):
        return torch.cat([plan.text_branch_of_sample, plan.image_branch_of_sample, plan.unconditional_branch_of_sample])
    return torch.arange(branches, device=plan.sample_indices.device)


def _reorder_embeds(embeds: Tensor, old_plan: GuidancePlan, new_plan: GuidancePlan) -> Tensor:
    """Pick the rows of the new plan's branches out of prompt embeddings in the stock order of the old plan."""
    rows = {key: row for row, key in enumerate(_branch_keys(old_plan, _stock_order(old_plan)))}
    keys = _branch_keys(new_plan)
    missing = [key for key in keys if key not in rows]
    if missing:
        raise ValueError(
            f"A callback that turns on the guidance of sample {missing[0][0]} must return prompt_embeds of all "
            f"{len(keys)} branches, but it returned {len(embeds)}."
        )
    return embeds[torch.tensor([rows[key] for key in keys], device=embeds.device)]


def _branch_keys(plan: GuidancePlan, order: Tensor | None = None) -> list[tuple[int, bool, bool]]:
    """The sample of each branch, whether the branch has the prompt, and whether it has the image."""
    columns = [column if order is None else column[order] for column in plan[:3]]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _check_shapes(changed: dict[str, Any], tensors: dict[str, Tensor], branch_counts: set[int]) -> None:
    for name, tensor in changed.items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        fits = name in tensors and isinstance(tensor, Tensor) and tensor.shape[1:] == tensors[name].shape[1:]
        if not fits or len(tensor) not in (branch_counts if name == "prompt_embeds" else {len(tensors[name])}):
            expected = {known: tuple(old.shape) for known, old in tensors.items()}
            raise ValueError(f"callback_on_step_end must return {expected}, but {name!r} is {shape}.")


def _per_sample(name: str, value: Any, count: int) -> list[float]:
    values = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    values = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(values) != count or not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be a finite number, or {count} of them, but a callback set it to {value!r}.")
    return [float(v) for v in values]
