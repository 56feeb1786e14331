"""The multi-task pipeline: its law, what it inherits from diffusers, and what it refuses."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig

import mtu
from mtu.tasks import TaskSpec

# Schedulers of diffusers hand tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# float32 rounding of another order of operations (folded or routed, batched or alone), through a few UNet calls and
# guidance: at most 1.5e-6 was measured on images in [0, 1], for all schedulers. Another task's weights, prompt or
# image make a difference of 0.05 and more (`test_tasks_prompts_and_images_matter`).
TOLERANCE = 2e-5

TASKS = ("text-to-image", "edit", "super-resolution", "remove")
PROMPTS = ("a red bell", "make it blue", "", "remove the bell")
NEGATIVES = ("ugly", "grey", "", "noise")
STEPS = 3


def noise(count: int = 4, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(7))


def seeds(count: int = 4) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def images(picture) -> list[PIL.Image.Image | None]:
    """Of the four tasks, all for an output of 16×16."""
    return [None, picture(16, 16, 1), picture(8, 8, 2), picture(16, 16, 3)]


@pytest.fixture
def mixed(pipe, picture):
    """Run one batch of all four tasks; arguments may be overridden."""

    def run(**given):
        arguments = {"prompt": list(PROMPTS), "image": images(picture), "task": list(TASKS), "latents": noise()}
        arguments |= {"num_inference_steps": STEPS, "output_type": "pt", **given}
        return pipe(**arguments).images

    return run


def run_stock(pipe, name, prompt, image, latents, *, text=None, dual=None, steps=STEPS, **given):
    """What the stock pipeline of a task makes; `image` already has the size of the output, as it must."""
    spec = next(spec for spec in pipe.unet.tasks if spec.name == name)
    stock = pipe.export_task(name)
    stock.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": spec.guidance_scale if text is None else text}
    if spec.takes_image:
        assert isinstance(stock, StableDiffusionInstructPix2PixPipeline)
        # Without dual guidance, i − u drops out of the stock formula at the scale 1.
        default = 1.0 if spec.image_guidance_scale is None else spec.image_guidance_scale
        guidance |= {"image": image, "image_guidance_scale": default if dual is None else dual}
    if latents is None:
        given |= {} if spec.takes_image else {"height": 16, "width": 16}
    return stock(prompt, latents=latents, num_inference_steps=steps, output_type="pt", **{**guidance, **given}).images


def at_output_size(image: PIL.Image.Image | None) -> PIL.Image.Image | None:
    return None if image is None else image.resize((16, 16), PIL.Image.Resampling.BICUBIC)


def assert_same(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- law


SCHEDULERS = [
    DDIMScheduler,
    pytest.param(PNDMScheduler, marks=pytest.mark.slow),
    pytest.param(EulerDiscreteScheduler, marks=pytest.mark.slow),
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.slow),
    pytest.param(UniPCMultistepScheduler, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
def test_law(pipe, mixed, picture, scheduler):
    """Each image of a mixed batch is that of the stock pipeline on the exported task."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    together = mixed(negative_prompt=list(NEGATIVES), generator=seeds())
    for i, name in enumerate(TASKS):
        stock = run_stock(
            pipe,
            name,
            PROMPTS[i],
            at_output_size(images(picture)[i]),
            noise()[i : i + 1],
            negative_prompt=NEGATIVES[i],
            generator=seeds()[i],
        )
        assert_same(together[i : i + 1], stock)


def test_law_for_stochastic_solvers(pipe, mixed, picture):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    together = mixed(generator=seeds())
    for i in (0, 1):
        image = images(picture)[i]
        stock = run_stock(pipe, TASKS[i], PROMPTS[i], image, noise()[i : i + 1], generator=seeds()[i])
        assert_same(together[i : i + 1], stock)


def test_law_with_eta(pipe, mixed, picture):
    together = mixed(generator=seeds(), eta=0.8)
    stock = run_stock(pipe, "edit", PROMPTS[1], images(picture)[1], noise()[1:2], generator=seeds()[1], eta=0.8)
    assert_same(together[1:2], stock)
    assert (together - mixed(generator=seeds())).abs().max() > 0.01


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_law_for_other_predictions(pipe, mixed, picture, prediction):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    together = mixed()
    stock = run_stock(pipe, "remove", PROMPTS[3], images(picture)[3], noise()[3:])
    assert_same(together[3:], stock)


