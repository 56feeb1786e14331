"""The law of the multi-task pipeline: each image is that of the stock pipeline on the exported task."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import mtu

from .mixed_batches import (
    NEGATIVES,
    PROMPTS,
    STEPS,
    TASKS,
    TOLERANCE,
    assert_same,
    at_output_size,
    images,
    noise,
    run_stock,
    seeds,
)

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


@pytest.mark.slow
def test_law_for_stochastic_solvers(pipe, mixed, picture):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    together = mixed(generator=seeds())
    for i in (0, 1):
        image = images(picture)[i]
        stock = run_stock(pipe, TASKS[i], PROMPTS[i], image, noise()[i : i + 1], generator=seeds()[i])
        assert_same(together[i : i + 1], stock)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "index", [pytest.param([2, 0, 3, 1], id="another_order"), pytest.param([1, 1, 0, 1, 2, 0, 3], id="repeated_tasks")]
)
def test_order_of_samples_is_that_of_the_call(mixed, picture, index):
    result = mixed(
        prompt=[PROMPTS[i] for i in index],
        image=[images(picture)[i] for i in index],
        task=[TASKS[i] for i in index],
        latents=noise()[index],
    )
    assert_same(result, mixed()[index])
