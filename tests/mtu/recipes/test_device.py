"""Training the icon models on another device than the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

import mtu
from mtu.data.icons.examples import TASK_NAMES
from mtu.data.icons.task_dataset import IconTask
from mtu.recipes.icons import denoiser
from mtu.recipes.icons.__main__ import main, make_base_model
from mtu.recipes.icons.base_model import BaseModelConfig, build_untrained_pipeline, train_base_model
from mtu.recipes.icons.demo import ICON_TASKS, run_demo
from mtu.recipes.icons.denoiser import DenoiserConfig, DenoiserObjective, LatentDataset
from mtu.recipes.icons.device import autocast_dtype, usable_device
from mtu.recipes.icons.prompts import PromptConfig, icon_pictures
from mtu.recipes.icons.score import ScoreConfig
from mtu.recipes.icons.text_encoder import TextEncoderConfig
from mtu.recipes.icons.vae import VAEConfig, VAEObjective
from mtu.training import BatchPart, TrainerConfig
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective

from .small_demo import SMALL_DEMO

MINIATURE = BaseModelConfig(
    vae=VAEConfig(block_out_channels=(8, 8, 16), norm_num_groups=4, batch_size=2),
    text_encoder=TextEncoderConfig(width=16, num_layers=1, num_heads=2),
    denoiser=DenoiserConfig(
        block_out_channels=(8, 8, 16), heads=2, norm_num_groups=4, batch_size=4, prompts=PromptConfig(scenes=20)
    ),
    vae_training=TrainerConfig(steps=2, log_every=1),
    denoiser_training=TrainerConfig(steps=2, log_every=1, ema_decay=0.5),
)
SCORE = ScoreConfig(
    num_samples=4,
    validation_samples_per_guidance_scale=2,
    candidate_guidance_scales=(1.0,),
    inference_steps=2,
    num_retrieval_candidates=5,
    reconstructions_per_kind=1,
)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "icon_pictures", lambda split: icon_pictures(split)[::1000])


@pytest.mark.parametrize("command", ["base", "demo"])
@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_sentence_and_nothing_is_written(
    command: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, "--output", str(tmp_path / "out"), "--device", device])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"error: The device '{device}' cannot be used; expected cpu, or an accelerator" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_is_where_the_model_is() -> None:
    """On the meta device, whose tensors do not mix with the CPU's. Latents are drawn, and kept, on the CPU."""
    pipeline = build_untrained_pipeline(MINIATURE)
    latents = LatentDataset(pipeline.vae, MINIATURE.denoiser.prompts, 0)
    upcycled = mtu.upcycle(pipeline, ICON_TASKS, num_experts=2)
    config = MultiTaskConfig(batch_size=4, resolution=64, latent_cache="memory", text_cache="memory")
    multitask = MultiTaskObjective(upcycled, {task: IconTask(task, 2) for task in TASK_NAMES}, config)
    multitask.prepare(Accelerator(cpu=True))
    unet, vae, encoder = (module.to("meta") for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    with pytest.raises(RuntimeError, match="device"):
        vae.encode(torch.zeros(1, 3, 64, 64))
    for objective in (
        VAEObjective(vae, MINIATURE.vae, 0),
        DenoiserObjective(unet, encoder, pipeline.tokenizer, latents, MINIATURE.denoiser, 0),
        multitask.to("meta"),
    ):
        batch = send_to_device(objective.load_batch(BatchPart(0, 0, 1)), torch.device("meta"))
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(objective(batch).loss, trained, allow_unused=True)
        assert {gradient.device.type for gradient in gradients if gradient is not None} == {"meta"}


def test_compute_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bfloat16 where it is computed by hardware (Turing emulates it), float32 elsewhere."""
    assert autocast_dtype(torch.device("cpu")) == torch.bfloat16
    assert autocast_dtype(torch.device("mps")) is None
    for has_bfloat16, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        assert autocast_dtype(torch.device("cuda")) == dtype


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_miniature_run_on_a_gpu_goes_on_elsewhere(first: str, second: str, tmp_path: Path) -> None:
    make_base_model(tmp_path, MINIATURE.with_training_limits(minutes=1e-4), SCORE, command="c", device=first)
    make_base_model(
        tmp_path, MINIATURE.with_training_limits(minutes=10), SCORE, command="c", resume=True, device=second
    )
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["training"]["denoiser_steps"] == 2
    assert metrics["training"]["machine"] != ""


@pytest.mark.gpu
def test_the_demo_on_a_gpu(tmp_path: Path) -> None:
    config = replace(SMALL_DEMO, batch_per_task=2)
    pipeline, _ = train_base_model(tmp_path / "base", MINIATURE, device="cuda")
    pipeline.save_pretrained(tmp_path / "model")
    run_demo(tmp_path / "model", tmp_path / "out", config, "cuda")
    assert usable_device("cuda").type == "cuda"
    assert torch.cuda.get_device_name() in (tmp_path / "out" / "metrics.csv").read_text()
