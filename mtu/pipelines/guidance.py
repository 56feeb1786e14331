"""Guidance in mixed batches: the noise predictions that each sample needs, and the formula that combines them.

A *branch* is one row of the UNet's batch: one sample with its prompt or its negative prompt, with its condition image
or without it. `TaskSpec.guidance_branches` says which branches a task needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtu.tasks import TaskSpec

__all__ = ["GuidancePlan", "apply_guidance", "plan_guidance"]


class GuidancePlan(NamedTuple):
    """The N guidance branches of a batch of B samples, and where each sample finds its own branches among them.

    A sample has 1, 2 or 3 branches, which stand next to each other.

    Args:
        sample_indices: (N,) int64, the sample that a branch belongs to.
        use_prompt_per_branch: (N,) bool, True for the prompt and False for the negative prompt.
        use_image_per_branch: (N,) bool, True for the condition image and False for zeros.
        text_branch_of_sample: (B,) int64, the branch `t` with prompt and image.
        image_branch_of_sample: (B,) int64, the branch `i` with negative prompt and image; `u` for samples that have no
            such branch.
        unconditional_branch_of_sample: (B,) int64, the branch `u` with negative prompt and no image; `t` for samples
            without such a branch.
        guidance_scales: (B,) float32, s_text.
        image_guidance_scales: (B,) float32, s_image.
    """

    sample_indices: Tensor
    use_prompt_per_branch: Tensor
    use_image_per_branch: Tensor
    text_branch_of_sample: Tensor
    image_branch_of_sample: Tensor
    unconditional_branch_of_sample: Tensor
    guidance_scales: Tensor
    image_guidance_scales: Tensor


def plan_guidance(
    tasks: Sequence[TaskSpec],
    guidance_scales: Sequence[float],
    image_guidance_scales: Sequence[float],
    device: torch.device | str | None = None,
    *,
    embeds_guidance_scale: bool = False,
) -> GuidancePlan:
    """List the guidance branches of a batch.

    Args:
        tasks: the task of each of B samples.
        guidance_scales: s_text of each sample. It has no effect on tasks without guidance.
        image_guidance_scales: s_image of each sample. It has an effect on dual guidance only.
        device: the device of the plan's tensors.
        embeds_guidance_scale: whether the UNet takes s_text as an input (`timestep_cond`).

    Returns:
        The plan, with the branches in the order of the samples.
    """
    branches: list[tuple[int, bool, bool]] = []
    text_branch, image_branch, unconditional_branch = [], [], []
    for sample, (task, s_text, s_image) in enumerate(zip(tasks, guidance_scales, image_guidance_scales, strict=True)):
        own = task.guidance_branches(s_text, s_image, embeds_guidance_scale=embeds_guidance_scale)
        first, last = len(branches), len(branches) + len(own) - 1
        text_branch.append(first)
        image_branch.append(min(first + 1, last))
        unconditional_branch.append(last)
        branches += [(sample, *branch) for branch in own]
    columns = [torch.tensor(column, device=device) for column in zip(*branches, strict=True)]
    indices = [torch.tensor(index, device=device) for index in (text_branch, image_branch, unconditional_branch)]
    scales = [
        torch.tensor(values, dtype=torch.float32, device=device) for values in (guidance_scales, image_guidance_scales)
    ]
    return GuidancePlan(*columns, *indices, *scales)


def apply_guidance(predictions: Tensor, plan: GuidancePlan) -> Tensor:
    """Combine the noise predictions of the branches into one per sample.

        u + s_text (t − i) + s_image (i − u)

    The formula serves every kind of guidance exactly: with text guidance i is u, and without guidance both are t. It
    is computed in float32 at least, because scales amplify the rounding of differences.

    Args:
        predictions: (N, C, H, W) predictions of the branches.
        plan: the plan that `plan_guidance` returned for the batch.

    Returns:
        (B, C, H, W), in the dtype of the predictions.
    """
    shape = (-1, *(1,) * (predictions.dim() - 1))
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    t, i, u = (
        predictions[index].to(dtype)
        for index in (plan.text_branch_of_sample, plan.image_branch_of_sample, plan.unconditional_branch_of_sample)
    )
    s_text, s_image = (scale.to(dtype).view(shape) for scale in (plan.guidance_scales, plan.image_guidance_scales))
    return (u + s_text * (t - i) + s_image * (i - u)).to(predictions.dtype)
