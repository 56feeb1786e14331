"""Callbacks at the end of a step: what they see, what they may change, and what is refused."""

import pytest
import torch
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback

from .mixed_batches import STEPS, count_unet_rows, noise


def test_callback(pipe, mixed):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return tensors

    result = mixed(
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], latents=noise()
    )
    shapes = {"latents": (4, 4, 8, 8), "prompt_embeds": (9, 16, 16)}
    assert seen == [(i, int(t), shapes) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert torch.equal(result, mixed())


def test_callback_may_change_the_latents(mixed):
    def callback(pipeline, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    assert not mixed(callback_on_step_end=callback, output_type="latent").any()


def test_callback_may_change_the_prompt(mixed):
    def callback(pipeline, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    changed = mixed(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert (changed - mixed()).abs().max() > 0.01


def test_callback_may_interrupt(pipe, mixed):
    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 0
        return tensors

    calls = count_unet_rows(pipe)
    mixed(callback_on_step_end=callback)
    assert len(calls) == 1
    mixed()
    assert len(calls) == 1 + STEPS, "the next call starts afresh"


def test_callback_objects_name_their_own_tensors(mixed):
    class Halve(PipelineCallback):
        @property
        def tensor_inputs(self):
            return ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    assert not torch.equal(mixed(callback_on_step_end=Halve(cutoff_step_ratio=None, cutoff_step_index=1)), mixed())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return its dictionary of tensors, but returned None"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(4, 4, 8, 8\).*but 'latents' is \(1, 4, 8, 8\)"),
        ({"noise": torch.zeros(1)}, "but 'noise' is"),
    ],
)
def test_callback_with_a_bad_answer(mixed, returned, message):
    with pytest.raises(ValueError, match=message):
        mixed(callback_on_step_end=lambda *args: returned)


def test_callbacks_that_count_on_two_branches_are_refused(mixed):
    """diffusers' cut-off keeps the last row, which is no sample's prompt here."""
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with pytest.raises(ValueError, match=r"'prompt_embeds' is \(1, 16, 16\)"):
        mixed(callback_on_step_end=callback)
