"""The weight of each timestep, and the noise schedule of training and sampling."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr

import mtu
from mtu.training import BatchPart

from .tiny_pipelines import loss_of, make_objective, noise_data, sd_pipeline


@pytest.fixture(scope="module")
def pipe() -> mtu.MTUPipeline:
    return sd_pipeline()


def unprepared(pipe, **settings):
    return make_objective(pipe, noise_data(pipe, ["edit"]), prepare=False, **settings)


def test_min_snr_weights_lower_the_easy_timesteps(pipe) -> None:
    plain, weighed, noisy = (
        unprepared(pipe, **settings).timestep_weights
        for settings in ({}, {"snr_gamma": 5.0}, {"snr_gamma": 5.0, "max_inverse_snr": 10.0})
    )
    assert plain.eq(1).all()
    assert weighed[0] < 0.01 * weighed[-1]
    assert noisy[-1] / noisy[500] > weighed[-1] / weighed[500]
    assert float(noisy.mean()) == pytest.approx(1, rel=1e-5)  # 1,000 float32 terms


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_are_those_of_diffusers(pipe, prediction_type: str, gamma: float | None) -> None:
    objective = unprepared(pipe, snr_gamma=gamma, prediction_type=prediction_type)
    expected = torch.ones(1000)
    if gamma is not None:
        snr = compute_snr(DDPMScheduler.from_config(pipe.scheduler.config), torch.arange(1000))
        expected = snr.clamp_max(gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(objective.timestep_weights, expected, rtol=1e-4, atol=0)


def test_both_predictions_learn_the_same_with_min_snr(pipe) -> None:
    weights, objective = (
        unprepared(pipe, snr_gamma=5.0, max_inverse_snr=2.0, prediction_type=kind)
        for kind in ("epsilon", "v_prediction")
    )
    scheduler, generator = objective.noise_scheduler, torch.Generator().manual_seed(0)
    target, noise, guess = (torch.randn(4, 4, 2, 2, generator=generator) for _ in range(3))
    steps = torch.tensor([10, 300, 700, 999])
    alpha = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    # What a model that guesses the noise says of the picture, and of v.
    implied = (scheduler.add_noise(target, noise, steps) - (1 - alpha).sqrt() * guess) / alpha.sqrt()
    error = scheduler.get_velocity(implied, guess, steps) - scheduler.get_velocity(target, noise, steps)
    weighed = error.square().mean((1, 2, 3)) * objective.timestep_weights[steps]
    expected = (guess - noise).square().mean((1, 2, 3)) * weights.timestep_weights[steps]
    ratio = weighed / expected
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize(("gamma", "kappa"), [(None, 0.0), (5.0, 0.0), (5.0, 10.0), (None, 10.0)])
def test_a_schedule_that_ends_in_noise_alone(pipe, by_config: bool, gamma: float | None, kappa: float) -> None:
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    twin = sd_pipeline()
    if not by_config:
        twin.scheduler = DDIMScheduler.from_config(twin.scheduler.config, **zero)
    objective = unprepared(twin, snr_gamma=gamma, max_inverse_snr=kappa, **(zero if by_config else {}))
    signal = objective.noise_scheduler.alphas_cumprod
    assert signal[-1] == 0
    # min(SNR, γ) / (SNR + 1) + ᾱ min(1 / SNR, κ), and at the end 1.
    ratio = signal[:-1].double() / (1 - signal[:-1].double())
    expected = torch.ones_like(ratio) if gamma is None else ratio.clamp_max(gamma) / (ratio + 1)
    expected = torch.cat([expected + signal[:-1] * (1 / ratio).clamp_max(kappa), torch.ones(1)])
    weights = objective.timestep_weights.double()
    torch.testing.assert_close(weights, expected * (weights[-1] / expected[-1]), rtol=1e-4, atol=1e-9)
    assert (weights > 0).all()
    # The end counts like a timestep of plain velocity prediction, and is no outlier.
    assert 0.5 < weights[-1] <= 1.5 * weights[:-1].max()


@torch.no_grad()
def test_the_loss_is_finite_on_a_schedule_that_ends_in_noise_alone(pipe) -> None:
    objective = make_objective(
        pipe,
        noise_data(pipe, ["edit"]),
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        snr_gamma=5.0,
        batch_size=2,
    )
    batch = objective.load_batch(BatchPart(0, 0, 1))
    assert objective(batch._replace(timesteps=torch.tensor([999, 999]))).loss.isfinite()
    assert loss_of(objective).loss.isfinite()


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_noise_is_not_predicted_from_noise_alone(scheduler) -> None:
    twin = sd_pipeline()
    with pytest.raises(ValueError, match=r"^Training that predicts 'epsilon' needs a signal at every timestep, but"):
        unprepared(twin, rescale_betas_zero_snr=True)
    twin.scheduler = scheduler.from_config(twin.scheduler.config, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"^Training that predicts 'epsilon' needs a signal at every timestep, but"):
        unprepared(twin)
    twin.scheduler = scheduler.from_config(twin.scheduler.config, prediction_type="sample")
    with pytest.raises(ValueError, match=r"^Training predicts 'epsilon' or 'v_prediction', but got 'sample'\.$"):
        unprepared(twin)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [(PNDMScheduler, DDIMScheduler), (EulerDiscreteScheduler, EulerDiscreteScheduler)],
)
def test_the_pipeline_samples_what_was_trained(scheduler, expected) -> None:
    pipe = sd_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    before = pipe.scheduler
    unprepared(pipe).set_pipeline_scheduler_()
    assert pipe.scheduler is before  # nothing differs
    make_objective(pipe, noise_data(pipe, ["edit"]), prediction_type="v_prediction")
    assert type(pipe.scheduler) is scheduler
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    objective = unprepared(pipe, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    objective.set_pipeline_scheduler_()
    chosen = pipe.scheduler
    objective.set_pipeline_scheduler_()
    assert pipe.scheduler is chosen
    assert type(pipe.scheduler) is expected
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0] == 999
    # Another training of this pipeline goes on with the same schedule.
    assert unprepared(pipe).settings["noise_schedule"] == objective.settings["noise_schedule"]
    images = pipe("a bell", height=16, width=16, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
