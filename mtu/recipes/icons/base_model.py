"""The training of the icon base model from scratch: first the autoencoder, then UNet and text encoder together."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from mtu.recipes.icons.denoiser import NOISE_SCHEDULE, DenoiserConfig, DenoiserObjective, LatentDataset, build_unet
from mtu.recipes.icons.device import usable_device
from mtu.recipes.icons.text_encoder import TextEncoderConfig, build_text_encoder, build_tokenizer
from mtu.recipes.icons.vae import VAEConfig, VAEObjective, build_vae, measure_and_set_scaling_factor
from mtu.storage import write_text
from mtu.training import LogEntry, Trainer, TrainerConfig
from mtu.training.checkpoints import check_no_checkpoints, checkpoint_steps, delete_checkpoints
from mtu.training.multitask.parallel_loss import intra_op_threads_context

# The fraction of a limited training time that the autoencoder gets.
VAE_TIME_FRACTION = 0.25


@dataclass(frozen=True)
class BaseModelConfig:
    """All settings that determine the base model.

    Attributes:
        vae: size and loss of the autoencoder.
        text_encoder: size of the text encoder.
        denoiser: size and loss of the UNet.
        vae_training: the training of the autoencoder.
        denoiser_training: the training of UNet and text encoder.
        seed: seed of weights, data and noise.
    """

    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    vae_training: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            steps=10000, learning_rate=1e-3, warmup_steps=200, schedule="cosine", betas=(0.9, 0.99)
        )
    )
    denoiser_training: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(
            steps=12000,
            learning_rate=8e-4,
            warmup_steps=200,
            schedule="cosine",
            betas=(0.9, 0.99),
            ema_decay=0.998,
            checkpoint_every=250,
        )
    )
    seed: int = 0

    def with_training_limits(self, minutes: float | None = None, steps: int | None = None) -> "BaseModelConfig":
        """Return this configuration with other limits of training.

        Args:
            minutes: wall-clock limit of both trainings together; None: the limit stays.
            steps: limit of the steps of each training; None: the limit stays.
        """
        vae, denoiser = self.vae_training, self.denoiser_training
        if minutes is not None:
            vae = replace(vae, max_minutes=minutes * VAE_TIME_FRACTION)
            denoiser = replace(denoiser, max_minutes=minutes * (1 - VAE_TIME_FRACTION))
        if steps is not None:
            vae, denoiser = replace(vae, steps=steps), replace(denoiser, steps=steps)
        return replace(self, vae_training=vae, denoiser_training=denoiser)


def build_untrained_pipeline(config: BaseModelConfig) -> StableDiffusionPipeline:
    """Build the base model with random weights, which the seed of the configuration determines."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config.text_encoder.max_length)
    schedule = {key: value for key, value in NOISE_SCHEDULE.items() if key != "clip_sample"}
    return StableDiffusionPipeline(
        vae=build_vae(config.vae),
        text_encoder=build_text_encoder(config.text_encoder, tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(config.denoiser, config.text_encoder.width),
        scheduler=DPMSolverMultistepScheduler(**schedule, timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_base_model(
    directory: Path,
    config: BaseModelConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[StableDiffusionPipeline, dict[str, list[LogEntry]]]:
    """Train the base model.

    Args:
        directory: folder of checkpoints and logs, in `vae/` and `denoiser/` below it.
        config: the settings of model and training.
        resume: whether to continue from the checkpoints in the directory. They may be of either stage, and come from
            another device.
        overwrite: whether to delete the checkpoints in the directory and start anew.
        device: the device of training. Every device starts from the same weights, data and noise.

    Returns:
        The trained pipeline in float32, on the device, and the logged losses of each stage.

    Raises:
        FileExistsError: the directory has checkpoints, and neither `resume` nor `overwrite` is true.
        FileNotFoundError: `resume` is true, but the directory has no checkpoint.
        ValueError: the device cannot be used.
    """
    device = usable_device(device)
    stages = {stage: directory / stage for stage in ("vae", "denoiser")}
    started = {stage: bool(checkpoint_steps(folder)) for stage, folder in stages.items()}
    if resume and not started["vae"]:
        raise FileNotFoundError(f"There is no checkpoint in {stages['vae']} to resume from.")
    for folder in stages.values():
        # Both stages are treated alike, so that a denoiser is never resumed on another autoencoder than its own.
        if overwrite:
            delete_checkpoints(folder)
        elif not resume:
            check_no_checkpoints(folder)
    pipeline = build_untrained_pipeline(config).to(device)
    history = {}
    vae, unet, text_encoder = pipeline.vae, pipeline.unet, pipeline.text_encoder
    trainer = Trainer(
        VAEObjective(vae, config.vae, config.seed), config.vae_training, stages["vae"], description="autoencoder"
    )
    history["vae"] = trainer.train(resume=resume)
    vae.eval().requires_grad_(False)
    measure_and_set_scaling_factor(vae, config.seed)
    data = LatentDataset(vae, config.denoiser.prompts, config.seed)
    # At these head widths, two plain batched products with their backward are 2.5 times as fast on a CPU as the fused
    # attention that diffusers prefers. The saved model does not record this choice.
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    threads = config.denoiser.loss_threads if device.type == "cpu" else 1
    objective = DenoiserObjective(
        unet, text_encoder, pipeline.tokenizer, data, replace(config.denoiser, loss_threads=threads), config.seed
    )
    trainer = Trainer(objective, config.denoiser_training, stages["denoiser"], description="denoiser")
    with intra_op_threads_context(max(1, torch.get_num_threads() // threads)):
        history["denoiser"] = trainer.train(resume=resume and started["denoiser"])
    unet.eval()
    text_encoder.eval()
    return pipeline, history


def convert_to_float16_and_save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Convert a pipeline to float16 in place, and save it as safetensors in diffusers' layout.

    Args:
        pipeline: the trained pipeline.
        folder: the folder of `model_index.json`.
    """
    # float16 has finer steps than bfloat16, and no weight comes near its limits.
    for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        # `module.to` of diffusers would warn of an empty list of modules. Torch does not declare `memory_format`.
        nn.Module.to(  # pyright: ignore[reportCallIssue]
            module, dtype=torch.float16, memory_format=torch.contiguous_format
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # Without an argument `dtype`, diffusers loads its own modules in float32, but transformers loads its modules in the
    # dtype of this entry. Both load in float32 if the entry says so.
    path = folder / "text_encoder" / "config.json"
    write_text(path, json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
