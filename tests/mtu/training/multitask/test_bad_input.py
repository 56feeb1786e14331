"""Data, settings and models that cannot be trained: one sentence each, before anything changes."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import mtu
from mtu.data.task_dataset import ExampleImages
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective

from ...pipelines.conftest import stock_pipeline
from .tiny_pipelines import NoiseImages, config, loss_of, make_objective, noise_data, sd_pipeline, xl_pipeline


@pytest.fixture(scope="module")
def pipe() -> mtu.MTUPipeline:
    return sd_pipeline()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be an integer ≥ 1, but got 0\."),
        ({"batch_size": 2.0}, r"batch_size must be an integer ≥ 1, but got 2\.0\."),
        ({"seed": -1}, r"seed must be an integer ≥ 0, but got -1\."),
        ({"batch_size": 4, "loss_threads": 3}, r"loss_threads must divide batch_size = 4, but got 3\."),
        ({"resolution": 0}, r"resolution must be a positive integer or a pair of them, but got 0\."),
        ({"resolution": (8, 8, 8)}, r"resolution must be a positive integer or a pair of them, but got \(8, 8, 8\)\."),
        ({"shares": {"edit": 0}}, r"shares must be positive numbers, but got 0 for task 'edit'\."),
        ({"loss_weights": {"edit": -1}}, r"loss_weights must be positive numbers, but got -1 for task 'edit'\."),
        ({"conditioning_dropout_prob": 0.4}, r"conditioning_dropout_prob must lie in \[0, 1/3\], .* but got 0\.4\."),
        ({"snr_gamma": 0}, r"snr_gamma must be a positive number or None, but got 0\."),
        ({"max_inverse_snr": -1.0}, r"max_inverse_snr must be a number ≥ 0, but got -1\.0\."),
        ({"precision": "fp16"}, r"precision must be 'no' or 'bf16', but got 'fp16': .*\."),
        ({"prediction_type": "sample"}, r"prediction_type must be one of .* but got 'sample'\."),
        ({"latent_sampling": "mean"}, r"latent_sampling must be one of .* but got 'mean'\."),
        ({"latent_cache": "ram"}, r"latent_cache must be one of .* but got 'ram'\."),
        ({"text_cache": None}, r"text_cache must be one of .* but got None\."),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MultiTaskConfig(**settings)


def test_every_setting_is_described() -> None:
    for name, field in MultiTaskConfig.__dataclass_fields__.items():
        text = field.metadata["help"]
        assert text.endswith("."), name
        assert "\n" not in text, name


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({}, {}, r"There is nothing to train on: expected a data set of at least one task\."),
        ({"sing": 3}, {}, r"Unknown task 'sing': this model has \['text-to-image', .*\]\."),
        ({"edit": 0}, {}, r"Task 'edit' has no examples: give it some, or leave it out\."),
        ({"edit": 3}, {"shares": {"remove": 2}}, r"shares names the task 'remove', but there are data for \['edit'\]"),
        ({"edit": 3}, {"loss_weights": {"sing": 2}}, r"loss_weights names the task 'sing', but there are data for"),
        ({"edit": 3}, {"resolution": (16, 17)}, r"resolution must be a multiple of 2 pixels, but got \(16, 17\)\."),
        ({"edit": 3}, {"latent_cache": "disk"}, r"latent_cache='disk' needs a cache_directory: name a folder, or"),
        ({"edit": 3}, {"text_cache": "disk"}, r"text_cache='disk' needs a cache_directory: name a folder, or"),
    ],
)
def test_data_and_settings_that_contradict_each_other(pipe, data: dict, settings: dict, message: str) -> None:
    before = [parameter.clone() for parameter in pipe.unet.parameters()]
    datasets = {name: NoiseImages(pipe.unet.tasks[1], rows=rows) for name, rows in data.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        make_objective(pipe, datasets, **settings)
    assert all(map(torch.equal, before, pipe.unet.parameters()))


def test_pipelines_that_cannot_be_trained() -> None:
    settings = config(latent_cache="none", text_cache="none", resolution=16)
    stock = stock_pipeline()
    with pytest.raises(
        ValueError, match=r"^This pipeline holds a UNet2DConditionModel, but an upcycled UNet is needed"
    ):
        MultiTaskObjective(stock, {}, settings)
    wide = mtu.upcycle(stock_pipeline(), [mtu.TaskSpec("edit", condition_channels=5)])
    with pytest.raises(ValueError, match=r"'edit' reads 5 condition channels, but an image has 4 latent channels\.$"):
        make_objective(wide, noise_data(wide, ["edit"]))
    pipe = xl_pipeline()
    parts = {
        name: part for name, part in pipe.components.items() if name in stock.components and name != "image_encoder"
    }
    with pytest.raises(
        ValueError, match=r"does not give its UNet the inputs that it needs \(addition_embed_type='text_"
    ):
        make_objective(StableDiffusionPipeline(**{**parts, "safety_checker": None}, requires_safety_checker=False), {})
    cast = sd_pipeline()
    cast.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^MultiTaskObjective needs weights in the dtype that layers compute in"):
        make_objective(cast)
    other = sd_pipeline()
    other.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match=r"^This VAE normalizes its latents by latents_mean"):
        make_objective(other)
    offloaded = sd_pipeline()
    offloaded.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"^A pipeline that is not offloaded is needed, but this one is"):
        make_objective(offloaded)


def test_a_batch_that_cannot_be_split(pipe) -> None:
    objective = make_objective(pipe, prepare=False)
    for count in (1, 2, 4, 8):
        objective.check_part_count(count)
    with pytest.raises(
        ValueError, match=r"^batch_size = 8 must be a multiple of 3, because .* split it into 3 parts\.$"
    ):
        objective.check_part_count(3)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_latents_that_are_not_finite_name_the_row(cache: str) -> None:
    pipe = sd_pipeline()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias.fill_(float("inf"))

    def encode() -> None:
        loss_of(make_objective(pipe, noise_data(pipe, ["edit"], variants=2), latent_cache=cache))

    message = (
        r"^The VAE, in torch\.float32, gives latents .* for the target image of edit: noise, line \d \(variant \d\)\.$"
    )
    with pytest.raises(FloatingPointError, match=message):
        encode()


def test_an_image_that_cannot_be_read_stops_the_preparation(pipe) -> None:
    class Broken(NoiseImages):
        def load_images(self, row: int, variant: int) -> ExampleImages:
            if row == 3:
                raise ValueError(f"{self.describe_row(row)}: target.png is truncated.")
            return super().load_images(row, variant)

    broken = {"edit": Broken(pipe.unet.tasks[1])}
    for threads in (1, 2):
        with pytest.raises(ValueError, match=r"^noise, line 4: target\.png is truncated\.$"):
            make_objective(pipe, broken, loss_threads=threads)
    wrong = {"edit": NoiseImages(pipe.unet.tasks[0])}
    with pytest.raises(ValueError, match=r"^Task 'edit' takes a condition image, but edit: noise, line 1 has none\.$"):
        make_objective(pipe, wrong)


def test_a_cache_folder_that_is_a_file(pipe, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises((ValueError, OSError)):
        make_objective(pipe, latent_cache="disk", cache_directory=tmp_path / "cache")
