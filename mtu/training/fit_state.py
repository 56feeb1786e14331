"""The state of a training, which checkpoints save and restore so that resuming is exact.

`TrainingState` makes single steps. The loop over them is in `training_loop`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mtu.compat.plain_linear import RouterLinear
from mtu.training.checkpoint import read_checkpoint, write_checkpoint
from mtu.training.fit_config import FitConfig, learning_rate_at
from mtu.training.precision import check_parameter_dtypes

__all__ = ["CHANGEABLE_ON_RESUME", "TrainingState", "parameter_groups"]

# These settings may change when a checkpoint is resumed, because no step that was already made depends on them.
CHANGEABLE_ON_RESUME = ("minutes", "checkpoint_every", "log_every")


def parameter_groups(
    modules: Mapping[str, nn.Module], parameters: Iterable[Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into a group with weight decay and a group without.

    Weights of linear layers and convolutions decay. Vectors, embeddings and tensors with a row per task do not: decay
    would move the rows of tasks that are not being trained.

    Args:
        modules: the modules that own the parameters.
        parameters: the parameters to train.
        weight_decay: weight decay of the first group.

    Returns:
        Parameter groups of an optimizer, without empty ones.
    """
    layers = (nn.Linear, RouterLinear, nn.modules.conv._ConvNd)
    weights = {id(m.weight) for root in modules.values() for m in root.modules() if isinstance(m, layers)}
    decayed, kept = [], []
    for parameter in parameters:
        (decayed if id(parameter) in weights else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class TrainingState:
    """The state of a training: modules, optimizer, averaged weights, and the number of steps made.

    Args:
        modules: the modules by name, which checkpoints save whole.
        parameters: the parameters to train.
        config: the settings of the training.
        loss_settings: the settings of the loss by name, as JSON. A checkpoint can only be resumed with the same.

    Attributes:
        parameters: the parameters to train, by name.
        averaged_weights: the exponential moving average of each parameter, by name; empty if none is kept.
        step: number of steps made.
        seconds: training time so far.

    Raises:
        ValueError: a parameter belongs to none of the modules, or is float16, in which AdamW divides by zero.

    Warns:
        UserWarning: some parameters are bfloat16, in which small updates round to nothing.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parameters: Iterable[Parameter],
        config: FitConfig,
        loss_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.modules = modules
        self.config = config
        self.loss_settings = dict(loss_settings or {})
        names = {id(p): f"{key}.{name}" for key, root in modules.items() for name, p in root.named_parameters()}
        self.parameters = {}
        for parameter in parameters:
            if id(parameter) not in names:
                raise ValueError("fit: a parameter to train belongs to none of the modules, so it would not be saved.")
            self.parameters[names[id(parameter)]] = parameter
        check_parameter_dtypes(self.parameters)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(modules, self.parameters.values(), config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
        )
        self.device = next(iter(self.parameters.values())).device
        averaged = config.ema_decay is not None
        # The average is float32 at least: its steps are too small for 16-bit formats.
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in self.parameters.items()}
        self.averaged_weights = (
            {n: p.detach().to(wide[n], copy=True) for n, p in self.parameters.items()} if averaged else {}
        )
        self.step = 0
        self.seconds = 0.0

    def backward(self, loss: Tensor) -> Tensor:
        """Compute the gradients of a loss, and return their norm, a () tensor on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return nn.utils.get_total_norm(self._gradients())

    def optimizer_step(self, norm: Tensor) -> None:
        """Make one optimizer step with the current gradients, and update the averaged weights.

        Args:
            norm: () norm of the gradients, as `backward` returned it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.seconds, self.config)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
        self.optimizer.step()
        self.step += 1
        if self.config.ema_decay is not None:
            # A lower decay in the first steps removes the random start from the average soon.
            self.move_average_towards_weights(1 - min(self.config.ema_decay, self.step / (self.step + 10)))

    @torch.no_grad()
    def move_average_towards_weights(self, fraction: float) -> None:
        """Move the averaged weights towards the trained ones, by a fraction of the distance."""
        averages = list(self.averaged_weights.values())
        trained = [p.to(a.dtype) for p, a in zip(self.parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, trained, fraction)

    def finite_loss_or_raise(self, loss: Tensor, norm: Tensor) -> float:
        """Check that the loss of a step and its gradients are finite, and return the loss.

        Only here does a step wait for its device.

        Args:
            loss: () loss of the step.
            norm: () norm of its gradients.

        Raises:
            FloatingPointError: the loss or a gradient is not finite. The gradients are dropped.
        """
        value, length = torch.stack([loss.detach().float(), norm.to(loss.device).float()]).tolist()
        if math.isfinite(value) and (math.isfinite(length) or self._norm_alone_overflows()):
            return value
        wrong = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        if not math.isfinite(value):
            fault = f"The loss of step {self.step} is {value}"
        elif wrong:
            others = f" and {len(wrong) - 1} other parameters" if len(wrong) > 1 else ""
            fault = f"The gradient of step {self.step} is not finite in {wrong[0]}{others}"
        else:
            fault = f"The norm of the gradient of step {self.step} is {length}"
        self.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"{fault}, so the step was not made; try a lower learning rate.")

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _norm_alone_overflows(self) -> bool:
        """Whether every gradient is finite, and their norm is not used to clip them."""
        return self.config.max_grad_norm is None and all(g.isfinite().all() for g in self._gradients())

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint by name: modules, averages, optimizer and random generators."""
        held = {f"module.{key}.{name}": t for key, m in self.modules.items() for name, t in m.state_dict().items()}
        held |= {f"average.{name}": tensor for name, tensor in self.averaged_weights.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            held |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        held["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            held["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return held

    def save(self, directory: Path, losses: Sequence[float] = ()) -> None:
        """Write a checkpoint into a directory, in place of the previous one.

        Args:
            directory: the folder of the checkpoint.
            losses: the losses since the last entry of the log.

        Raises:
            FloatingPointError: the last step left a weight that is not finite. The previous checkpoint stays.
        """
        held = self.checkpoint_tensors()
        # Buffers are not checked, because a mask may hold infinities.
        trained = {f"module.{name}" for name in self.parameters}
        kept = {n: t for n, t in held.items() if n in trained or n.startswith(("average.", "optimizer.exp_avg"))}
        finite = torch.stack([t.detach().isfinite().all().to(self.device) for t in kept.values()]).tolist()
        if not all(finite):
            kind, _, name = list(kept)[finite.index(False)].partition(".")
            name = name.replace(".", " of ", 1) if kind == "optimizer" else name
            raise FloatingPointError(
                f"Step {self.step - 1} left numbers that are not finite in {name}, so no checkpoint was written; try a "
                "lower learning rate."
            )
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "settings": self.loss_settings,
            "trained": list(self.parameters),
            "losses": list(losses),
        }
        write_checkpoint(directory, held, state)

    def load(self, directory: Path) -> list[float]:
        """Restore the state from the checkpoint in a directory.

        Args:
            directory: the folder of the checkpoint.

        Returns:
            The losses since the last entry of the log.

        Raises:
            FileNotFoundError: the directory holds no checkpoint.
            ValueError: the checkpoint is damaged, or belongs to another training.
        """
        tensors, state = read_checkpoint(directory)
        # Settings go through JSON, so that tuples equal the lists that they became in the file.
        config, settings = json.loads(json.dumps([asdict(self.config), self.loss_settings]))
        changed = [k for k, v in config.items() if k not in CHANGEABLE_ON_RESUME and state["config"].get(k) != v]
        # Checkpoints of earlier versions lack the settings of the loss.
        saved = state.get("settings", settings)
        changed += [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]
        if changed:
            raise ValueError(f"The checkpoint in {directory} was made with another {', '.join(sorted(changed))}.")
        own = {key: _within(tensors, f"module.{key}.") for key in self.modules}
        for key, module in self.modules.items():
            if _layout(module.state_dict()) != _layout(own[key]):
                raise ValueError(f"The checkpoint in {directory} does not fit the module {key!r}.")
        # Checkpoints of earlier versions lack the names of the trained parameters.
        if set(state.get("trained", self.parameters)) != set(self.parameters):
            raise ValueError(f"The checkpoint in {directory} was made by training other parameters of the modules.")
        for key, module in self.modules.items():
            module.load_state_dict(own[key])
        for name, tensor in self.averaged_weights.items():
            tensor.copy_(tensors[f"average.{name}"])
        for name, parameter in self.parameters.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {k: tensors[f"optimizer.{k}.{name}"] for k in keys if f"optimizer.{k}.{name}" in tensors}
            # The moments must have the memory format of their parameter, as in the interrupted training.
            self.optimizer.state[parameter] = {
                k: v if k == "step" else torch.empty_like(parameter).copy_(v) for k, v in found.items()
            }
        torch.set_rng_state(tensors["random"])
        # A checkpoint from a CPU has no CUDA generator; the training then goes on with the seeded one.
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        return state.get("losses", [])

    def copy_average_to_modules(self) -> None:
        """Copy the averaged weights, if there are any, into the modules."""
        with torch.no_grad():
            for name, tensor in self.averaged_weights.items():
                self.parameters[name].copy_(tensor)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
