"""Calls that the pipeline refuses, before anything changes."""

import numpy as np
import PIL.Image
import pytest
import torch

from mtu.tasks import TaskSpec

GENERATOR = torch.Generator()


BLANK = PIL.Image.new("RGB", (16, 16))


EDIT_CALL = {"prompt": "a", "image": BLANK, "task": "edit"}


BAD_CALLS = [
    ({"prompt": "a", "task": "paint"}, "Unknown task 'paint'"),
    ({"prompt": ["a", "b"], "task": ["text-to-image"] * 3}, "one entry per sample, but got 2 for prompt, 3 for task"),
    ({"prompt": "a", "task": "edit"}, "'edit' takes an image, but sample 0 has none"),
    ({"prompt": "a", "image": BLANK}, "'text-to-image' takes no image, but sample 0 has one"),
    ({**EDIT_CALL, "image": torch.full((3, 16, 16), float("nan"))}, "must be finite"),
    ({**EDIT_CALL, "image": torch.full((3, 16, 16), 2.0)}, r"must be in \[0, 1\]"),
    (
        {**EDIT_CALL, "image": [BLANK, BLANK], "prompt": ["a"]},
        "one entry per sample, but got 1 for prompt, 2 for image",
    ),
    ({**EDIT_CALL, "image": PIL.Image.new("RGB", (1, 1))}, "at least 2 pixels"),
    ({**EDIT_CALL, "prompt": None}, "needs a prompt"),
    ({"prompt": "a", "image": BLANK, "task": "super-resolution"}, "takes no prompt, but sample 0 has 'a'"),
    ({"prompt": []}, "At least one sample"),
    ({"prompt": "a", "negative_prompt": 3}, "negative prompt is a string"),
    ({"prompt": "a", "height": 16}, "both height and width or neither"),
    ({"prompt": "a", "height": 15, "width": 16}, "height must be a positive multiple of 2 pixels, but got 15"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be an integer ≥ 1, but got 0"),
    ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a finite number ≥ 0, but got nan"),
    ({**EDIT_CALL, "image_guidance_scale": -1}, "image_guidance_scale must be a finite number ≥ 0, but got -1"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be an integer ≥ 1, but got 0"),
    ({"prompt": "a", "output_type": "jpg"}, "output_type must be 'pil', 'np', 'pt' or 'latent', but got 'jpg'"),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 9, 8)}, r"shape \(1, 4, 8, 8\), but got \(1, 4, 9, 8\)"),
    ({"prompt": ["a", "b"], "latents": torch.zeros(1, 4, 8, 8)}, r"shape \(2, 4, 8, 8\), but got \(1, 4, 8, 8\)"),
    ({"prompt": "a", "latents": np.zeros((1, 4, 8, 8))}, "latents must be a floating-point tensor.*ndarray"),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 8).long()}, "latents must be a floating-point tensor.*int64"),
    ({"prompt": "a", "eta": -0.1}, r"eta must be a number in \[0, 1\], but got -0.1"),
    ({"prompt": "a", "eta": float("nan")}, r"eta must be a number in \[0, 1\], but got nan"),
    ({"prompt": ["a", "b"], "generator": [GENERATOR]}, "one entry for each of 2 outputs, but got 1"),
    ({"prompt": "a", "num_images_per_prompt": 2, "generator": [GENERATOR]}, "each of 2 outputs, but got 1"),
    ({"prompt": "a", "generator": [7]}, "generator must be a torch.Generator or a list of them, but got a .*int"),
    ({"prompt": "a", "generator": 7}, "generator must be a torch.Generator or a list of them, but got a .*int"),
    ({"prompt": ["a", "b"], "generator": [GENERATOR, None]}, "generator must be a torch.Generator.*NoneType"),
    ({"prompt": ["a", "b"], "generator": (GENERATOR, GENERATOR)}, "generator must be a torch.Generator.*tuple"),
    ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"\['latents', 'prompt_embeds'\], but got"),
]


@pytest.mark.parametrize(("given", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_calls_change_nothing(shared_pipe, given, message):
    pipe = shared_pipe
    pipe.scheduler.set_timesteps(5)
    before = repr(vars(pipe.scheduler)), dict(vars(pipe)), dict(pipe.config)
    states = GENERATOR.get_state(), torch.get_rng_state()
    used = []
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda module, args: used.append(type(module).__name__))
        for name in ("unet", "text_encoder")
    ]
    try:
        with pytest.raises(ValueError, match=message) as raised:
            pipe(**{"generator": GENERATOR, **given})
    finally:
        for hook in hooks:
            hook.remove()
    text = str(raised.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert not used
    assert torch.equal(GENERATOR.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (repr(vars(pipe.scheduler)), dict(vars(pipe)), dict(pipe.config)) == before


def test_tasks_this_pipeline_cannot_serve(pipe, picture):
    """Not silently with zeros in the place of channels that nobody gave."""
    pipe.unet.add_task(TaskSpec("masked", condition_channels=5), init_from="edit")
    with pytest.raises(ValueError, match="'masked' reads 5 condition channels, but this pipeline gives the 4 latent"):
        pipe("a", picture(), "masked", num_inference_steps=1)


def test_arguments_of_other_pipelines(pipe):
    for name in ("prompt_embeds", "ip_adapter_image", "strength"):
        with pytest.raises(TypeError, match=name):
            pipe("a", **{name: None})