@pytest.mark.parametrize("index", range(4))
def test_law_for_a_pure_batch(pipe, picture, index):
    name, prompt, image = TASKS[index], PROMPTS[index], images(picture)[index]
    prompts = [prompt, prompt and "another " + prompt]
    pair = pipe(
        prompts,
        None if image is None else [image] * 2,
        name,
        latents=noise(2),
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    large = at_output_size(image)
    stock = run_stock(pipe, name, prompts, None if large is None else [large] * 2, noise(2))
    assert_same(pair, stock)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize(
    "settings",
    [{"num_experts": 4, "top_k": 2}, {"num_experts": 2, "norm": "task_expert"}],
    ids=["top-k", "task_expert"],
)
@pytest.mark.filterwarnings("ignore:The output of the original cannot be preserved", "ignore:In .* layers some expert")
def test_law_for_other_layouts(stock, picture, settings, init):
    pipe = mtu.upcycle(stock, **settings, init=init)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    for parameter in pipe.unet.trainable_parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    together = pipe(
        list(PROMPTS), images(picture), list(TASKS), latents=noise(), num_inference_steps=2, output_type="pt"
    ).images
    for i, name in enumerate(TASKS):
        image = at_output_size(images(picture)[i])
        assert_same(together[i : i + 1], run_stock(pipe, name, PROMPTS[i], image, noise()[i : i + 1], steps=2))


def test_tasks_prompts_and_images_matter(pipe, mixed, picture):
    """What the tolerance of the law is to be compared with."""
    reference = mixed()
    other_tasks = mixed(task=["text-to-image", "remove", "super-resolution", "edit"])
    assert other_tasks[0].sub(reference[0]).abs().max() <= TOLERANCE
    for i in (1, 3):
        assert (other_tasks[i] - reference[i]).abs().max() > 0.05
    other_prompts = mixed(prompt=["one", "two", "", "three"])
    for i in (0, 1, 3):
        assert (other_prompts[i] - reference[i]).abs().max() > 0.05
    other_images = mixed(image=[None, *(image.rotate(90) for image in images(picture)[1:])])
    for i in (1, 2, 3):
        assert (other_images[i] - reference[i]).abs().max() > 0.05
    other_negatives = mixed(negative_prompt=list(NEGATIVES))
    for i in (0, 1, 3):
        assert (other_negatives[i] - reference[i]).abs().max() > 0.05
    assert_same(other_negatives[2], reference[2])


def test_mixed_is_solo(pipe, mixed, picture):
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    together = mixed(generator=seeds())
    for i, (name, prompt, image) in enumerate(zip(TASKS, PROMPTS, images(picture), strict=True)):
        alone = pipe(
            prompt,
            image,
            name,
            latents=noise()[i : i + 1],
            generator=seeds()[i],
            num_inference_steps=STEPS,
            output_type="pt",
        ).images
        assert_same(together[i : i + 1], alone)


def test_order_of_samples_is_that_of_the_call(mixed, picture):
    order = [2, 0, 3, 1]
    shuffled = mixed(
        prompt=[PROMPTS[i] for i in order],
        image=[images(picture)[i] for i in order],
        task=[TASKS[i] for i in order],
        latents=noise()[order],
    )
    assert_same(shuffled, mixed()[order])


def test_many_samples_of_one_task_between_others(mixed, picture):
    index = [1, 1, 0, 1, 2, 0, 3]
    result = mixed(
        prompt=[PROMPTS[i] for i in index],
        image=[images(picture)[i] for i in index],
        task=[TASKS[i] for i in index],
        latents=noise()[index],
    )
    assert_same(result, mixed()[index])


# ------------------------------------------------------------------------------------------------------- guidance


def test_scales_of_each_sample(pipe, mixed, picture):
    together = mixed(guidance_scale=[3.0, 9.0, 2.0, 1.5], image_guidance_scale=[None, 2.5, None, 1.1])
    stock = {}
    stock[0] = run_stock(pipe, TASKS[0], PROMPTS[0], None, noise()[:1], text=3.0)
    stock[1] = run_stock(pipe, TASKS[1], PROMPTS[1], images(picture)[1], noise()[1:2], text=9.0, dual=2.5)
    stock[2] = run_stock(pipe, TASKS[2], "", at_output_size(images(picture)[2]), noise()[2:3], text=1.0)
    stock[3] = run_stock(pipe, TASKS[3], PROMPTS[3], images(picture)[3], noise()[3:], text=1.5, dual=1.1)
    for i, expected in stock.items():
        assert_same(together[i : i + 1], expected)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_text_guidance_up_to_one_is_the_prompt_alone(pipe, mixed, scale):
    together = mixed(guidance_scale=[scale, None, None, None])
    assert_same(together[:1], run_stock(pipe, TASKS[0], PROMPTS[0], None, noise()[:1], text=scale))


def test_dual_guidance_with_both_one_is_the_prompt_alone(pipe, mixed, picture):
    together = mixed(guidance_scale=[None, 1.0, None, None], image_guidance_scale=[None, 1.0, None, None])
    stock = run_stock(pipe, "edit", PROMPTS[1], images(picture)[1], noise()[1:2], text=1.0, dual=1.0)
    assert_same(together[1:2], stock)


def test_dual_guidance_keeps_to_its_formula_where_stock_pipelines_drop_it(pipe, picture):
    """Stock pipelines silently fall back to the prompt alone if s_text ≤ 1 or s_image < 1."""
    given = {"latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt"}
    prompt, image = PROMPTS[1], images(picture)[1]

    def run(text, dual):
        return pipe(prompt, image, "edit", guidance_scale=text, image_guidance_scale=dual, **given).images

    # Continuous in the scales: no jump at s_text = 1.
    assert (run(1.0, 1.6) - run(1.001, 1.6)).abs().max() < 0.01
    assert_same(run(1.001, 1.6), run_stock(pipe, "edit", prompt, image, noise(1), text=1.001, dual=1.6))
    assert (run(1.0, 1.6) - run_stock(pipe, "edit", prompt, image, noise(1), text=1.0, dual=1.6)).abs().max() > 0.01
    # s_text = s_image = 0: the branch without prompt and image is that of an empty prompt and zero latents.
    assert (run(0.0, 0.0) - run(1.0, 1.0)).abs().max() > 0.05


def test_text_guidance_of_a_task_with_an_image(pipe, picture):
    """The negative branch keeps the image: the stock formula at the image scale 1."""
    pipe.unet.add_task(TaskSpec("restyle", guidance="text", guidance_scale=5.0), init_from="edit")
    image = images(picture)[1]
    expected = run_stock(pipe, "restyle", "blue", image, noise(1), negative_prompt="red")
    calls = count_unet_rows(pipe)
    result = pipe(
        "blue", image, "restyle", latents=noise(1), num_inference_steps=STEPS, output_type="pt", negative_prompt="red"
    ).images
    assert calls == [2] * STEPS
    assert_same(result, expected)


def test_own_task_among_others(pipe, picture):
    spec = TaskSpec(
        "quarter", guidance="dual", guidance_scale=3.0, image_guidance_scale=1.2, scale=4, resample="bilinear"
    )
    pipe.unet.add_task(spec, init_from="edit")
    small = picture(4, 4)
    result = pipe(
        ["bigger", "a bell"],
        [small, None],
        ["quarter", "text-to-image"],
        latents=noise(2),
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    large = small.resize((16, 16), PIL.Image.Resampling.BILINEAR)
    assert_same(result[:1], run_stock(pipe, "quarter", "bigger", large, noise(2)[:1]))
    assert_same(result[1:], run_stock(pipe, "text-to-image", "a bell", None, noise(2)[1:]))


def count_unet_rows(pipe) -> list[int]:
    """A list to which each UNet call appends its number of rows."""
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_the_unet_is_called_once_per_timestep(pipe, mixed, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    calls = count_unet_rows(pipe)
    mixed(num_inference_steps=4)
    assert calls == [2 + 3 + 1 + 3] * len(pipe.scheduler.timesteps)
    calls.clear()
    mixed(num_inference_steps=4, guidance_scale=[1.0, 1.0, 5.0, 4.0], image_guidance_scale=[2.0, 1.0, 3.0, 1.0])
    assert calls == [1 + 1 + 1 + 3] * len(pipe.scheduler.timesteps)
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps)


def test_channels_of_the_unet_are_those_of_the_batch(pipe, mixed):
    widths: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    mixed(num_inference_steps=1)
    pipe("a bell", num_inference_steps=1, output_type="latent")
    assert widths == [8, 4]


# ----------------------------------------------------------------------------- generators, latents, images per prompt


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_a_generator_per_image(pipe, mixed, picture, scheduler):
    """Also the initial noise: each image is the one its generator makes alone."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    together = mixed(latents=None, generator=seeds(), eta=0.5)
    for i in (0, 2):
        alone = pipe(
            PROMPTS[i],
            images(picture)[i],
            TASKS[i],
            generator=seeds()[i],
            height=16,
            width=16,
            num_inference_steps=STEPS,
            output_type="pt",
            eta=0.5,
        ).images
        assert_same(together[i : i + 1], alone)
    stock = run_stock(pipe, "edit", PROMPTS[1], images(picture)[1], None, generator=seeds()[1], eta=0.5)
    assert_same(together[1:2], stock)


def test_one_generator_reproduces_a_call(mixed):
    first = mixed(latents=None, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, mixed(latents=None, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, mixed(latents=None, generator=torch.Generator().manual_seed(6)))


def test_images_per_prompt(pipe, mixed, picture):
    """Outputs of one sample lie side by side, each with its own noise."""
    result = mixed(num_images_per_prompt=2, latents=noise(8), guidance_scale=[3.0, 4.0, 5.0, 6.0])
    assert len(result) == 8
    every_second = mixed(latents=noise(8)[1::2], guidance_scale=[3.0, 4.0, 5.0, 6.0])
    assert_same(result[1::2], every_second)
    stock = run_stock(pipe, "edit", [PROMPTS[1]] * 2, [images(picture)[1]] * 2, noise(8)[2:4], text=4.0)
    assert_same(result[2:4], stock)


def test_images_per_prompt_with_generators(mixed):
    result = mixed(num_images_per_prompt=2, latents=None, generator=seeds(8))
    assert not torch.equal(result[0], result[1])
    assert_same(result[::2], mixed(latents=None, generator=seeds(8)[::2]))


def test_latents_are_not_changed_and_may_have_another_precision(mixed):
    latents = noise()
    reference = mixed(latents=latents)
    assert torch.equal(latents, noise())
    assert torch.equal(mixed(latents=latents.double()), reference)


# ------------------------------------------------------------------------------------------------------------- sizes


def test_default_size_is_the_models_own(pipe):
    assert pipe("a", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


def test_sizes_from_images(pipe, picture):
    given = {"num_inference_steps": 1, "output_type": "pt"}
    assert pipe("a", picture(20, 12), "edit", **given).images.shape == (1, 3, 12, 20)
    assert pipe("a", picture(21, 13), "edit", **given).images.shape == (1, 3, 12, 20)
    assert pipe(image=picture(9, 7), task="super-resolution", **given).images.shape == (1, 3, 14, 18)


@pytest.mark.parametrize(("height", "width"), [(12, 20), (14, 10)])
def test_given_size(pipe, mixed, picture, height, width):
    """Images are resized with their task's filter; the latents may be odd in number."""
    latents = noise(4, (height // 2, width // 2))
    result = mixed(height=height, width=width, latents=latents)
    assert result.shape == (4, 3, height, width)
    filters = [None, PIL.Image.Resampling.LANCZOS, PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.LANCZOS]
    for i in (1, 2, 3):
        resized = images(picture)[i].resize((width, height), filters[i])
        assert_same(result[i : i + 1], run_stock(pipe, TASKS[i], PROMPTS[i], resized, latents[i : i + 1]))


def test_kinds_of_images_are_equal(pipe, picture):
    image = images(picture)[2]
    given = {"task": "super-resolution", "num_inference_steps": 2, "output_type": "pt", "latents": noise(1)}
    reference = pipe(image=image, **given).images
    array = np.array(image)
    for kind in (array, torch.from_numpy(array).permute(2, 0, 1), array[None], [array], image.convert("RGBA")):
        assert torch.equal(pipe(image=kind, **given).images, reference)


# --------------------------------------------------------------------------------------------------- output, callbacks


def test_output_types(mixed):
    tensors = mixed()
    assert isinstance(tensors, torch.Tensor)
    assert tensors.shape == (4, 3, 16, 16)
    arrays = mixed(output_type="np")
    assert isinstance(arrays, np.ndarray)
    assert arrays.shape == (4, 16, 16, 3)
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = mixed(output_type="pil")
    assert [(image.mode, image.size) for image in pictures] == [("RGB", (16, 16))] * 4
    assert np.array_equal(np.stack([np.array(image) for image in pictures]), (arrays * 255).round().astype(np.uint8))


def test_latent_output_is_what_the_vae_decodes(pipe, mixed):
    latents = mixed(output_type="latent")
    assert latents.shape == (4, 4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert_same(mixed(), (decoded / 2 + 0.5).clamp(0, 1))


def test_tuple_output(pipe):
    result = pipe("a", num_inference_steps=1, output_type="pt", return_dict=False)
    assert isinstance(result, tuple)
    assert result[0].shape == (1, 3, 16, 16)
    assert result[1] is None


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler, DPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_progress_bar(pipe, capfd, scheduler, steps):
    """It counts steps, of which a scheduler may make several timesteps."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    pipe("a", num_inference_steps=steps, output_type="latent")
    last = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert f"{steps}/{steps} " in last


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


# -------------------------------------------------------------------------------- upcycling, saving, loading, export


def test_upcycling_keeps_the_other_components(stock):
    before = dict(stock.components)
    pipe = mtu.upcycle(stock, ["text-to-image", "edit"], 2)
    assert type(pipe) is mtu.MTUPipeline
    assert [spec.name for spec in pipe.unet.tasks] == ["text-to-image", "edit"]
    assert pipe.config.requires_safety_checker is False
    for name, component in pipe.components.items():
        assert (component is before[name]) == (name != "unet" or component is None)


def test_upcycling_keeps_the_images(stock):
    given = {"latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt"}
    before = stock("a red bell", **given).images
    pipe = mtu.upcycle(stock)
    pipe.set_progress_bar_config(disable=True)
    assert_same(pipe("a red bell", **given).images, before)


def test_upcycling_twice(pipe):
    with pytest.raises(ValueError, match=r"upcycled already.*expected a stock UNet"):
        mtu.upcycle(pipe)


def test_upcycling_another_pipeline(stock):
    other = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    with pytest.raises(TypeError, match="StableDiffusionPipeline, but got a StableDiffusionImg2ImgPipeline"):
        mtu.upcycle(other)


def test_a_stock_unet_in_the_pipeline(stock):
    pipe = mtu.MTUPipeline(**stock.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"holds a UNet2DConditionModel, but an upcycled UNet is needed") as raised:
        pipe("a bell")
    assert "mtu.upcycle(pipe)" in str(raised.value)
    assert type(mtu.upcycle(pipe).unet) is mtu.MTUUNet2DConditionModel


def test_saving_and_loading(pipe, mixed, tmp_path):
    expected = mixed()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MTUPipeline"
    assert index["unet"] == ["mtu", "MTUUNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    loaded = mtu.MTUPipeline.from_pretrained(tmp_path)
    assert type(loaded) is mtu.MTUPipeline
    assert loaded.unet.tasks == pipe.unet.tasks
    pipe.unet, pipe.vae, pipe.text_encoder = loaded.unet, loaded.vae, loaded.text_encoder
    pipe.tokenizer, pipe.scheduler = loaded.tokenizer, loaded.scheduler
    assert torch.equal(mixed(), expected)


def test_the_stock_class_opens_a_saved_folder_as_text_to_image(pipe, tmp_path):
    given = {"prompt": "a red bell", "latents": noise(1), "num_inference_steps": STEPS, "output_type": "pt"}
    expected = pipe(**given).images
    pipe.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionPipeline
    assert_same(opened(**given).images, expected)


def test_exported_pipelines_share_all_but_the_unet(pipe):
    for name, kind in zip(TASKS, [StableDiffusionPipeline, *[StableDiffusionInstructPix2PixPipeline] * 3], strict=True):
        exported = pipe.export_task(name)
        assert type(exported) is kind
        assert type(exported.unet) is UNet2DConditionModel
        assert exported.unet.config.in_channels == (4 if name == "text-to-image" else 8)
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            assert getattr(exported, part) is getattr(pipe, part)


def test_exporting_an_unknown_task(pipe):
    with pytest.raises(ValueError, match="Unknown task 'paint': this model has"):
        pipe.export_task("paint")


def test_exported_pipelines_can_be_saved(pipe, picture, tmp_path):
    image = images(picture)[1]
    expected = run_stock(pipe, "edit", "blue", image, noise(1))
    pipe.export_task("edit").save_pretrained(tmp_path)
    loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    given = {"guidance_scale": 7.5, "image_guidance_scale": 1.6, "num_inference_steps": STEPS, "output_type": "pt"}
    assert torch.equal(loaded("blue", image=image, latents=noise(1), **given).images, expected)


# ------------------------------------------------------------------------------------------- diffusers' own features


def test_lora(pipe, mixed):
    """On the feed-forward networks, which then run through the wrapped modules, and the attentions."""
    reference = mixed()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["net.2", "to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    full = mixed()
    assert (full - reference).abs().max() > 0.01
    assert_same(mixed(cross_attention_kwargs={"scale": 1.0}), full)
    assert_same(mixed(cross_attention_kwargs={"scale": 0.0}), reference)
    half = mixed(cross_attention_kwargs={"scale": 0.5})
    assert (half - full).abs().max() > 0.01
    assert (half - reference).abs().max() > 0.01
    pipe.unet.disable_adapters()
    assert_same(mixed(), reference)


def test_a_pipeline_with_adapters_is_not_saved_in_part(pipe, tmp_path):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"Unload adapters, .* before save_pretrained: .*to_q is a Linear of peft\.$"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_bfloat16(pipe, mixed):
    reference = mixed(output_type="latent")
    pipe.to(torch.bfloat16)
    result = mixed(output_type="latent")
    assert result.dtype == torch.bfloat16
    assert torch.isfinite(result).all()
    # bfloat16 has 8 bits; guidance amplifies its rounding. Another task's weights differ by more than 1.
    scale = reference.abs().max()
    assert (result.float() - reference).abs().mean() <= 0.05 * scale
    assert mixed(output_type="np").dtype == np.float32


def test_slicing(pipe, mixed):
    reference = mixed()
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    assert_same(mixed(), reference)
    pipe.disable_attention_slicing()
    for block in pipe.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(3, dim=1)
    assert_same(mixed(), reference)


def test_channels_last(pipe, mixed):
    reference = mixed()
    pipe.unet.to(memory_format=torch.channels_last)
    assert_same(mixed(), reference)


@pytest.mark.slow
def test_compiled_unet(pipe, mixed):
    reference = mixed()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert_same(mixed(), reference)


def test_tiny_vae(pipe, picture):
    """Its encoder has no distribution to take the mode of."""
    torch.manual_seed(0)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    image = images(picture)[1]
    result = pipe("blue", image, "edit", latents=noise(1), num_inference_steps=STEPS, output_type="pt").images
    assert_same(result, run_stock(pipe, "edit", "blue", image, noise(1)))


def test_a_vae_of_another_precision(pipe, mixed):
    reference = mixed()
    pipe.vae.to(torch.float64)
    result = mixed()
    assert_same(result.float(), reference)


def test_safety_checker(pipe, mixed):
    """A flagged image is left as the checker returns it."""

    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images, clip_input):
            images = images.clone()
            images[1] = 0.25
            return images, [False, True, False, False]

    class Extractor:
        def __call__(self, pictures, return_tensors):
            assert len(pictures) == 4
            return type("Batch", (dict,), {"to": lambda self, device: self, "pixel_values": torch.zeros(4, 3, 2, 2)})()

    reference = mixed()
    pipe.safety_checker, pipe.feature_extractor = Checker(), Extractor()
    result = mixed()
    assert_same(result[[0, 2, 3]], reference[[0, 2, 3]])
    assert (result[1] == 0.25).all()


# ---------------------------------------------------------------------------------------------------------- errors


def test_training_mode_changes_nothing_here(pipe, mixed):
    """The tiny model has no dropout; the routing table is computed anew at each call."""
    reference = mixed()
    pipe.unet.train()
    assert_same(mixed(), reference)
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


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
