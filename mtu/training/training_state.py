"""The state of a training, which checkpoints save and restore so that resuming is exact.

The state has no random generator, because whatever a step draws depends on its seed and number. Frozen weights are not
saved; checkpoints only describe them. The loop over steps is in `trainer`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter

from mtu.training.distributed import (
    gather_on_main_process,
    is_sharded,
    load_into,
    local_tensor,
    names_of_infinite_tensors,
    sharded_like,
)
from mtu.training.objective import Objective
from mtu.training.optimizer import build_optimizer, learning_rate_at, row_name, row_views
from mtu.training.precision import check_parameter_dtypes
from mtu.training.trainer_config import TrainerConfig

__all__ = ["TrainingState", "persistent_buffers"]


class TrainingState:
    """The trained parameters of an objective, their optimizer and averages, and the number of steps made.

    Args:
        objective: the objective, on the device of training. Its parameters that require gradients are trained.
        config: the settings of the training.

    Attributes:
        parameters: the trained parameters, by name.
        optimizer_parameters: what the optimizer updates, by name: the trained parameters, but each row of a parameter
            with one row per task by itself, and of sharded parameters the part that this process holds.
        averaged_weights: the exponential moving average of each trained parameter in float32 at least, by name, as far
            as this process holds the parameter; empty if none is kept.
        step: number of steps made.
        seconds: training time so far.

    Raises:
        ValueError: nothing is to be trained, or a parameter is float16, in which AdamW divides by zero.

    Warns:
        UserWarning: some parameters are bfloat16, in which small updates round to nothing.
    """

    def __init__(self, objective: Objective, config: TrainerConfig) -> None:
        self.objective, self.config = objective, config
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("There is nothing to train: no parameter of the objective requires gradients.")
        check_parameter_dtypes(self.parameters)
        with_rows = {id(parameter) for parameter in objective.row_parameters()}
        self.rows: dict[str, list[Parameter]] = {
            name: row_views(p) for name, p in self.parameters.items() if id(p) in with_rows
        }
        # The optimizer knows nothing of sharding: its rule is that of each number by itself.
        self.shards = {name: Parameter(local_tensor(p)) for name, p in self.parameters.items() if is_sharded(p)}
        self.optimizer_parameters: dict[str, Parameter] = {}
        for name, parameter in self.parameters.items():
            rows = self.rows.get(name)
            self.optimizer_parameters |= (
                {name: self.shards.get(name, parameter)}
                if rows is None
                else {row_name(name, i): row for i, row in enumerate(rows)}
            )
        self.optimizer = build_optimizer(objective, self.optimizer_parameters, config)
        # The average is float32 at least: its steps are too small for 16-bit formats.
        self.averaged_weights = {
            name: local_tensor(p).to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in (self.parameters.items() if config.ema_decay is not None else ())
        }
        self.step = 0
        self.seconds = 0.0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def drop_gradients(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.parameters.values(), *self.optimizer_parameters.values()):
            parameter.grad = None

    def take_gradients(self) -> None:
        """Give the optimizer's views of parameters their gradients: rows that the step does not train get none.

        Raises:
            RuntimeError: a parameter has left the memory of its rows.
        """
        trained = set(self.objective.trained_rows(self.step)) if self.rows else set()
        for name, rows in self.rows.items():
            if rows[0].data_ptr() != self.parameters[name].data_ptr():
                raise RuntimeError(
                    f"{name} was moved to other memory during the training, where its rows are not trained: expected "
                    "models that stay in their place, so a validation may move or convert copies only."
                )
            gradient = self.parameters[name].grad
            for index, row in enumerate(rows):
                row.grad = gradient[index] if gradient is not None and index in trained else None
        for name, shard in self.shards.items():
            gradient = self.parameters[name].grad
            shard.grad = None if gradient is None else local_tensor(gradient)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the optimizer uses, by the names of its parameters; those of shards as sharded tensors."""
        owners = {**self.optimizer_parameters, **{name: self.parameters[name] for name in self.shards}}
        return {name: owner.grad for name, owner in owners.items() if owner.grad is not None}

    def optimizer_step(self, norm: Tensor) -> None:
        """Make one optimizer step with the current gradients, and update the averaged weights.

        Args:
            norm: () norm of the gradients.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.seconds, self.config)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.optimizer_parameters.values(), self.config.max_grad_norm, norm)
        self.optimizer.step()
        self.drop_gradients()
        self.step += 1
        if self.config.ema_decay is not None:
            # A lower decay in the first steps removes the random start from the average soon.
            self.move_average_towards_weights(1 - min(self.config.ema_decay, self.step / (self.step + 10)))

    @torch.no_grad()
    def move_average_towards_weights(self, fraction: float) -> None:
        """Move the averaged weights towards the trained ones, by a fraction of the distance."""
        averages = list(self.averaged_weights.values())
        trained = [local_tensor(p).to(a.dtype) for p, a in zip(self.parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, trained, fraction)

    @contextmanager
    def averaged_weights_context(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, into the modules within this context."""
        trained = {name: local_tensor(self.parameters[name]).clone() for name in self.averaged_weights}
        self.copy_average_to_modules()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in trained.items():
                    local_tensor(self.parameters[name]).copy_(tensor)

    @torch.no_grad()
    def copy_average_to_modules(self) -> None:
        """Copy the averaged weights, if there are any, into the modules."""
        for name, tensor in self.averaged_weights.items():
            local_tensor(self.parameters[name]).copy_(tensor)

    def checkpoint_tensors(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint by name: weights, buffers, averages, and the optimizer's state.

        All processes call this together, and the main process gets the tensors.

        Args:
            accelerator: tells the processes.

        Raises:
            FloatingPointError: a weight, an average or a number of the optimizer is not finite.
        """
        learnt = {f"trained.{name}": parameter for name, parameter in self.parameters.items()}
        for name, tensor in self.averaged_weights.items():
            learnt[f"average.{name}"] = sharded_like(tensor, self.parameters[name])
        for name, parameter in self.optimizer_parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    is_part = name in self.shards and value.shape == parameter.shape
                    learnt[f"optimizer.{key}.{name}"] = sharded_like(value, self.parameters[name]) if is_part else value
        self._check_finite(learnt)
        # Buffers are not checked, because a mask may hold infinities.
        buffers = {f"buffer.{name}": tensor for name, tensor in persistent_buffers(self.objective).items()}
        return gather_on_main_process(accelerator, learnt | buffers)

    def optimizer_numbers(self) -> dict[str, dict[str, float]]:
        """The numbers of the optimizer's state that are no tensors, by parameter and by their own name."""
        numbers = {}
        for name, parameter in self.optimizer_parameters.items():
            values = self.optimizer.state.get(parameter, {})
            found = {key: value for key, value in values.items() if isinstance(value, int | float)}
            if found:
                numbers[name] = found
        return numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Mapping[str, float]]) -> None:
        """Restore the tensors and numbers of a checkpoint; its step and time are the caller's matter.

        Args:
            tensors: the tensors that `checkpoint_tensors` returned.
            numbers: the numbers that `optimizer_numbers` returned.
        """
        own: dict[str, Tensor] = {f"trained.{name}": parameter for name, parameter in self.parameters.items()}
        own |= {f"average.{name}": sharded_like(t, self.parameters[name]) for name, t in self.averaged_weights.items()}
        own |= {f"buffer.{name}": tensor for name, tensor in persistent_buffers(self.objective).items()}
        for name, tensor in own.items():
            load_into(tensor, tensors[name])
        states: dict[str, dict[str, Any]] = {name: dict(numbers.get(name, {})) for name in self.optimizer_parameters}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                key, _, parameter = rest.partition(".")
                states[parameter][key] = self._state_value(parameter, key, tensor)
        for name, parameter in self.optimizer_parameters.items():
            self.optimizer.state.pop(parameter, None)
            if states[name]:
                self.optimizer.state[parameter] = states[name]

    def _state_value(self, name: str, key: str, value: Tensor) -> Tensor:
        """A tensor of the optimizer's state where the optimizer expects it.

        Moments have the memory format of their parameter, as in the interrupted training. The number of steps lies on
        the device, too, where the fused kernel of AdamW reads it.
        """
        parameter = self.optimizer_parameters[name]
        whole = self.parameters[name] if name in self.shards else parameter
        if value.shape != whole.shape:
            return value.to(parameter.device)
        state = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        load_into(sharded_like(state, whole), value)
        return state

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        wrong = names_of_infinite_tensors({name: t for name, t in tensors.items() if t.is_floating_point()})
        if not wrong:
            return
        kind, _, name = wrong[0].partition(".")
        name = name.replace(".", " of ", 1) if kind == "optimizer" else name
        raise FloatingPointError(
            f"Step {self.step - 1} left numbers that are not finite in {name}, so no checkpoint was written; try a "
            "lower learning rate."
        )


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
