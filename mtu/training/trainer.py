"""The trainer: one loop for every objective, in one process or many, with checkpoints from which it goes on exactly.

The trainer knows nothing of diffusion: an `Objective` gives it the loss of each part of a batch.
"""

import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm import tqdm

from mtu.compat import parameter_access
from mtu.training.batch_loader import PartSequence, iterate_over_batches, part_seed
from mtu.training.checkpoints import (
    Checkpoint,
    check_no_checkpoints,
    check_same_training,
    delete_checkpoints,
    describe_training,
    locked_folder_context,
    named_folder_context,
    read_newest_checkpoint,
    write_checkpoint,
)
from mtu.training.distributed import (
    broadcast_tensors,
    broadcast_text,
    common_errors_context,
    delayed_reduction_context,
    gradient_norm,
    is_sharded,
    make_accelerator,
    names_of_infinite_tensors,
    share_objective,
)
from mtu.training.interruption import Interruption, raise_for_signal
from mtu.training.loss_log import LogEntry, LossLog, check_tensorboard
from mtu.training.numerical_faults import describe_fault
from mtu.training.objective import BatchPart, Objective, PartialLoss
from mtu.training.step_totals import OwnReport, StepTotals, TotalsReducer
from mtu.training.trainer_config import TrainerConfig
from mtu.training.training_state import TrainingState

__all__ = ["Trainer"]


