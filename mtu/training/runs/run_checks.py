"""What is checked of a training before its model is loaded: settings, data, libraries and the output folder."""

import importlib.util
import os
from collections.abc import Mapping

from mtu.data.image_digests import ImageDigests
from mtu.data.task_dataset import TaskDataset
from mtu.training.checkpoints import checkpoint_steps
from mtu.training.runs.base_model import BaseModel
from mtu.training.runs.run_config import RunConfig
from mtu.training.runs.task_data import check_data, open_task_datasets
from mtu.training.runs.validation import check_validation

__all__ = ["check_libraries", "check_no_training", "check_settings", "make_output_folder", "open_checked_data"]


def check_settings(config: RunConfig, model: BaseModel, processes: int) -> None:
    """Check that the settings suit the model and the number of processes. A dry run makes the same check.

    Args:
        config: the settings.
        model: the model, without its weights.
        processes: the number of processes.

    Raises:
        ValueError: a setting does not suit them.
    """
    if model.folder is not None and not config.data:
        raise ValueError("There are no data to train on: give folders as --data TASK=FOLDER, or under data in a file.")
    check_validation(config, model.is_xl)
    objective, factor = config.objective, model.inspected.vae_scale_factor
    if any(edge % factor for edge in objective.height_and_width):
        raise ValueError(f"resolution must be a multiple of {factor} pixels, but got {objective.resolution}.")
    passes = config.trainer.gradient_accumulation_steps
    parts = processes * passes * objective.loss_threads
    if objective.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, the product of the number of processes ({processes}), "
            f"gradient_accumulation_steps ({passes}) and loss_threads ({objective.loss_threads}), but got "
            f"{objective.batch_size}."
        )


def check_libraries(config: RunConfig) -> None:
    """Check that the libraries are there that the training needs later.

    Raises:
        ValueError: one is missing.
    """
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


def check_no_training(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Check that the output folder holds what the training is to begin with.

    Args:
        config: the settings.
        resume: whether the training goes on.
        overwrite: whether it may delete checkpoints.

    Raises:
        FileExistsError: the folder holds checkpoints, and neither `resume` nor `overwrite` is true.
        ValueError: there is nothing to resume, or both are true.
    """
    if resume and overwrite:
        raise ValueError("resume continues the checkpoint that overwrite deletes: expected one of them, got both.")
    if resume and not config.output.is_dir():
        raise ValueError(f"There is no training in {config.output} to resume: the folder does not exist.")
    if not (resume or overwrite) and checkpoint_steps(config.output):
        raise FileExistsError(
            f"{config.output} holds the checkpoint of a training: continue it with --resume (in Python, resume=True), "
            "delete it with --overwrite (overwrite=True), or choose another output folder."
        )


def make_output_folder(config: RunConfig) -> None:
    """Make the output folder.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The output folder {config.output} cannot be made ({error.strerror}).") from error
    if not os.access(config.output, os.W_OK | os.X_OK):
        raise PermissionError(f"The output folder {config.output} cannot be written to (no permission).")


def open_checked_data(
    config: RunConfig, model: BaseModel, digests: ImageDigests | None = None
) -> Mapping[str, TaskDataset]:
    """Check the data of a training, and open them in the order of the tasks.

    Args:
        config: the settings.
        model: the model, whose tasks the data are of.
        digests: remembers the digests of images for later trainings; None: nothing does.

    Raises:
        ValueError: some rows are bad, or a task has none.
    """
    check_data(config.data, model.tasks)
    check_data(config.validation.data, model.tasks)
    datasets = open_task_datasets(config.data, model.tasks, digests)
    for name, dataset in datasets.items():
        if not len(dataset):
            raise ValueError(f"The data of task {name!r} have no rows.")
    return datasets
