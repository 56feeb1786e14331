"""Callbacks between two denoising steps: the tensors and guidance scales that they see, and what they may change."""

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
    """The scale that a pipeline shows: a number where all samples that count agree, else (B,) float64."""
    agreed = {scale for scale, guided in zip(scales, is_guided, strict=True) if guided}
    if len(agreed) > 1:
        return torch.tensor(scales, dtype=torch.float64)
    return next(iter(agreed), 1.0)


class StepEndCallback:
    """A user's callback after each step, and what it changes for the steps that follow.

    Args:
        callback: called as `callback(pipeline, step, timestep, tensors)`.
        tensor_names: of the tensors it is given.
        pipeline: whose settings it may change.
        samples: of this call.
        embeds_scale: whether the UNet takes the guidance scale of text as an input.
    """

    def __init__(
        self,
        callback: Callable,
        tensor_names: Sequence[str],
        pipeline: DiffusionPipeline,
        samples: SampleConditioning,
        embeds_scale: bool,
    ) -> None:
        self._callback = callback
        self._tensor_names = tensor_names
        self._pipeline = pipeline
        self._samples = samples
        self._embeds_scale = embeds_scale
        self._scales = self._current_scales()

    def __call__(
        self, step: int, timestep: Tensor, latents: Tensor, branches: BranchInputs
    ) -> tuple[Tensor, BranchInputs]:
        """Latents and branches to go on with.

        Raises:
            ValueError: tensors that do not fit the branches, or a setting that is no guidance scale.
        """
        tensors = {"latents": latents, "prompt_embeds": branches.prompt_embeds}
        if len(branches.prompt_embeds) > len(self._samples.tasks):
            tensors["prompt_embeds"] = branches.prompt_embeds[_stock_order(branches.plan)]
        changed = self._callback(self._pipeline, step, timestep, {name: tensors[name] for name in self._tensor_names})
        if not isinstance(changed, dict):
            raise ValueError(f"callback_on_step_end must return its dictionary of tensors, but returned {changed!r}.")
        if self._pipeline._guidance_rescale:
            raise ValueError(
                "Guidance is not rescaled here: _guidance_rescale must stay 0, but a callback set it to "
                f"{self._pipeline._guidance_rescale!r}."
            )
        scales, plan = self._current_scales(), branches.plan
        if scales != self._scales:
            plan = plan_guidance(self._samples.tasks, *scales, latents.device, embeds_scale=self._embeds_scale)
            self._scales = scales
        _check_shapes(changed, tensors, {len(branches.plan.sample_index), len(plan.sample_index)})
        latents = changed.get("latents", latents)
        embeds = changed.get("prompt_embeds", tensors["prompt_embeds"])
        if plan is branches.plan and embeds is tensors["prompt_embeds"]:
            return latents, branches
        # Rows for the branches that there were are sorted into those that there are now.
        given = branches.plan if len(embeds) == len(branches.prompt_embeds) else plan
        rows = {key: row for row, key in enumerate(_keys(given, _stock_order(given)))}
        missing = [key for key in _keys(plan) if key not in rows]
        if missing:
            raise ValueError(
                f"A callback that turns on the guidance of sample {missing[0][0]} must return prompt_embeds of all "
                f"{len(plan.sample_index)} branches, but there are {len(embeds)}."
            )
        chosen = torch.tensor([rows[key] for key in _keys(plan)], device=embeds.device)
        return latents, build_branch_inputs(self._samples, plan, embeds[chosen])

    def _current_scales(self) -> tuple[list[float], list[float]]:
        count, pipeline = len(self._samples.tasks), self._pipeline
        return (
            _per_sample("_guidance_scale", pipeline._guidance_scale, count),
            _per_sample("_image_guidance_scale", pipeline._image_guidance_scale, count),
        )


def _stock_order(plan: GuidancePlan) -> Tensor:
    """The rows in the order of the stock pipelines, where all samples have equally many; else as they are.

    Stable Diffusion has the negative prompts first, InstructPix2Pix the prompts.
    """
    count, rows = len(plan.text_branch), len(plan.sample_index)
    if rows == 2 * count and bool((plan.text_branch != plan.unconditional_branch).all()):
        return torch.cat([plan.unconditional_branch, plan.text_branch])
    if rows == 3 * count and bool((plan.image_branch != plan.unconditional_branch).all()):
        return torch.cat([plan.text_branch, plan.image_branch, plan.unconditional_branch])
    return torch.arange(rows, device=plan.sample_index.device)


def _keys(plan: GuidancePlan, order: Tensor | None = None) -> list[tuple[int, bool, bool]]:
    """What each branch is: its sample, and whether it has prompt and image."""
    columns = [column if order is None else column[order] for column in plan[:3]]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _check_shapes(changed: dict[str, Any], tensors: dict[str, Tensor], rows: set[int]) -> None:
    for name, tensor in changed.items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        fits = name in tensors and isinstance(tensor, Tensor) and tensor.shape[1:] == tensors[name].shape[1:]
        if not fits or len(tensor) not in (rows if name == "prompt_embeds" else {len(tensors[name])}):
            expected = {known: tuple(old.shape) for known, old in tensors.items()}
            raise ValueError(f"callback_on_step_end must return {expected}, but {name!r} is {shape}.")


def _per_sample(name: str, value: Any, count: int) -> list[float]:
    values = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    values = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(values) != count or not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be a finite number, or {count} of them, but a callback set it to {value!r}.")
    return [float(v) for v in values]
