"""The training loop: AdamW, warm-up, cosine or constant rate, weight averaging, and exact resuming.

The loop knows nothing of diffusion: a loss function gives it the loss of each step.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm import tqdm

from mtu.compat import parameter_access
from mtu.storage import make_folder
from mtu.training.checkpoint import check_no_checkpoint, delete_checkpoint_in
from mtu.training.fit_config import FitConfig
from mtu.training.fit_log import LogEntry, LossLog
from mtu.training.fit_state import TrainingState

__all__ = ["fit"]


def _progress_bar(training: TrainingState, config: FitConfig, description: str) -> tqdm:
    style: dict[str, Any] = {"desc": description, "mininterval": 5, "maxinterval": 60}
    if config.minutes is None:
        return tqdm(total=config.steps, initial=training.step, unit="step", **style)
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    total = 60 * config.minutes
    return tqdm(total=total, initial=min(training.seconds, total), bar_format=layout, **style)


def fit(
    loss_fn: Callable[[int], Tensor],
    modules: Mapping[str, nn.Module],
    parameters: Iterable[Parameter],
    config: FitConfig,
    *,
    directory: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    description: str = "",
) -> list[LogEntry]:
    """Train modules in place.

    If an average of the weights is kept, the modules hold the averaged weights afterwards.

    Args:
        loss_fn: computes the () loss of a step from the number of the step. Data and noise must depend on that number
            (and a seed) alone, so that a resumed training goes on exactly as an uninterrupted one. If it has an
            attribute `settings`, a dictionary of JSON values, a checkpoint can only be resumed with the same settings.
        modules: the modules by name, which checkpoints save whole.
        parameters: the parameters of the modules to train.
        config: the settings of the training.
        directory: the folder of the checkpoint and of `log.jsonl`; None: neither is written.
        resume: whether to continue from the checkpoint in the directory. It may have been made on another device.
        overwrite: whether to delete a checkpoint in the directory and start anew.
        description: label of the progress bar.

    Returns:
        The logged losses, from the first step on.

    Raises:
        FloatingPointError: the loss or a gradient is not finite. Weights, averages and the checkpoint are those before
            that step.
        FileExistsError: the directory holds a checkpoint, and neither `resume` nor `overwrite` is true.
        FileNotFoundError: there is no checkpoint to resume from.
        OSError: a file cannot be written, for example on a full disk. The previous checkpoint stays.
        ValueError: the checkpoint is damaged or belongs to another training, or `resume` and `overwrite` are both true.
    """
    if resume and directory is None:
        raise ValueError("fit: resume needs the directory that holds the checkpoint.")
    if resume and overwrite:
        raise ValueError("fit: resume continues the checkpoint that overwrite deletes: expected one of them, got both.")
    if directory is not None and not (resume or overwrite):
        check_no_checkpoint(directory)
    for module in modules.values():
        parameter_access.check_trainable(module, "fit")
        parameter_access.check_has_values(module, "fit")
    torch.manual_seed(config.seed)
    training, losses = TrainingState(modules, parameters, config, getattr(loss_fn, "settings", None)), []
    if directory is not None:
        make_folder(directory)
        if overwrite:
            delete_checkpoint_in(directory)
        if resume:
            losses = training.load(directory)
    log = LossLog(directory, training.step, losses)
    limit = math.inf if config.minutes is None else 60 * config.minutes
    started = time.monotonic() - training.seconds
    with _progress_bar(training, config, description) as bar:
        while training.step < config.steps and training.seconds < limit:
            loss = loss_fn(training.step)
            norm = training.backward(loss)
            value = training.finite_loss_or_raise(loss, norm)
            training.optimizer_step(norm)
            training.seconds = time.monotonic() - started
            log.add_loss(value)
            # The progress bar shows seconds if the clock ends the training, else steps.
            bar.n = training.step if config.minutes is None else min(training.seconds, limit)
            bar.update(0)
            done = training.step == config.steps or training.seconds >= limit
            if training.step % config.log_every == 0 or done:
                rate = training.optimizer.param_groups[0]["lr"]
                log.write_entry(training.step, rate, training.seconds)
                bar.set_postfix(step=training.step, loss=f"{log.smoothed_loss:.4f}", rate=f"{rate:.1e}")
            if directory is not None and (training.step % config.checkpoint_every == 0 or done):
                training.save(directory, log.unlogged_losses)
    training.copy_average_to_modules()
    return log.entries
