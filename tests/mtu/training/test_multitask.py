"""The multi-task objective: what is encoded, what a step's loss is, and which parameters it moves."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import mtu
from mtu.data.icons.examples import TASK_NAMES, IconDataset
from mtu.recipes.icons.base_model import BaseModelConfig, build_untrained_pipeline
from mtu.recipes.icons.denoiser import DenoiserConfig
from mtu.recipes.icons.text_encoder import TextEncoderConfig
from mtu.recipes.icons.vae import VAEConfig
from mtu.tasks import EDIT, SUPER_RESOLUTION, TEXT_TO_IMAGE
from mtu.training import FitConfig, fit
from mtu.training.multitask.encoded_examples import MultiTaskConfig, MultiTaskLoss, encode_examples

MINIATURE = BaseModelConfig(
    vae=VAEConfig(block_out_channels=(8, 8, 16), norm_num_groups=4),
    text_encoder=TextEncoderConfig(width=16, num_layers=1, num_heads=2),
    denoiser=DenoiserConfig(block_out_channels=(8, 8, 16), heads=2, norm_num_groups=4),
)


@pytest.fixture(scope="module")
def pipeline() -> mtu.MTUPipeline:
    torch.manual_seed(0)
    stock = build_untrained_pipeline(MINIATURE)
    stock.vae.register_to_config(scaling_factor=0.5)  # at 1 scaled latents would look like others
    return mtu.upcycle(stock)


@pytest.fixture(scope="module")
def data(pipeline):
    icons = IconDataset("train")
    return encode_examples(pipeline, {task: icons.get_examples(task, range(6)) for task in TASK_NAMES})


def test_latents_are_those_of_the_pipeline(pipeline, data) -> None:
    example = IconDataset("train").get_example("edit", 2)
    assert example.condition_image is not None
    with torch.no_grad():
        target = pipeline.vae.encode(example.target_image[None]).latent_dist.mode() * pipeline.vae.config.scaling_factor
        condition = pipeline.vae.encode(example.condition_image[None]).latent_dist.mode()
        prompt = pipeline.encode_prompt(example.prompt, "cpu", 1, False)[0]
    edit = data.by_task["edit"]
    # The same products in another batch size: float32 rounding of some 30 layers.
    torch.testing.assert_close(edit.target_latents[2:3], target, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edit.condition_latents[2:3], condition, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.prompt_embeds[edit.prompt_indices[2]][None], prompt, rtol=1e-4, atol=1e-5)
    assert data.by_task["text-to-image"].condition_latents is None
    assert data.by_task["super-resolution"].prompt_indices.eq(0).all()
    assert (
        data.by_task["super-resolution"].condition_latents.shape
        == data.by_task["super-resolution"].target_latents.shape
    )


def test_loss_is_the_sum_of_the_tasks_means(pipeline, data) -> None:
    pipeline.unet.eval()
    config = MultiTaskConfig(batch_per_task=3, conditioning_dropout_prob=0.0)
    with torch.no_grad():
        noise_only = MultiTaskLoss(pipeline, data, config)(0)
        again = MultiTaskLoss(pipeline, data, config)(0)
        other = MultiTaskLoss(pipeline, data, config)(1)
    assert torch.equal(noise_only, again)
    assert not torch.equal(noise_only, other)
    # With the prediction held at zero each task's mean is E‖ε‖² = 1, within √(2 / (3·1024)) = 2.6%; 6 σ of the sum.
    silent = MultiTaskLoss(pipeline, data, config)
    silent.unet = _Silent(pipeline.unet)
    assert float(silent(0)) == pytest.approx(len(TASK_NAMES), abs=6 * 0.026 * len(TASK_NAMES) ** 0.5)


def test_min_snr_weights_lower_the_easy_timesteps(pipeline, data) -> None:
    plain = MultiTaskLoss(pipeline, data, MultiTaskConfig())
    weighed = MultiTaskLoss(pipeline, data, MultiTaskConfig(snr_gamma=5.0))
    assert plain.timestep_weights.eq(1).all()
    assert weighed.timestep_weights[0] < 0.01 * weighed.timestep_weights[-1]
    noisy = MultiTaskLoss(pipeline, data, MultiTaskConfig(snr_gamma=5.0, max_inverse_snr=10.0))
    assert (
        noisy.timestep_weights[-1] / noisy.timestep_weights[500]
        > weighed.timestep_weights[-1] / weighed.timestep_weights[500]
    )
    for loss in (weighed, noisy):
        assert float(loss.timestep_weights.mean()) == pytest.approx(1, rel=1e-5)  # 1,000 float32 terms


def test_v_prediction_weighs_the_noise_error_alike(data) -> None:
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    twin.scheduler.register_to_config(prediction_type="v_prediction")
    loss = MultiTaskLoss(twin, data, MultiTaskConfig())
    generator = torch.Generator().manual_seed(0)
    target, noise, guess = (torch.randn(4, 4, 2, 2, generator=generator) for _ in range(3))
    steps = torch.tensor([10, 300, 700, 999])
    alpha = loss.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    # What a model that guesses the noise says of the picture, and of v.
    implied = (loss.scheduler.add_noise(target, noise, steps) - (1 - alpha).sqrt() * guess) / alpha.sqrt()
    error = loss.scheduler.get_velocity(implied, guess, steps) - loss.scheduler.get_velocity(target, noise, steps)
    weighed = error.square().mean((1, 2, 3)) * loss.timestep_weights[steps]
    torch.testing.assert_close(weighed, (guess - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_a_schedule_that_ends_in_noise_alone(data, scheduler) -> None:
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    zero = {"rescale_betas_zero_snr": True}
    twin.scheduler = scheduler.from_config(twin.scheduler.config, **zero, prediction_type="v_prediction")
    for config in (
        MultiTaskConfig(),
        MultiTaskConfig(snr_gamma=5.0),
        MultiTaskConfig(snr_gamma=5.0, max_inverse_snr=2.0),
    ):
        loss = MultiTaskLoss(twin, data, config)
        signal = loss.scheduler.alphas_cumprod
        assert signal[-1] == 0
        # min(SNR, γ) / (SNR + 1) + ᾱ min(1 / SNR, κ), and at the end the limits of the weights of the noise, uncapped.
        ratio = signal[:-1].double() / (1 - signal[:-1].double())
        gamma = float("inf") if config.snr_gamma is None else config.snr_gamma
        expected = ratio.clamp_max(gamma) / (ratio + 1) + signal[:-1] * (1 / ratio).clamp_max(config.max_inverse_snr)
        expected = torch.cat([expected, torch.tensor([1.0 + config.max_inverse_snr])])
        factor = loss.timestep_weights[-1] / expected[-1]
        torch.testing.assert_close(loss.timestep_weights.double(), expected * factor, rtol=1e-4, atol=1e-9)
        assert (loss.timestep_weights > 0).all()
    assert loss(0).isfinite()
    twin.scheduler = scheduler.from_config(twin.scheduler.config, **zero, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"^Training that predicts 'epsilon' needs a signal at every timestep, but"):
        MultiTaskLoss(twin, data, MultiTaskConfig())


def test_the_last_timestep_is_drawn_where_a_sum_rounds_up(pipeline, data, monkeypatch) -> None:
    """The largest float32 below 1, plus 15, is 16: every few hundred thousand draws."""
    seen = []
    loss = MultiTaskLoss(pipeline, data, MultiTaskConfig(batch_per_task=16))
    real = loss.scheduler.add_noise
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    monkeypatch.setattr(loss.scheduler, "add_noise", lambda x, n, t: seen.append(t.max()) or real(x, n, t))
    assert loss(0).isfinite()
    assert seen == [999]


@pytest.mark.slow
def test_tasks_without_images_and_with_other_conditions(data) -> None:
    depth = mtu.TaskSpec("depth", condition_channels=5, guidance="text")
    for names, tasks in (
        (["text-to-image"], [TEXT_TO_IMAGE]),
        (["text-to-image"], [TEXT_TO_IMAGE, EDIT]),
        (["super-resolution"], [SUPER_RESOLUTION]),
        (["text-to-image", "depth", "super-resolution"], [SUPER_RESOLUTION, depth, TEXT_TO_IMAGE]),
    ):
        twin = mtu.upcycle(build_untrained_pipeline(MINIATURE), tasks)
        wide = data.by_task["edit"]._replace(condition_latents=torch.randn(6, 5, 16, 16))
        own = {name: wide if name == "depth" else data.by_task[name] for name in names}
        # More of each task than there are examples.
        loss = MultiTaskLoss(twin, data._replace(by_task=own), MultiTaskConfig(batch_per_task=7))(0)
        loss.backward()
        assert loss.isfinite()
        used = [twin.unet.task_index(name) for name in names]
        assert [bool(g.any()) for g in twin.unet.conv_in.bias.grad] == [i in used for i in range(len(tasks))]


@torch.no_grad()
def test_a_model_in_bfloat16_has_a_loss(data) -> None:
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    expected = MultiTaskLoss(twin, data, MultiTaskConfig(batch_per_task=2))(0)
    twin.unet.to(torch.bfloat16)
    # Some 40 layers, each of which may round by 2⁻⁸.
    assert float(MultiTaskLoss(twin, data, MultiTaskConfig(batch_per_task=2))(0)) == pytest.approx(
        float(expected), rel=0.1
    )


def test_data_that_cannot_be_trained_on(pipeline, data) -> None:
    icons = IconDataset("train")

    def loss(**tasks):
        return MultiTaskLoss(pipeline, data._replace(by_task=tasks), MultiTaskConfig())

    with pytest.raises(ValueError, match=r"^Task 'edit' has no examples: give it some, or leave it out\.$"):
        encode_examples(pipeline, {"edit": []})
    with pytest.raises(ValueError, match=r"^Task 'edit' has no examples: give it some, or leave it out\.$"):
        loss(edit=type(data.by_task["edit"])(*(tensor[:0] for tensor in data.by_task["edit"])))
    with pytest.raises(ValueError, match="nothing to train on"):
        loss()
    with pytest.raises(ValueError, match="Unknown task 'sing'"):
        loss(sing=data.by_task["edit"])
    with pytest.raises(ValueError, match="'edit' reads 4 condition channels, but its examples have 0"):
        loss(edit=data.by_task["text-to-image"])
    small = data.by_task["edit"]._replace(target_latents=data.by_task["edit"].target_latents[..., :8, :8])
    with pytest.raises(ValueError, match=r"of one shape .* \(4, 16, 16\) for 'remove' and \(4, 8, 8\) for 'edit'\.$"):
        loss(remove=data.by_task["remove"], edit=small)
    examples = icons.get_examples("edit", range(2))
    examples[1] = examples[1]._replace(target_image=examples[1].target_image[:, :32, :32])
    with pytest.raises(ValueError, match=r"must be of one size, but got \(3, 64, 64\) and \(3, 32, 32\)\.$"):
        encode_examples(pipeline, {"edit": examples})
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE), [mtu.TaskSpec("edit", condition_channels=5)])
    with pytest.raises(ValueError, match="'edit' reads 5 condition channels, but an image has 4 latent channels"):
        encode_examples(twin, {"edit": icons.get_examples("edit", range(1))})
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    with torch.no_grad():
        twin.vae.encoder.conv_in.bias.fill_(float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"torch\.float32, gives latents that are not finite .* from number 0 on"
    ):
        encode_examples(twin, {"text-to-image": icons.get_examples("text-to-image", range(1))})


def test_dropout_follows_the_guidance(pipeline, data) -> None:
    class Recorder(_Silent):
        def __call__(self, sample, timesteps, prompt, task_ids):
            self.seen = sample, prompt, task_ids
            return super().__call__(sample, timesteps, prompt, task_ids)

    loss = MultiTaskLoss(pipeline, data, MultiTaskConfig(batch_per_task=400, conditioning_dropout_prob=0.25))
    loss.unet = Recorder(pipeline.unet)
    loss(0)
    sample, prompt, task_ids = loss.unet.seen
    empty_prompt = (prompt == data.prompt_embeds[0]).flatten(1).all(1)
    empty_image = sample[:, 4:].flatten(1).eq(0).all(1)
    names = [spec.name for spec in pipeline.unet.tasks]
    parts = {
        name: (float(empty_prompt[task_ids == i].float().mean()), float(empty_image[task_ids == i].float().mean()))
        for i, name in enumerate(names)
    }
    # 400 draws: 5 standard deviations are 0.125.
    assert parts["text-to-image"] == (pytest.approx(0.25, abs=0.125), 1.0)
    assert parts["super-resolution"] == (1.0, 0.0)
    for name in ("edit", "remove"):
        assert parts[name] == (pytest.approx(0.5, abs=0.125), pytest.approx(0.25, abs=0.125))
    dual = torch.isin(task_ids, torch.tensor([names.index("edit"), names.index("remove")]))
    assert not (empty_image & ~empty_prompt & dual).any()


def test_training_moves_the_upcycled_parts_alone(data) -> None:
    torch.manual_seed(0)
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    unet = twin.unet.train()
    trained = {name for name, _ in unet.named_trainable_parameters()}
    old = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    loss = MultiTaskLoss(twin, data, MultiTaskConfig(batch_per_task=2))
    config = FitConfig(steps=3, learning_rate=1e-3, schedule="constant", weight_decay=0.0, log_every=1)
    history = fit(loss, {"unet": unet}, unet.trainable_parameters(), config)
    moved = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, old[name])}
    assert moved == trained
    assert len(history) == 3


@pytest.mark.slow
def test_weight_decay_leaves_rows_of_absent_tasks_alone(data) -> None:
    torch.manual_seed(0)
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    unet = twin.unet.train()
    absent = unet.task_index("remove")
    rows = {name: p[absent].detach().clone() for name, p in unet.named_trainable_parameters() if _is_packed(name)}
    kept = type(data)({name: latents for name, latents in data.by_task.items() if name != "remove"}, data.prompt_embeds)
    loss = MultiTaskLoss(twin, kept, MultiTaskConfig(batch_per_task=2))
    config = FitConfig(steps=3, learning_rate=1e-2, schedule="constant", weight_decay=0.1, log_every=1)
    fit(loss, {"unet": unet}, unet.trainable_parameters(), config)
    for name, parameter in unet.named_trainable_parameters():
        if _is_packed(name):
            assert torch.equal(parameter[absent], rows[name]), name


@pytest.mark.slow
def test_another_loss_does_not_continue_a_checkpoint(data, tmp_path) -> None:
    twin = mtu.upcycle(build_untrained_pipeline(MINIATURE), ["text-to-image", "edit"])
    own = data._replace(by_task={name: data.by_task[name] for name in ("text-to-image", "edit")})
    fewer = own._replace(by_task={"edit": own.by_task["edit"]})

    def train(data=own, steps=1, resume=True, **changes) -> None:
        loss = MultiTaskLoss(twin, data, replace(MultiTaskConfig(batch_per_task=2), **changes))
        config = FitConfig(steps=steps, log_every=1, schedule="constant")
        fit(loss, {"unet": twin.unet}, twin.unet.trainable_parameters(), config, directory=tmp_path, resume=resume)

    train(resume=False)
    train(loss_threads=2, autocast_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"was made with another batch_per_task, conditioning_dropout_prob, seed\.$"):
        train(batch_per_task=4, conditioning_dropout_prob=0.1, seed=3)
    for other in (fewer, own._replace(by_task=dict(reversed(own.by_task.items())))):
        with pytest.raises(ValueError, match=r"was made with another examples\.$"):
            train(other)


def test_bad_arguments(pipeline, data) -> None:
    icons = IconDataset("train")
    with pytest.raises(ValueError, match="Unknown task 'sing'"):
        encode_examples(pipeline, {"sing": icons.get_examples("edit", range(1))})
    with pytest.raises(ValueError, match="does not fit task 'edit'"):
        encode_examples(pipeline, {"edit": icons.get_examples("text-to-image", range(1))})
    with pytest.raises(ValueError, match="batch_per_task"):
        MultiTaskConfig(batch_per_task=0)
    with pytest.raises(ValueError, match="dropout"):
        MultiTaskConfig(conditioning_dropout_prob=0.7)
    other = mtu.upcycle(build_untrained_pipeline(MINIATURE))
    other.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="'sample'"):
        MultiTaskLoss(other, data, MultiTaskConfig())


def _is_packed(name: str) -> bool:
    return ".norm3." in name or name.startswith(("conv_in.", "task_embedding."))


class _Silent:
    """A stand-in UNet that predicts no noise at all, with the tasks of a real one."""

    def __init__(self, unet: mtu.MTUUNet2DConditionModel) -> None:
        self.tasks, self.device = unet.tasks, unet.device
        self.task_ids, self.task_index, self.dtype = unet.task_ids, unet.task_index, unet.dtype

    def __call__(self, sample, timesteps, prompt, task_ids):
        return type("Output", (), {"sample": torch.zeros_like(sample[:, :4])})
