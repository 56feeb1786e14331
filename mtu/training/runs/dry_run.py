"""What a training will take, computed before any weight is loaded: examples, memory, time and disk.

`dry_run_report` makes the tables of it.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtu.data.task_dataset import TaskDataset
from mtu.example_inputs import CLIP_TEXT_TOKENS
from mtu.inspection.counting import Flops, count_flops
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.training.runs.base_model import BaseModel, find_base_model
from mtu.training.runs.peak_memory import StepSettings, TrainingMemory, peak_training_memory
from mtu.training.runs.run_checks import check_settings, open_checked_data
from mtu.training.runs.run_config import RunConfig

__all__ = ["RunEstimate", "TaskEstimate", "estimate_run", "examples_per_pass"]

# The rows of the square matrices by whose product the speed of a device is measured.
_MATRIX_SIZES = {"cuda": 8192, "cpu": 1024}
# Training reaches this fraction of the speed of one large matrix product: a usual figure for diffusion UNets.
_FRACTION_OF_PEAK = 0.4
_A100_FLOPS = 312e12
_FLOAT32_BYTES = 4


class TaskEstimate(NamedTuple):
    """The examples of one task.

    Attributes:
        name: the task.
        rows: its rows; None if its data are not given.
        images: targets to encode: all variants of all rows.
        prompts: different prompts to encode.
        examples_per_step: mean number of its examples in a step.
        epochs: how often the training visits each row; None if `rows` or the number of steps is not known.
    """

    name: str
    rows: int | None
    images: int | None
    prompts: int | None
    examples_per_step: float
    epochs: float | None


class TimeEstimate(NamedTuple):
    """The time of a training.

    Attributes:
        seconds_per_step: the time of one step.
        is_measured: whether an earlier training took this time; otherwise it is estimated.
        basis: a sentence on how it was found.
    """

    seconds_per_step: float
    is_measured: bool
    basis: str


class DiskEstimate(NamedTuple):
    """The bytes that a training writes.

    Attributes:
        checkpoint: one checkpoint.
        checkpoints: the most that checkpoints take at a time, which includes one that is being written; None if all
            are kept and the number of steps is not known.
        latent_cache, text_cache: the caches; None if the data are not given.
        model: the UNet of the finished pipeline.
        free: the free space at the output folder.
    """

    checkpoint: int
    checkpoints: int | None
    latent_cache: int | None
    text_cache: int | None
    model: int
    free: int


class RunEstimate(NamedTuple):
    """What a training will take.

    Attributes:
        config: the settings.
        model: the model.
        parameters, trained_parameters: numbers of parameters of the UNet.
        tasks: the examples of each task.
        steps: number of steps; None if `epochs` gives the length and the data are not given.
        processes: number of processes.
        memory: the memory of a step on a GPU in each process.
        duration: the time of a step.
        disk: what is written.
    """

    config: RunConfig
    model: BaseModel
    parameters: int
    trained_parameters: int
    tasks: tuple[TaskEstimate, ...]
    steps: int | None
    processes: int
    memory: TrainingMemory
    duration: TimeEstimate
    disk: DiskEstimate


def estimate_run(config: RunConfig) -> RunEstimate:
    """Compute what a training will take, from configurations and the list of the data alone.

    Args:
        config: the settings.

    Raises:
        ValueError: the model, the tasks or the data are not as the settings say.
    """
    model = find_base_model(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_settings(config, model, processes)
    unet = model.build_unet_without_weights(config)
    datasets = open_checked_data(config, model)
    tasks, steps = _estimate_examples(config, model, datasets)
    trained = sum(p.numel() for p in unet.trainable_parameters())
    return RunEstimate(
        config,
        model,
        sum(p.numel() for p in unet.parameters()),
        trained,
        tasks,
        steps,
        processes,
        _estimate_memory(config, model, unet, processes),
        _estimate_time(config, model, unet, processes),
        _estimate_disk(config, model, tasks, unet, steps),
    )


def _estimate_examples(
    config: RunConfig, model: BaseModel, datasets: Mapping[str, TaskDataset]
) -> tuple[tuple[TaskEstimate, ...], int | None]:
    names = list(datasets) if datasets else [task.name for task in model.tasks]
    rows = {name: len(dataset) for name, dataset in datasets.items()}
    steps = None if config.epochs is not None and not rows else config.count_steps(sum(rows.values()))
    shares = {name: config.objective.shares.get(name, 1.0) for name in names}
    estimates = []
    for name in names:
        per_step = config.objective.batch_size * shares[name] / sum(shares.values())
        epochs = steps * per_step / rows[name] if steps is not None and name in rows else None
        images, prompts = _count_images_and_prompts(datasets[name]) if name in datasets else (None, None)
        estimates.append(TaskEstimate(name, rows.get(name), images, prompts, per_step, epochs))
    return tuple(estimates), steps


def _count_images_and_prompts(dataset: TaskDataset) -> tuple[int, int]:
    images, prompts = 0, set()
    for row in range(len(dataset)):
        variants = dataset.prompts(row)
        images += len(variants)
        prompts.update(prompt for variant in variants for prompt in variant)
    return images, len(prompts)


def _estimate_memory(
    config: RunConfig, model: BaseModel, unet: MTUUNet2DConditionModel, processes: int
) -> TrainingMemory:
    trainer, objective = config.trainer, config.objective
    height, width = objective.height_and_width
    return peak_training_memory(
        unet,
        StepSettings(
            batch_size=examples_per_pass(config, processes),
            height=height,
            width=width,
            pixels_per_latent=model.inspected.vae_scale_factor,
            autocast_dtype=torch.bfloat16 if objective.precision == "bf16" else None,
            frozen_dtype=torch.bfloat16 if config.frozen_dtype else None,
            gradient_checkpointing=objective.gradient_checkpointing,
            accumulates_gradients=trainer.gradient_accumulation_steps > 1,
            keeps_average=trainer.ema_decay is not None,
            optimizer=trainer.optimizer,
            num_processes=processes,
            fully_shard=trainer.fully_shard,
            device_type="cuda",
        ),
    )


def examples_per_pass(config: RunConfig, processes: int) -> int:
    """The examples that a process computes at a time."""
    parts = processes * config.trainer.gradient_accumulation_steps * config.objective.loss_threads
    return max(1, config.objective.batch_size // parts) * config.objective.loss_threads


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _estimate_time(config: RunConfig, model: BaseModel, unet: MTUUNet2DConditionModel, processes: int) -> TimeEstimate:
    measured = _logged_seconds_per_step(config.output / "log.jsonl")
    if measured is not None:
        return TimeEstimate(measured, True, f"The training in {config.output} took this time.")
    height, width = config.objective.height_and_width
    factor = model.inspected.vae_scale_factor
    # FLOPs are counted for a square picture with as many pixels.
    edge = max(8, 8 * round(math.sqrt(height * width) / factor / 8))
    flops = _flops_of_training(
        count_flops(unet, unet.conv_in.in_channels, edge), config.objective.gradient_checkpointing
    )
    dtype = torch.bfloat16 if config.objective.precision == "bf16" else torch.float32
    device = _device()
    speed = _matrix_product_flops_per_second(device, dtype)
    total = config.objective.batch_size * flops / (processes * _FRACTION_OF_PEAK)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    basis = (
        f"An example takes {flops / 1e12:.3g} TFLOPs, computed at {_FRACTION_OF_PEAK:.0%} of the {speed / 1e12:.3g} "
        f"TFLOP/s\nthat a large matrix product in {str(dtype).removeprefix('torch.')} has just reached on {name}."
    )
    if device.type == "cpu" and dtype == torch.bfloat16:
        basis += f"\nAn A100 ({_A100_FLOPS / 1e12:.0f} TFLOP/s) would take {total / _A100_FLOPS:.3g} s a step."
    return TimeEstimate(total / speed, False, basis)


def _flops_of_training(forward: Flops, recomputes: bool) -> int:
    """FLOPs of forward and backward pass of one example.

    The backward pass computes the gradients of all layers' inputs, which costs as much as the forward pass (twice for
    attention, whose products have two inputs each), and the gradients of the trained weights, most of which belong to
    feed-forward networks.
    """
    once = forward.layers + forward.attention
    return once * (3 if recomputes else 2) + forward.attention + forward.ffn


def _matrix_product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size = _MATRIX_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        durations.append(time.perf_counter() - started)
    return 2 * size**3 / min(durations)


def _logged_seconds_per_step(path: Path) -> float | None:
    """The mean time of a step of an earlier training, from the last two entries of its log."""
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()][-2:]
        (first, last) = entries
        return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return None


def _estimate_disk(
    config: RunConfig,
    model: BaseModel,
    tasks: tuple[TaskEstimate, ...],
    unet: MTUUNet2DConditionModel,
    steps: int | None,
) -> DiskEstimate:
    trainer = config.trainer
    trained = sum(p.numel() for p in unet.trainable_parameters())
    moment_bytes = 2 * (1 + 4 / 256) if trainer.optimizer == "adamw8bit" else 8
    checkpoint = round(trained * (4 + moment_bytes + (4 if trainer.ema_decay is not None else 0)))
    kept = trainer.checkpoints_total_limit
    if kept is None and steps is not None:
        kept = math.ceil(steps / trainer.checkpoint_every)
    latents, texts = (None, None) if any(task.rows is None for task in tasks) else _cache_bytes(config, model, tasks)
    return DiskEstimate(
        checkpoint,
        None if kept is None else (kept + 1) * checkpoint,
        latents,
        texts,
        sum(p.numel() for p in unet.parameters()) * _FLOAT32_BYTES,
        _free_bytes(config.output),
    )


def _cache_bytes(config: RunConfig, model: BaseModel, tasks: tuple[TaskEstimate, ...]) -> tuple[int, int]:
    """The sizes of the caches on disk."""
    height, width = config.objective.height_and_width
    factor = model.inspected.vae_scale_factor
    plane = (height // factor) * (width // factor) * _FLOAT32_BYTES
    channels = model.inspected.stock_config.get("in_channels", 4)
    specs = {task.name: task for task in model.tasks}
    # Of a target, mean and variance are kept.
    latents = sum((t.images or 0) * plane * (2 * channels + specs[t.name].condition_channels) for t in tasks)
    latents *= 2 if config.objective.random_flip else 1
    # Dropout needs the empty prompt, too.
    prompts = 1 + sum(t.prompts or 0 for t in tasks)
    width_of_text: Any = model.inspected.stock_config.get("cross_attention_dim", 768)
    width_of_text = max(width_of_text) if isinstance(width_of_text, list | tuple) else width_of_text
    texts = prompts * CLIP_TEXT_TOKENS * width_of_text * _FLOAT32_BYTES
    return (
        latents if config.objective.latent_cache == "disk" else 0,
        texts if config.objective.text_cache == "disk" else 0,
    )


def _free_bytes(folder: Path) -> int:
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
