"""`run_training`: a training from a configuration, from the checks of settings and data to a finished pipeline."""

import dataclasses
import importlib.util
import os
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
from mtu.training.checkpoints import check_no_checkpoints, checkpoint_steps
from mtu.training.distributed import broadcast_text, common_errors_context, copy_whole_model, make_accelerator
from mtu.training.loss_log import LogEntry, read_entries
from mtu.training.multitask.objective import MultiTaskObjective
from mtu.training.parallel_loss import intra_op_threads_context
from mtu.training.runs.base_model import BaseModel, find_base_model, load_upcycled_pipeline
from mtu.training.runs.run_config import RunConfig
from mtu.training.runs.task_data import check_data, open_task_datasets
from mtu.training.runs.validation import Validation, check_validation
from mtu.training.trainer import Trainer

__all__ = ["run_training"]

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
    model = find_base_model(config)
    check_validation(config, model.is_xl)
    _check_libraries(config)
    with common_errors_context(accelerator):
        has_checkpoint = _check_output(config, resume, overwrite)
    # The other processes may be on machines that do not have the folder.
    resume = bool(broadcast_text(accelerator, "resume" if has_checkpoint else ""))
    digests = ImageDigests(_cache_directory(config) / "image-digests.safetensors")
    datasets = _open_data(config, model, digests)
    pictured = {**datasets, **open_task_datasets(config.validation.data, model.tasks)}
    pipeline = load_upcycled_pipeline(model, config)
    if config.frozen_dtype is not None:
        _hold_frozen_weights_in_(pipeline.unet, torch.bfloat16)
    objective = MultiTaskObjective(
        pipeline, datasets, dataclasses.replace(config.objective, cache_directory=_cache_directory(config))
    )
    validation = Validation(pipeline, pictured, config) if config.trainer.validate_every is not None else None

    def validate(step: int) -> None:
        with common_errors_context(accelerator), _whole_unet_context(pipeline, config, accelerator):
            if validation is not None and accelerator.is_main_process:
                _write_validation(validation, step, config)

    steps = config.count_steps(sum(map(len, datasets.values())))
    trainer = Trainer(
        objective,
        dataclasses.replace(config.trainer, steps=steps),
        config.output,
        accelerator=accelerator,
        description="training",
        validate=validate,
    )
    if accelerator.is_main_process:
        print(_describe(config, pipeline.unet, datasets, steps, accelerator), flush=True)
    with (
        nullcontext() if validation is None else closing(validation),
        _settings_file_context(config, accelerator, resume),
        _threads_context(config, accelerator),
    ):
        entries = trainer.train(resume=resume, overwrite=overwrite, accept_changes=resume and accept_changes)
    if accelerator.is_main_process:
        digests.save()
    _save_pipeline(pipeline, model, config, accelerator)
    return entries


# --------------------------------------------------------------------------------------------------------- the checks


def _check_libraries(config: RunConfig) -> None:
    """Raise a ValueError if a library is missing that the training needs later."""
    wanted = []
    if config.trainer.validate_every is not None:
        wanted.append(("matplotlib", "validate_every", "mtu[train]"))
    if config.trainer.tensorboard:
        wanted.append(("tensorboard", "tensorboard: true", "mtu[train]"))
    if config.trainer.optimizer == "adamw8bit":
        wanted.append(("bitsandbytes", "optimizer: adamw8bit", "mtu[8bit]"))
    for module, setting, extra in wanted:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{setting} needs {module}, which is not installed: pip install '{extra}'.")


def _check_output(config: RunConfig, resume: bool, overwrite: bool) -> bool:
    """Check that the output folder can be used, and return whether there is a checkpoint to resume from."""
    if resume and overwrite:
        raise ValueError("resume continues the checkpoint that overwrite deletes: expected one of them, got both.")
    if resume and not config.output.is_dir():
        raise ValueError(f"There is no training in {config.output} to resume: the folder does not exist.")
    if not (resume or overwrite):
        check_no_checkpoints(config.output)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The output folder {config.output} cannot be made ({error.strerror}).") from error
    if not os.access(config.output, os.W_OK | os.X_OK):
        raise PermissionError(f"The output folder {config.output} cannot be written to (no permission).")
    # A training that was interrupted before its first checkpoint has nothing to go on from, so it starts.
    return resume and bool(checkpoint_steps(config.output))


def _open_data(config: RunConfig, model: BaseModel, digests: ImageDigests) -> dict[str, TaskDataset]:
    if not config.data:
        raise ValueError("There are no data to train on: give folders as --data TASK=FOLDER, or under data in a file.")
    check_data(config.data, model.tasks)
    check_data(config.validation.data, model.tasks)
    datasets = open_task_datasets(config.data, model.tasks, digests)
    for name, dataset in datasets.items():
        if not len(dataset):
            raise ValueError(f"The data of task {name!r} have no rows.")
    return datasets


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
