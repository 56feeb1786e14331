"""Guidance: how many branches a sample gets, where they lie, and what they are combined to."""

import dataclasses

import pytest
import torch

from mtu.pipelines.guidance import apply_guidance, plan_guidance
from mtu.tasks import EDIT, REMOVE, SUPER_RESOLUTION, TEXT_TO_IMAGE, TaskSpec

GUIDED_BY_TEXT = TaskSpec("restyle", condition_channels=4, guidance="text")


# By task, and by the scales of text and image.
BRANCHES = {
    TEXT_TO_IMAGE: {(7.5, 1.0): 2, (1.0, 1.0): 1, (0.0, 9.0): 1},
    GUIDED_BY_TEXT: {(3.0, 1.0): 2, (0.5, 1.0): 1},
    EDIT: {(7.5, 1.6): 3, (1.0, 1.6): 3, (7.5, 1.0): 3, (7.5, 0.5): 3, (0.0, 0.0): 3, (1.0, 1.0): 1},
    SUPER_RESOLUTION: {(7.5, 1.5): 1, (1.0, 1.0): 1},
}


@pytest.mark.parametrize("task", BRANCHES, ids=lambda task: task.name)
def test_number_of_branches(task):
    for (text, image), count in BRANCHES[task].items():
        plan = plan_guidance([task], [text], [image])
        branches = plan.sample_indices, plan.use_prompt_per_branch, plan.use_image_per_branch
        assert [len(values) for values in branches] == [count] * 3, (text, image)


def test_layout_of_a_mixed_batch():
    tasks = [TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION, REMOVE, GUIDED_BY_TEXT]
    plan = plan_guidance(tasks, [7.5, 7.0, 1.0, 4.0, 2.0], [1.0, 1.6, 1.0, 1.5, 1.0])
    assert plan.sample_indices.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4]
    use_prompt = plan.use_prompt_per_branch
    assert use_prompt.tolist() == [True, False, True, False, False, True, True, False, False, True, False]
    assert plan.use_image_per_branch.tolist() == [True, True, True, True, False, True, True, True, False, True, True]
    assert plan.text_branch_of_sample.tolist() == [0, 2, 5, 6, 9]
    assert plan.image_branch_of_sample.tolist() == [1, 3, 5, 7, 10]
    assert plan.unconditional_branch_of_sample.tolist() == [1, 4, 5, 8, 10]
    assert plan.guidance_scales.tolist() == [7.5, 7.0, 1.0, 4.0, 2.0]
    assert [tensor.dtype for tensor in plan] == [torch.int64, *[torch.bool] * 2, *[torch.int64] * 3] + [
        torch.float32
    ] * 2


def test_branches_belong_to_their_sample():
    tasks = [EDIT, TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION] * 3
    plan = plan_guidance(tasks, [1.0, 3.0, 2.0, 1.0] * 3, [1.0, 1.0, 2.0, 1.0] * 3)
    every = torch.arange(len(tasks))
    for branch in (plan.text_branch_of_sample, plan.image_branch_of_sample, plan.unconditional_branch_of_sample):
        torch.testing.assert_close(plan.sample_indices[branch], every, rtol=0, atol=0)
    assert plan.use_prompt_per_branch[plan.text_branch_of_sample].all()


def test_combination_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    tasks, s_text, s_image = [TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION, REMOVE], [5.0, 7.5, 3.0, 4.0], [2.0, 1.6, 9.0, 1.5]
    predictions = torch.randn(9, 4, 3, 5, generator=generator, dtype=torch.float64)
    y = apply_guidance(predictions, plan_guidance(tasks, s_text, s_image))
    t, u = predictions[:2]
    torch.testing.assert_close(y[0], u + 5.0 * (t - u))
    t, i, u = predictions[2:5]
    # Scales are kept in float32.
    torch.testing.assert_close(y[1], u + 7.5 * (t - i) + 1.6 * (i - u), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y[2], predictions[5], rtol=0, atol=0)
    t, i, u = predictions[6:9]
    torch.testing.assert_close(y[3], u + 4.0 * (t - i) + 1.5 * (i - u))
    assert y.dtype == torch.float64


def test_one_branch_is_returned_bit_for_bit():
    predictions = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    plan = plan_guidance([TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION], [0.3, 1.0, 7.3], [5.7, 1.0, 3.1])
    assert torch.equal(apply_guidance(predictions, plan), predictions)


def test_text_guidance_ignores_the_image_scale():
    predictions = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    results = [apply_guidance(predictions, plan_guidance([GUIDED_BY_TEXT], [3.7], [s])) for s in (0.0, 1.0, 8.3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_only_the_result(dtype):
    """Neither the scale (7.3 is no bfloat16 number) nor a difference is rounded: the result is within half an ulp."""
    predictions = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = apply_guidance(predictions, plan_guidance([EDIT], [7.3], [1.6]))
    t, i, u = predictions.double()
    exact = u + 7.3 * (t - i) + 1.6 * (i - u)
    assert y.dtype == dtype
    # Half an ulp of the storage type, and float32 rounding where terms cancel.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert ((y[0].double() - exact).abs() <= allowed).all()


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        plan_guidance([EDIT, EDIT], [1.0], [1.0, 1.0])


def test_scales_of_the_paper():
    specs = {spec.name: spec for spec in (TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION, REMOVE)}
    scales = {name: (spec.guidance_scale, spec.image_guidance_scale) for name, spec in specs.items()}
    assert scales["text-to-image"][0] == 7.5
    assert scales["edit"] == (7.5, 1.6)
    assert scales["remove"] == (4.0, 1.5)
    assert dataclasses.asdict(SUPER_RESOLUTION)["guidance"] == "none"
