"""Guidance: which noise predictions each sample of a mixed batch needs, and how they are combined."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtu.tasks import TaskSpec

__all__ = ["GuidancePlan", "apply_guidance", "plan_guidance"]


class GuidancePlan(NamedTuple):
    """The branches of a batch as one flat list of N, and where each of B samples finds its own in it.

    A branch is one row of the UNet's batch. Samples have 1, 2 or 3 of them.

    Args:
        sample_index: (N,) int64, the sample a branch belongs to.
        use_prompt: (N,) bool, prompt (else negative prompt).
        use_image: (N,) bool, condition image (else zeros).
        text_branch: (B,) int64, branch of prompt and image, `t`.
        image_branch: (B,) int64, branch of negative prompt and image, `i`; `u` where there is none.
        unconditional_branch: (B,) int64, branch of negative prompt without image, `u`; `t` where there is none.
        guidance_scale: (B,) float32, s_text.
        image_guidance_scale: (B,) float32, s_image.
    """

    sample_index: Tensor
    use_prompt: Tensor
    use_image: Tensor
    text_branch: Tensor
    image_branch: Tensor
    unconditional_branch: Tensor
    guidance_scale: Tensor
    image_guidance_scale: Tensor


def plan_guidance(
    tasks: Sequence[TaskSpec],
    guidance_scales: Sequence[float],
    image_guidance_scales: Sequence[float],
    device: torch.device | str | None = None,
    *,
    embeds_scale: bool = False,
) -> GuidancePlan:
    """Lay out the branches of a batch; `TaskSpec.guidance_branches` says which a sample has.

    Args:
        tasks: the task of each of B samples.
        guidance_scales: s_text of each sample; ignored for tasks without guidance.
        image_guidance_scales: s_image of each sample; ignored but for dual guidance.
        device: of the plan's tensors.
        embeds_scale: the UNet takes the guidance scale of text as an input (`timestep_cond`).
    """
    branches: list[tuple[int, bool, bool]] = []
    text_branch, image_branch, unconditional_branch = [], [], []
    for sample, (task, s_text, s_image) in enumerate(zip(tasks, guidance_scales, image_guidance_scales, strict=True)):
        own = task.guidance_branches(s_text, s_image, embeds_guidance_scale=embeds_scale)
        first, last = len(branches), len(branches) + len(own) - 1
        text_branch.append(first)
        image_branch.append(min(first + 1, last))
        unconditional_branch.append(last)
        branches += [(sample, *branch) for branch in own]
    rows = [torch.tensor(column, device=device) for column in zip(*branches, strict=True)]
    indices = [torch.tensor(index, device=device) for index in (text_branch, image_branch, unconditional_branch)]
    scales = [
        torch.tensor(values, dtype=torch.float32, device=device) for values in (guidance_scales, image_guidance_scales)
    ]
    return GuidancePlan(*rows, *indices, *scales)


def apply_guidance(predictions: Tensor, plan: GuidancePlan) -> Tensor:
    """`u + s_text (t − i) + s_image (i − u)` for each sample.

    With text guidance i is u, and without guidance both are t, so that one formula serves all, exactly. Computed in
    float32 at least: scales amplify the rounding of differences, and would themselves be rounded in low precision.

    Args:
        predictions: (N, C, H, W), of the branches.
        plan: what `plan_guidance` returned.

    Returns:
        (B, C, H, W), in the dtype of the predictions.
    """
    shape = (-1, *(1,) * (predictions.dim() - 1))
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    t, i, u = (
        predictions[index].to(dtype) for index in (plan.text_branch, plan.image_branch, plan.unconditional_branch)
    )
    guidance_scale, image_guidance_scale = (
        scale.to(dtype).view(shape) for scale in (plan.guidance_scale, plan.image_guidance_scale)
    )
    return (u + guidance_scale * (t - i) + image_guidance_scale * (i - u)).to(predictions.dtype)
