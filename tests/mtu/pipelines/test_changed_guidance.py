"""Callbacks that change the guidance between two steps: as in the stock pipelines on the exported tasks."""

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from tests.mtu.pipelines.mixed_batches import NEGATIVES, PROMPTS, TASKS, assert_same, images, noise

STEPS = 4
ROWS = ["latents", "prompt_embeds"]


def on_step(step, **changes):
    """A callback that sets attributes of the pipeline after a step, to values or by functions of the old ones."""

    def callback(pipeline, index, timestep, tensors):
        if index == step:
            for name, change in changes.items():
                setattr(pipeline, name, change(getattr(pipeline, name)) if callable(change) else change)
        return tensors

    return callback


def cut(pipeline, index, timestep, tensors):
    """diffusers' own example of a callback: guidance is turned off, and the negative prompts are dropped."""
    if index == 1:
        pipeline._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
    return tensors


def swap_prompts(pipeline, index, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"].flip(0)} if index == 1 else tensors


def both(pipe, picture, name, count=2, **given):
    """Images of the multi-task pipeline and of the stock one, and the guidance scale that each shows afterwards."""
    index = TASKS.index(name)
    arguments = {
        "prompt": [PROMPTS[index], "a blue star"][:count],
        "negative_prompt": [NEGATIVES[index], "dull"][:count],
        "latents": noise(count),
        "num_inference_steps": STEPS,
        "output_type": "pt",
        "callback_on_step_end_tensor_inputs": ROWS,
        **given,
    }
    stock = pipe.export_task(name)
    if pipe.unet.tasks[index].takes_image:
        arguments["image"] = [images(picture)[1], images(picture)[3]][:count]
    if pipe.unet.tasks[index].guidance == "dual":
        arguments |= {"image_guidance_scale": 1.6}
    results = [pipe(task=name, **arguments).images, stock(**arguments).images]
    return results, [pipe.guidance_scale, stock.guidance_scale]


CHANGES = {
    "more": on_step(0, _guidance_scale=lambda scale: scale + 3.0),
    "less": on_step(1, _guidance_scale=1.5),
    "attention": on_step(1, _cross_attention_kwargs={}),
    "prompts": swap_prompts,
}


@pytest.mark.parametrize("name", ["text-to-image", "edit"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_act_as_in_the_stock_pipeline(pipe, picture, name, change):
    (ours, stock), shown = both(pipe, picture, name, callback_on_step_end=change, guidance_scale=3.0)
    assert_same(ours, stock)
    assert shown[0] == shown[1]
    (plain, _), _ = both(pipe, picture, name, guidance_scale=3.0)
    assert ((ours - plain).abs().max() > 0.001) == (change is not CHANGES["attention"])


def test_the_image_scale_may_change_too(pipe, picture):
    change = on_step(1, _image_guidance_scale=lambda scale: scale * 2, _guidance_scale=5.0)
    (ours, stock), _ = both(pipe, picture, "edit", callback_on_step_end=change, guidance_scale=3.0)
    assert_same(ours, stock)
    assert pipe.image_guidance_scale == 3.2


@pytest.mark.parametrize("callback", [cut, SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)])
def test_guidance_may_be_turned_off(pipe, picture, callback):
    count = 2 if callback is cut else 1  # diffusers' class keeps one row
    (ours, stock), shown = both(pipe, picture, "text-to-image", count, callback_on_step_end=callback)
    assert_same(ours, stock)
    assert shown == [0.0, 0.0]


def test_negative_prompts_are_dropped_with_their_guidance(pipe):
    calls, change = [], on_step(1, _guidance_scale=1.0)
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    given = {"latents": noise(2), "num_inference_steps": STEPS, "output_type": "pt"}
    given["callback_on_step_end_tensor_inputs"] = ROWS
    dropped = pipe(["a", "b"], callback_on_step_end=change, **given).images
    assert calls == [4, 4, 2, 2]
    assert_same(dropped, pipe(["a", "b"], callback_on_step_end=cut, **given).images)


def test_guidance_that_is_turned_on_needs_its_rows(pipe):
    embeds = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))

    def turn_on(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 4.0
        return {"prompt_embeds": embeds}

    given = {"latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": 1.0}
    stock = pipe.export_task("text-to-image")
    assert_same(*(one("a", callback_on_step_end=turn_on, **given).images for one in (pipe, stock)))
    with pytest.raises(ValueError, match="turns on the guidance of sample 0 must return prompt_embeds of all 2 branch"):
        pipe("a", callback_on_step_end=on_step(0, _guidance_scale=4.0), **given)


def mixed(pipe, picture, **given):
    arguments = {"prompt": list(PROMPTS), "image": images(picture), "task": list(TASKS), "latents": noise()}
    arguments |= {"num_inference_steps": STEPS, "output_type": "pt", "callback_on_step_end_tensor_inputs": ROWS}
    return pipe(**arguments, **given).images


def test_a_mixed_batch_gives_each_sample_what_it_gets_alone(pipe, picture):
    """Scales that differ are a tensor, of one for each sample: what is added to it is added to each."""
    change = on_step(1, _guidance_scale=lambda scale: scale + 2.0, _image_guidance_scale=lambda scale: scale + 0.5)
    together = mixed(pipe, picture, callback_on_step_end=change)
    assert pipe.guidance_scale.tolist() == [9.5, 9.5, 3.0, 6.0]
    for i, name in enumerate(TASKS):
        given = {"latents": noise()[i : i + 1], "num_inference_steps": STEPS, "output_type": "pt"}
        alone = pipe(PROMPTS[i], images(picture)[i], name, callback_on_step_end=change, **given).images
        assert_same(together[i : i + 1], alone)


def test_a_number_holds_for_all_samples_of_a_mixed_batch(pipe, picture):
    """For dual guidance, 0 is a scale as any other; text-to-image loses its negative branch."""
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    together = mixed(pipe, picture, callback_on_step_end=on_step(0, _guidance_scale=0.0))
    assert calls == [9, 8, 8, 8]
    change = on_step(0, _guidance_scale=0.0)
    given = {"latents": noise()[1:2], "num_inference_steps": STEPS, "output_type": "pt"}
    assert_same(
        together[1:2], pipe(PROMPTS[1], images(picture)[1], "edit", callback_on_step_end=change, **given).images
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_guidance_scale": float("nan")},
            "_guidance_scale must be a finite number, or 1 of them, but a callback",
        ),
        ({"_guidance_scale": "more"}, "must be a finite number, or 1 of them, but a callback set it to 'more'"),
        ({"_image_guidance_scale": [1.0, 2.0]}, r"_image_guidance_scale must be .* set it to \[1.0, 2.0\]"),
        ({"_guidance_rescale": 0.7}, "_guidance_rescale must stay 0, but a callback set it to 0.7"),
    ],
)
def test_settings_that_cannot_be_followed_raise(pipe, change, message):
    given = {"latents": noise(1), "num_inference_steps": 2, "output_type": "pt"}
    with pytest.raises(ValueError, match=message):
        pipe("a", callback_on_step_end=on_step(0, **change), **given)
