"""The demo: upcycle the base model, train it on four tasks and measure it, in minutes on a CPU."""

import dataclasses
import platform
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from mtu.data.icons.examples import IMAGE_SIZE, TASK_NAMES
from mtu.data.icons.task_dataset import IconTask
from mtu.inspection import compare_with_original
from mtu.pipelines import MTUPipeline
from mtu.recipes.icons.device import autocast_dtype, describe_device, usable_device
from mtu.recipes.icons.held_out_evaluation import (
    before_after_grid,
    format_measurements,
    generate_example_images,
    held_out_examples,
    measure_quality,
    write_measurements_csv,
)
from mtu.storage import write_text
from mtu.tasks import EDIT, REMOVE, SUPER_RESOLUTION, TEXT_TO_IMAGE, TaskSpec
from mtu.training import Trainer, TrainerConfig
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective
from mtu.training.multitask.parallel_loss import intra_op_threads_context
from mtu.upcycling import upcycle

__all__ = ["ICON_TASKS", "SHIPPED_BASE_MODEL", "DemoConfig", "run_demo"]

# The base model that the package ships, in Stable Diffusion's folder layout.
SHIPPED_BASE_MODEL = Path(__file__).parents[2] / "assets" / "icons-base"

# The paper's guidance scales suit a model of photographs. A small model of flat icons works better with lower ones.
ICON_TASKS: tuple[TaskSpec, ...] = (
    dataclasses.replace(TEXT_TO_IMAGE, guidance_scale=3.0),
    dataclasses.replace(EDIT, guidance_scale=2.0, image_guidance_scale=1.5),
    SUPER_RESOLUTION,
    dataclasses.replace(REMOVE, guidance_scale=2.0, image_guidance_scale=1.5),
)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The settings of the demo.

    Args:
        max_training_minutes: wall-clock limit of the training.
        max_training_steps: limit of its optimizer steps. A CPU does not reach the default; a GPU that trains for long
            needs more.
        training_examples_per_task: training examples of each task.
        held_out_examples_per_row: held-out examples of each row of the metrics table.
        batch_per_task: training examples of each task in a step.
        learning_rate: highest learning rate.
        inference_steps: denoising steps; None: the tasks' own number, 20.
        snr_gamma, max_inverse_snr: γ and κ of `timestep_loss_weights`; None and 0: the paper's plain loss.
        seed: seed of data, initialisation, noise and held-out examples.
    """

    max_training_minutes: float = 6.0
    max_training_steps: int = 4000
    training_examples_per_task: int = 2000
    held_out_examples_per_row: int = 16
    batch_per_task: int = 12
    learning_rate: float = 1.5e-3
    inference_steps: int | None = None
    snr_gamma: float | None = 5.0
    max_inverse_snr: float = 10.0
    seed: int = 0


def run_demo(base: Path, output: Path, config: DemoConfig, device: str | torch.device = "cpu") -> None:
    """Upcycle a base model, train it on the icon tasks, and write images, tables and the model into a folder.

    Args:
        base: the folder of the base model.
        output: the folder of the results.
        config: the settings of the demo.
        device: the device of training and generation.

    Raises:
        ValueError: `base` holds no Stable Diffusion pipeline, or the device cannot be used.
    """
    started = time.monotonic()
    device = usable_device(device)
    if not (base / "model_index.json").is_file():
        raise ValueError(f"{base} holds no model_index.json: expected a folder in Stable Diffusion's layout.")
    torch.manual_seed(config.seed)
    stock = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    print(f"One model of {len(TASK_NAMES)} tasks out of {base.name}:\n")
    table = str(compare_with_original(base, num_experts=4, size=64).report())
    print(table, flush=True)
    output.mkdir(parents=True, exist_ok=True)
    pipeline = upcycle(stock, ICON_TASKS, num_experts=4, seed=config.seed).to(device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        # At these head widths, two plain batched products are faster on a CPU than the fused attention, the default.
        pipeline.unet.set_attn_processor(AttnProcessor())

    examples = held_out_examples(config.held_out_examples_per_row, config.seed)
    before = generate_example_images(
        pipeline, examples, config.seed, "held-out, before training", config.inference_steps
    )
    cores = torch.get_num_threads() if on_cpu else 1
    # The operations of a small model are too short to split over cores, so each core gets its own part of the batch.
    with intra_op_threads_context(1):
        train_on_icon_tasks(pipeline, config, output / "training", cores)
    after = generate_example_images(pipeline, examples, config.seed, "held-out, after training", config.inference_steps)

    rows = measure_quality(pipeline, examples, before, after)
    provenance = {
        "command": _command(config, device),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "device": platform.machine() if on_cpu else describe_device(device),
    }
    write_measurements_csv(output / "metrics.csv", rows, provenance)
    write_text(output / "metrics.md", format_measurements(rows) + "\n")
    write_text(output / "model.txt", table + "\n")
    before_after_grid(examples, before, after).save(output / "grid.png")
    pipeline.save_pretrained(output / "model")
    print(f"\n{format_measurements(rows)}\n")
    print(f"Pictures, tables and the model are in {output} ({time.monotonic() - started:.0f} s in all).")


def _command(config: DemoConfig, device: torch.device) -> str:
    """The command line that runs the demo with these settings."""
    command = f"python -m mtu.recipes.icons demo --minutes {config.max_training_minutes:g} --seed {config.seed}"
    if config.max_training_steps != DemoConfig.max_training_steps:
        command += f" --steps {config.max_training_steps}"
    return command if device.type == "cpu" else f"{command} --device {device}"


def train_on_icon_tasks(pipeline: MTUPipeline, config: DemoConfig, directory: Path, cores: int) -> None:
    """Train the upcycled parts of a pipeline on the four icon tasks.

    Args:
        pipeline: the upcycled pipeline, trained in place.
        config: the settings of the demo.
        directory: the folder of checkpoint and log.
        cores: number of CPU cores that share each batch; 1 on a GPU.
    """
    batch_size = config.batch_per_task * len(TASK_NAMES)
    objective = MultiTaskObjective(
        pipeline,
        {task: IconTask(task, config.training_examples_per_task, seed=config.seed) for task in TASK_NAMES},
        MultiTaskConfig(
            batch_size=batch_size,
            resolution=IMAGE_SIZE,
            snr_gamma=config.snr_gamma,
            max_inverse_snr=config.max_inverse_snr,
            latent_sampling="mode",
            precision="no" if autocast_dtype(pipeline.unet.device) is None else "bf16",
            loss_threads=_largest_divisor(batch_size, cores),
            latent_cache="memory",
            text_cache="memory",
            seed=config.seed,
        ),
    )
    settings = TrainerConfig(
        steps=config.max_training_steps,
        max_minutes=config.max_training_minutes,
        learning_rate=config.learning_rate,
        warmup_steps=20,
        schedule="cosine",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        seed=config.seed,
    )
    # Each run of the demo starts anew and replaces all its files.
    Trainer(objective, settings, directory).train(overwrite=True)
    pipeline.unet.eval()


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number within a limit: into how many equal parts as many threads can share it."""
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
