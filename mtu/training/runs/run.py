"""`run_training`: a training from a configuration, from the checks of settings and data to a finished pipeline."""

import dataclasses
import errno
import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError
from tqdm import tqdm

from mtu.data.image_digests import ImageDigests
from mtu.data.task_dataset import TaskDataset
from mtu.inspection.reports import format_count
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.pipelines import MTUPipeline
from mtu.storage import write_text
from mtu.training.checkpoints import checkpoint_steps
from mtu.training.distributed import broadcast_text, common_errors_context, copy_whole_model, make_accelerator
from mtu.training.loss_log import LogEntry, read_entries
from mtu.training.multitask.objective import MultiTaskObjective
from mtu.training.multitask.parallel_loss import intra_op_threads_context
from mtu.training.runs.base_model import BaseModel, find_base_model, load_upcycled_pipeline
from mtu.training.runs.run_checks import (
    check_libraries,
    check_no_training,
    check_settings,
    make_output_folder,
    open_checked_data,
)
from mtu.training.runs.run_config import RunConfig
from mtu.training.runs.task_data import open_task_datasets
from mtu.training.runs.validation import Validation
from mtu.training.trainer import Trainer

__all__ = ["process_group_context", "run_training"]

Pipeline = MTUPipeline | StableDiffusionXLPipeline


def run_training(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, accept_changes: bool = False
) -> list[LogEntry]:
    """Train as a configuration says, and save the finished pipeline in `OUTPUT/model`.

    The folder also gets `config.yaml`, `log.jsonl`, `losses.png`, `checkpoints`, `validation` and, if asked for,
    `tensorboard`. All processes of `accelerate launch` call this function.

    Args:
        config: the settings.
        resume: whether to continue from the newest checkpoint; without one, the training starts.
        overwrite: whether to delete the checkpoints of the output folder and start.
        accept_changes: whether to resume although data or settings, such as the learning rate, have changed.

    Returns:
        The entries of the log.

    Raises:
        ValueError: the settings, the model or the data are wrong. Nothing has been trained then.
        OSError: a file cannot be read or written. The newest checkpoint stays.
        FloatingPointError: the loss or a gradient is not finite. The state before that step is saved.
        KeyboardInterrupt, SystemExit: a signal ended the training, after its checkpoint.

    Example:
        >>> config = read_run_config("icons", {"output": "runs/icons"})
        >>> entries = run_training(config)
    """
    accelerator = make_accelerator()
    with common_errors_context(accelerator):
        check_no_training(config, resume, overwrite)
    model = find_base_model(config)
    check_settings(config, model, accelerator.num_processes)
    check_libraries(config)
    resume = _has_checkpoint(config, accelerator) and resume
    digests = ImageDigests(_cache_directory(config) / "image-digests.safetensors")
    datasets = open_checked_data(config, model, digests)
    objective = _make_objective(config, model, datasets)
    pipeline = objective.pipeline
    validation = _make_validation(config, model, pipeline, datasets)
    steps = config.count_steps(sum(map(len, datasets.values())))
    settings = dataclasses.replace(config.trainer, steps=steps)
    validate = functools.partial(_validate, validation, pipeline, config, accelerator)
    trainer = Trainer(objective, settings, config.output, accelerator=accelerator, validate=validate)
    if accelerator.is_main_process:
        print(_describe(config, pipeline.unet, datasets, steps, accelerator), flush=True)
    with (
        nullcontext() if validation is None else closing(validation),
        _settings_file_context(config, accelerator, resume),
        _threads_context(config, accelerator),
        _full_disk_context(config),
    ):
        entries = trainer.train(resume=resume, overwrite=overwrite, accept_changes=resume and accept_changes)
    if accelerator.is_main_process:
        digests.save()
    _save_pipeline(pipeline, model, config, accelerator)
    return entries


@contextmanager
def process_group_context() -> Iterator[None]:
    """End the connections of the processes with a program, which would otherwise end while threads still use them."""
    finished = False
    try:
        yield
        finished = True
    finally:
        group = torch.distributed
        # After an error, the other processes may not come to a barrier, and NCCL may wait for them.
        if group.is_available() and group.is_initialized() and (finished or group.get_backend() == "gloo"):
            if finished:
                group.barrier()
            group.destroy_process_group()


# ------------------------------------------------------------------------------------------------- before the training


def _has_checkpoint(config: RunConfig, accelerator: Accelerator) -> bool:
    """Make the output folder, and find out whether a training has been interrupted after its first checkpoint there."""
    with common_errors_context(accelerator):
        make_output_folder(config)
    # Other machines may not have the folder of the main process.
    return bool(broadcast_text(accelerator, "yes" if checkpoint_steps(config.output) else ""))


def _make_objective(config: RunConfig, model: BaseModel, datasets: Mapping[str, TaskDataset]) -> MultiTaskObjective:
    """Load the model, and make the loss of the training."""
    pipeline = load_upcycled_pipeline(model, config)
    if config.frozen_dtype is not None:
        _hold_frozen_weights_in_(pipeline.unet, torch.bfloat16)
    settings = dataclasses.replace(config.objective, cache_directory=_cache_directory(config))
    return MultiTaskObjective(pipeline, datasets, settings)