class Trainer:
    """Trains the parameters of an objective that require gradients, in place.

    The batch of each step is split into equal parts, one for each process and each of its passes. The gradients of the
    parts are summed, so the number of processes changes nothing but the rounding.

    Args:
        objective: the loss, with the models as submodules.
        config: the settings of the training.
        directory: the folder of `checkpoints/`, `log.jsonl` and `tensorboard/`; None: nothing is written.
        accelerator: the processes and their devices; None: one is made. A single process then trains on the device
            where the objective is.
        description: label of the progress bar.
        validate: called with the number of steps made, in all processes, every `validate_every` steps and after the
            last one. The modules then hold the averaged weights, if there are any.

    Example:
        >>> trainer = Trainer(objective, TrainerConfig(steps=1000), "run")
        >>> entries = trainer.train()
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainerConfig,
        directory: str | os.PathLike | None = None,
        *,
        accelerator: Accelerator | None = None,
        description: str = "training",
        validate: Callable[[int], None] | None = None,
    ) -> None:
        self.objective, self.config = objective, config
        self.directory = None if directory is None else Path(directory)
        self.accelerator = make_accelerator(accelerator)
        self._trains_in_place = accelerator is None and self.accelerator.num_processes == 1
        self._description, self._validate = description, validate
        self._state: TrainingState | None = None
        self._model: torch.nn.Module = objective
        self._identity: dict[str, Any] = {}
        self._saved_step: int | None = None
        self._accepted_changes: list[dict[str, Any]] = []

    def train(self, *, resume: bool = False, overwrite: bool = False, accept_changes: bool = False) -> list[LogEntry]:
        """Train from the start or from the newest checkpoint to the last step.

        If an average of the weights is kept, the modules hold the averaged weights afterwards. SIGINT and SIGTERM end
        the training after the current step, with a checkpoint. Each validation follows a checkpoint. If an error ends a
        step of a single process, the state before the step is saved.

        Args:
            resume: whether to continue from the newest whole checkpoint in the directory.
            overwrite: whether to start anew, and to delete the checkpoints in the directory just before the first step.
            accept_changes: whether to resume although the objective's settings, such as its data, or learning_rate,
                max_grad_norm, schedule, seed, steps, warmup_steps or weight_decay differ from those of the checkpoint.
                Later checkpoints and the log record the changes.

        Returns:
            The entries of the log, from the first step on.

        Raises:
            FloatingPointError: the loss or a gradient is not finite. No weight has changed in this step, and the state
                before it is saved.
            FileExistsError: the directory holds a checkpoint, and neither `resume` nor `overwrite` is true.
            FileNotFoundError: there is no checkpoint to resume from.
            KeyboardInterrupt, SystemExit: a signal ended the training, after its checkpoint.
            OSError: a file cannot be written, for example on a full disk. The previous checkpoint stays.
            ValueError: another training is running in the directory; its checkpoints are damaged or belong to another
                training; the batch cannot be split into as many parts; or `resume` and `overwrite` are both true.
        """
        with common_errors_context(self.accelerator):
            self._check_before_start(resume, overwrite, accept_changes)
        with self._locked_folder_context(), _module_modes(self.objective), ExitStack() as at_end:
            at_end.callback(self.objective.finish)
            self.objective.train()
            state, log = self._start(resume, accept_changes)
            saves = "" if self.directory is None else " and saves"
            announcement = f"The training ends after this step{saves}; a second signal ends it at once."
            with Interruption(announcement if self.accelerator.is_main_process else None) as interruption:
                running = self._running(state, log, interruption)
                with closing(running.batches), closing(log), _random_state_context(self.device):
                    self._open_files(log, overwrite)
                    try:
                        self._run(running)
                    finally:
                        # An error may leave gradients of a step that was not made.
                        state.drop_gradients()
            # A signal may have come after the last step.
            raise_for_signal(interruption.signal_number)
        state.copy_average_to_modules()
        return log.entries

    def averaged_weights_context(self) -> AbstractContextManager[None]:
        """Put the averaged weights into the modules within this context, if the training keeps an average."""
        return nullcontext() if self._state is None else self._state.averaged_weights_context()

    @property
    def device(self) -> torch.device:
        """The device of training in this process."""
        if self._trains_in_place:
            return next((p.device for p in self.objective.parameters()), torch.device("cpu"))
        return self.accelerator.device

    @property
    def _num_parts(self) -> int:
        return self.accelerator.num_processes * self.config.gradient_accumulation_steps

    def _check_before_start(self, resume: bool, overwrite: bool, accept_changes: bool) -> None:
        if resume and self.directory is None:
            raise ValueError("To resume needs the directory that holds the checkpoint, but got None.")
        if self.config.tensorboard:
            check_tensorboard(self.directory)
        if resume and overwrite:
            raise ValueError("resume continues the checkpoint that overwrite deletes: expected one of them, got both.")
        if accept_changes and not resume:
            raise ValueError("accept_changes accepts changes since the checkpoint of resume, but resume is false.")
        if self.directory is not None and not (resume or overwrite):
            check_no_checkpoints(self.directory)
        parameter_access.check_trainable(self.objective, "Training")
        parameter_access.check_has_values(self.objective, "Training")
        self.objective.check_part_count(self._num_parts)

    def _start(self, resume: bool, accept_changes: bool) -> tuple[TrainingState, LossLog]:
        """Build the state and the log, or restore them, and prepare the objective; no file changes."""
        directory, is_main = self.directory, self.accelerator.is_main_process
        self._identity = self._describe_training()
        if self._state is None:
            if self.accelerator.num_processes == 1 or not self.config.fully_shard:
                self.objective.to(self.device)
            self._model = share_objective(self.accelerator, self.objective, self.config.fully_shard)
        state, sums = TrainingState(self.objective, self.config), None
        self._state, self._saved_step, self._accepted_changes = state, None, []
        # The first step would add its own gradients to earlier ones.
        state.drop_gradients()
        if resume and directory is not None:
            checkpoint = self._read_checkpoint(directory, accept_changes)
            saved = checkpoint.state
            state.load(checkpoint.tensors, saved["optimizer_numbers"])
            state.step, state.seconds, sums = checkpoint.step, float(saved["seconds"]), saved["log_sums"]
            self._saved_step, self._accepted_changes = state.step, saved["accepted_changes"]
        with common_errors_context(self.accelerator), named_folder_context(directory):
            log = LossLog(directory, state.step, writes=is_main, tensorboard=self.config.tensorboard)
        log.sums = log.sums if sums is None else sums
        self.objective.prepare(self.accelerator)
        return state, log

    def _describe_training(self) -> dict[str, Any]:
        """Describe the training for checkpoints, after a check that it is the same in all processes."""
        # Only checkpoints need the digest of the frozen weights, which takes seconds. The main process computes it,
        # because the others take its weights. Weights that are sharded already must be gathered by all.
        needs_digest = self.directory is not None and (
            self.accelerator.is_main_process or any(map(is_sharded, self.objective.parameters()))
        )
        with common_errors_context(self.accelerator):
            own = describe_training(self.objective, self.config, needs_digest=needs_digest)
        expected = json.loads(broadcast_text(self.accelerator, json.dumps(own)))
        different = [key for key in expected if key != "frozen_sha256" and own[key] != expected[key]]
        with common_errors_context(self.accelerator):
            if different:
                raise ValueError(
                    f"Process {self.accelerator.process_index} has another {', '.join(different)} than the main "
                    "process: expected the same settings, model and data in all processes."
                )
        return expected

    def _read_checkpoint(self, directory: Path, accept_changes: bool) -> Checkpoint:
        """Read the newest whole checkpoint in the main process, and send it to the others."""
        checkpoint = Checkpoint(0, {}, {})
        with common_errors_context(self.accelerator):
            if self.accelerator.is_main_process:
                checkpoint = read_newest_checkpoint(directory)
                changes = check_same_training(
                    checkpoint.state, self._identity, directory, accept_changes=accept_changes
                )
                if checkpoint.step > self.config.steps:
                    raise ValueError(
                        f"The checkpoint in {directory} is of step {checkpoint.step}: expected steps to be at least "
                        f"as many, but got {self.config.steps}."
                    )
                if changes:
                    checkpoint.state["accepted_changes"].append({"step": checkpoint.step, "accepted_changes": changes})
        step, state = json.loads(broadcast_text(self.accelerator, json.dumps([checkpoint.step, checkpoint.state])))
        return Checkpoint(step, broadcast_tensors(self.accelerator, checkpoint.tensors), state)

    @contextmanager
    def _locked_folder_context(self) -> Iterator[None]:
        """Make the folder, and keep other trainings out of it within this context."""
        with ExitStack() as stack:
            if self.directory is not None:
                with common_errors_context(self.accelerator):
                    if self.accelerator.is_main_process:
                        stack.enter_context(locked_folder_context(self.directory))
            yield

    def _open_files(self, log: LossLog, overwrite: bool) -> None:
        """Begin the log, and delete the checkpoints of the training that this one overwrites."""
        with common_errors_context(self.accelerator), named_folder_context(self.directory):
            log.open(self._accepted_changes)
            if overwrite and self.directory is not None and self.accelerator.is_main_process:
                delete_checkpoints(self.directory)

    def _running(self, state: TrainingState, log: LossLog, interruption: Interruption) -> "_Running":
        parts = PartSequence(
            start=state.step,
            stop=self.config.steps,
            passes=self.config.gradient_accumulation_steps,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        batches = iterate_over_batches(
            self.objective.load_batch, parts, self.config.num_workers, pin_memory=self.device.type == "cuda"
        )
        reducer = TotalsReducer(self.accelerator, self.device)
        return _Running(state, log, parts, batches, reducer, interruption, time.monotonic() - state.seconds)

    def _run(self, running: "_Running") -> None:
        """Make the steps, and log, save and validate between them."""
        config, state, log = self.config, running.state, running.log
        limit = math.inf if config.max_minutes is None else 60 * config.max_minutes
        with self._progress_bar(state) as bar:
            while state.step < config.steps and state.seconds < limit:
                totals = self._step(running)
                log.add_step(totals.loss, totals.data_seconds, totals.terms)
                is_last = state.step == config.steps or state.seconds >= limit
                validates = self._validates_after(state.step, is_last)
                if state.step % config.log_every == 0 or is_last:
                    with common_errors_context(self.accelerator):
                        log.write_entry(state.step, state.learning_rate, state.seconds)
                self._show_progress(bar, state, log)
                # An error of a validation loses no step.
                is_due = state.step % config.checkpoint_every == 0 or is_last or validates
                if is_due or totals.signal_number is not None:
                    self._save(running)
                raise_for_signal(totals.signal_number)
                if validates:
                    self._run_validation(state)

    def _step(self, running: "_Running") -> StepTotals:
        """Make one step, or raise an error and leave the weights as they are."""
        state = running.state
        with self._saving_on_error_context(running):
            losses, totals, norm = self._compute_gradients(running)
        if not self._is_finite(totals, state):
            self._refuse_step(running, losses, totals)
        state.optimizer_step(norm)
        state.seconds = totals.seconds
        return totals

    def _compute_gradients(
        self, running: "_Running"
    ) -> tuple[list[tuple[BatchPart, PartialLoss]], StepTotals, torch.Tensor]:
        """Compute the losses of this process's parts, the sums over all processes, and the norm of the gradients."""
        state, losses, data_seconds = running.state, [], 0.0
        parts = running.parts.of_step(state.step)
        for part in parts:
            started = time.monotonic()
            batch = send_to_device(next(running.batches), self.device, non_blocking=True)
            data_seconds += time.monotonic() - started
            losses.append((part, self._differentiate(part, batch, is_last_pass=part is parts[-1])))
        state.take_gradients()
        norm = gradient_norm(list(state.gradients().values()))
        report = OwnReport(
            [partial for _, partial in losses],
            time.monotonic() - running.started,
            data_seconds,
            running.interruption.signal_number,
        )
        return losses, running.reducer.reduce(report, norm), norm

    @contextmanager
    def _saving_on_error_context(self, running: "_Running") -> Iterator[None]:
        """Save the state if an error is raised within this context, such as that of an image that cannot be read."""
        try:
            yield
        except Exception as error:
            # Several processes save together, but an error may have come in one of them alone.
            if self.accelerator.num_processes == 1 and running.state.step > running.parts.start:
                try:
                    self._save(running)
                except Exception as second:
                    # The first error says more about the cause, for example that the disk is full.
                    error.add_note(f"The state before this step was not saved: {second}")
            raise

    def _differentiate(self, part: BatchPart, batch: Any, is_last_pass: bool) -> PartialLoss:
        """Compute the loss of a part of the batch, and add its gradients."""
        torch.manual_seed(part_seed(self.config.seed, part))
        with delayed_reduction_context(self.accelerator, self._model, is_last_pass):
            partial = self._model(batch)
            # The processes average their gradients, but their losses sum.
            (partial.loss * self.accelerator.num_processes).backward()
        examples = None if partial.example_losses is None else partial.example_losses.detach()
        terms = {name: term.detach() for name, term in partial.terms.items()}
        return PartialLoss(partial.loss.detach(), terms, examples)

    def _is_finite(self, totals: StepTotals, state: TrainingState) -> bool:
        if math.isfinite(totals.loss) and not math.isfinite(totals.norm) and self.config.max_grad_norm is None:
            # The norm of finite gradients may overflow, and it is only used to clip them.
            return not names_of_infinite_tensors(state.gradients())
        return math.isfinite(totals.loss) and math.isfinite(totals.norm)

    def _refuse_step(
        self, running: "_Running", losses: list[tuple[BatchPart, PartialLoss]], totals: StepTotals
    ) -> NoReturn:
        """Save the state before the step, and raise a FloatingPointError that says what is not finite."""
        state = running.state
        fault = describe_fault(self.accelerator, self.objective, losses, totals, state.gradients())
        state.drop_gradients()
        try:
            self._save(running)
            kept = "; try a lower learning rate"
            if self.directory is not None:
                kept = (
                    ", and the state before it is saved; correct the examples or lower the learning rate, and resume "
                    "with accept_changes (--accept-changes)"
                )
        except (OSError, FloatingPointError) as error:
            kept = f", nor was the state before it saved ({str(error).rstrip('.')})"
        raise FloatingPointError(f"{fault}, so the step was not made{kept}.")

    def _save(self, running: "_Running") -> None:
        """Write a checkpoint of the state, unless there is one."""
        state = running.state
        if self.directory is None or self._saved_step == state.step:
            return
        with common_errors_context(self.accelerator):
            tensors = state.checkpoint_tensors(self.accelerator)
            description = {
                "training": self._identity,
                "seconds": state.seconds,
                "optimizer_numbers": state.optimizer_numbers(),
                "log_sums": running.log.sums,
                "accepted_changes": self._accepted_changes,
            }
            if self.accelerator.is_main_process:
                checkpoint = Checkpoint(state.step, tensors, description)
                write_checkpoint(self.directory, checkpoint, self.config.checkpoints_total_limit)
        self._saved_step = state.step

    def _validates_after(self, step: int, is_last: bool) -> bool:
        every = self.config.validate_every
        return self._validate is not None and every is not None and (step % every == 0 or is_last)

    def _run_validation(self, state: TrainingState) -> None:
        if self._validate is not None:
            with state.averaged_weights_context(), _module_modes(self.objective):
                self._validate(state.step)

    def _progress_bar(self, state: TrainingState) -> tqdm:
        style: dict[str, Any] = {"desc": self._description, "mininterval": 5, "maxinterval": 60}
        style["disable"] = not self.accelerator.is_main_process
        if self.config.max_minutes is None:
            return tqdm(total=self.config.steps, initial=state.step, unit="step", **style)
        layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
        total = 60 * self.config.max_minutes
        return tqdm(total=total, initial=min(state.seconds, total), bar_format=layout, **style)

    def _show_progress(self, bar: tqdm, state: TrainingState, log: LossLog) -> None:
        # The progress bar shows seconds if the clock ends the training, else steps.
        bar.n = state.step if self.config.max_minutes is None else min(state.seconds, bar.total)
        bar.set_postfix(
            step=state.step, loss=f"{log.smoothed_loss:.4f}", learning_rate=f"{state.learning_rate:.1e}", refresh=False
        )
        bar.update(0)


class _Running(NamedTuple):
    """A training between its first and last step.

    Args:
        state: what checkpoints save.
        log: its losses.
        parts: the parts of batches that this process computes.
        batches: the batches of these parts, in their order.
        reducer: sums over processes.
        interruption: the signals that this process got.
        started: when the training would have started if it had not been interrupted, by the monotonic clock.
    """

    state: TrainingState
    log: LossLog
    parts: PartSequence
    batches: Generator[Any, None, None]
    reducer: TotalsReducer
    interruption: Interruption
    started: float


@contextmanager
def _random_state_context(device: torch.device) -> Iterator[None]:
    """Restore at the end of the context the state of PyTorch's global random generators, on the CPU and on a device."""
    has_own_generator = device.type not in ("cpu", "meta", "mps")
    with torch.random.fork_rng([device] if has_own_generator else [], device_type=device.type):
        yield


@contextmanager
def _module_modes(module: torch.nn.Module) -> Iterator[None]:
    """Restore at the end of the context which modules are in training mode."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