def _make_validation(
    config: RunConfig, model: BaseModel, pipeline: Pipeline, datasets: Mapping[str, TaskDataset]
) -> Validation | None:
    """Choose the examples of the pictures, if the training makes any."""
    if config.trainer.validate_every is None:
        return None
    pictured = {**datasets, **open_task_datasets(config.validation.data, model.tasks)}
    return Validation(pipeline, pictured, config)


def _cache_directory(config: RunConfig) -> Path:
    """The folder of caches: that of the settings, or one in the output folder."""
    given = config.objective.cache_directory
    return config.output / "cache" if given is None else Path(given)


def _describe(
    config: RunConfig,
    unet: MTUUNet2DConditionModel,
    datasets: Mapping[str, TaskDataset],
    steps: int,
    accelerator: Accelerator,
) -> str:
    trained = format_count(sum(p.numel() for p in unet.trainable_parameters()))
    rows = ", ".join(f"{name} ({len(dataset)} rows)" for name, dataset in datasets.items())
    noun = "process" if accelerator.num_processes == 1 else "processes"
    return (
        f"Training {trained} parameters of {config.model} for {steps} steps of {config.objective.batch_size} examples: "
        f"{rows}.\nThe training runs in {accelerator.num_processes} {noun} on {accelerator.device.type}, and writes "
        f"into {config.output}. After an interruption, --resume continues it."
    )


# ------------------------------------------------------------------------------------------------- during the training


@torch.no_grad()
def _hold_frozen_weights_in_(unet: MTUUNet2DConditionModel, dtype: torch.dtype) -> None:
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _threads_context(config: RunConfig, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Share the CPU's cores out among the threads of the loss, if it has several."""
    threads = config.objective.loss_threads
    if accelerator.device.type != "cpu" or threads == 1:
        return nullcontext()
    return intra_op_threads_context(max(1, torch.get_num_threads() // threads))


@contextmanager
def _settings_file_context(config: RunConfig, accelerator: Accelerator, resume: bool) -> Iterator[None]:
    """Write the settings to `config.yaml`; if the checkpoint to resume does not fit them, its own come back."""
    path = config.output / "config.yaml"
    former = path.read_text(encoding="utf-8") if resume and path.is_file() else None
    with common_errors_context(accelerator):
        if accelerator.is_main_process:
            write_text(path, config.to_yaml())
    try:
        yield
    except ValueError:
        if former is not None and accelerator.is_main_process:
            write_text(path, former)
        raise


@contextmanager
def _full_disk_context(config: RunConfig) -> Iterator[None]:
    """Let the error of a full disk say what is kept."""
    try:
        yield
    except OSError as error:
        codes = (errno.ENOSPC, errno.EDQUOT)
        # Other processes know the text of the error alone.
        if error.errno not in codes and not str(error).startswith(tuple(f"[Errno {code}]" for code in codes)):
            raise
        reason = error.strerror or str(error).partition("] ")[2]
        raise OSError(
            f"The disk of {config.output} or of its cache is full ({reason}): all checkpoints and all that is encoded "
            "stay, and once there is space, --resume goes on."
        ) from error


@contextmanager
def _whole_unet_context(pipeline: Pipeline, config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Give the pipeline of the main process a whole UNet, where the processes share its weights out."""
    if not (config.trainer.fully_shard and accelerator.num_processes > 1):
        yield
        return
    sharded, whole = pipeline.unet, copy_whole_model(accelerator, pipeline.unet)
    if whole is not None:
        pipeline.unet = whole.to(accelerator.device)
    try:
        yield
    finally:
        pipeline.unet = sharded


def _validate(
    validation: Validation | None, pipeline: Pipeline, config: RunConfig, accelerator: Accelerator, step: int
) -> None:
    """Write the pictures and plots of a step, for which all processes give their shards of the weights."""
    with common_errors_context(accelerator), _whole_unet_context(pipeline, config, accelerator):
        if validation is not None and accelerator.is_main_process:
            _write_validation(validation, step, config)


def _write_validation(validation: Validation, step: int, config: RunConfig) -> None:
    pictures = validation.make_pictures(step)
    folder = validation.write(step, pictures, read_entries(config.output / "log.jsonl"))
    tqdm.write(f"The pictures and plots of step {step} are in {folder}.")


def _save_pipeline(pipeline: Pipeline, model: BaseModel, config: RunConfig, accelerator: Accelerator) -> None:
    """Save the trained pipeline, whose frozen weights are those of the base model to the last bit."""
    with common_errors_context(accelerator), _whole_unet_context(pipeline, config, accelerator):
        if accelerator.is_main_process:
            _write_pipeline(pipeline, model, config)


def _write_pipeline(pipeline: Pipeline, model: BaseModel, config: RunConfig) -> None:
    if config.frozen_dtype is not None:
        trained = {name: p.detach().cpu() for name, p in pipeline.unet.named_trainable_parameters()}
        original = load_upcycled_pipeline(model, config)
        original.unet.load_state_dict(trained, strict=False)
        original.register_modules(scheduler=pipeline.scheduler)
        pipeline = original
    folder = config.output / "model"
    try:
        pipeline.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The finished pipeline cannot be written to {folder} ({str(error).rstrip('.')}); once it can, resume the "
            "training."
        ) from error
