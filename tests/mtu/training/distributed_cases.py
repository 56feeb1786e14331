"""Trainings that several processes run in tests, and what tests read from the checkpoints that they leave."""

import contextlib
import copy
import functools
import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

import mtu
from mtu import storage
from mtu.tasks import SDXL_TASKS
from mtu.training import Trainer, TrainerConfig, distributed
from mtu.training.objective import BatchPart, Objective, PartialLoss
from tests.mtu import tiny

STEPS = 3
BATCH_SIZE = 12


class Interruption(Exception):
    """Ends a training in the middle of a step."""


class NoisePrediction(Objective):
    """The noise prediction of a tiny upcycled XL UNet. Each step has the examples of two tasks only.

    Args:
        unet: the model.
        stop_at: the step in which `Interruption` is raised; None: no step.
        actions: called in this process before a step, by the number of the step.
    """

    def __init__(
        self,
        unet: mtu.MTUUNet2DConditionModel,
        stop_at: int | None = None,
        actions: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.stop_at = stop_at
        self.actions = actions or {}

    @property
    def load_batch(self) -> Callable[[BatchPart], dict[str, Any]]:
        return _load_examples

    def forward(self, batch: dict[str, Any]) -> PartialLoss:
        step = batch.pop("step")
        self.actions.get(step, lambda: None)()
        if step == self.stop_at:
            raise Interruption
        noise = batch.pop("noise")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.unet.conv_out.weight.dtype == torch.bfloat16):
            prediction = self.unet(**batch).sample
        errors = F.mse_loss(prediction.float(), noise, reduction="none").mean((1, 2, 3))
        return PartialLoss(errors.sum() / BATCH_SIZE, {"error": errors.detach().sum() / BATCH_SIZE}, errors.detach())

    def describe_examples(self, part: BatchPart) -> Sequence[str]:
        return [f"example {position}" for position in _positions(part)]

    def row_parameters(self) -> Sequence[Parameter]:
        return [p for module in self.unet.per_task_modules_by_name().values() for p in module.parameters()]

    def trained_rows(self, step: int) -> Sequence[int]:
        return sorted({_task(step, position) for position in range(BATCH_SIZE)})

    def sharding_units(self) -> Sequence[nn.Module]:
        return list(self.unet.routed_blocks_by_name().values())


def _positions(part: BatchPart) -> range:
    size = BATCH_SIZE // part.count
    return range(part.index * size, (part.index + 1) * size)


def _task(step: int, position: int) -> int:
    return (2 * step + position % 2) % 4


def _load_examples(part: BatchPart) -> dict[str, Any]:
    examples = []
    for position in _positions(part):
        generator = torch.Generator().manual_seed(1000 * part.step + position)
        random = functools.partial(torch.randn, generator=generator)
        examples.append(
            {
                "sample": random(8, 8, 12),
                "timestep": torch.randint(0, 1000, (), generator=generator),
                "encoder_hidden_states": random(5, 16),
                "text_embeds": random(16),
                "time_ids": random(6),
                "noise": random(4, 8, 12),
                "task_ids": torch.tensor(_task(part.step, position)),
            }
        )
    batch: dict[str, Any] = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    batch["added_cond_kwargs"] = {name: batch.pop(name) for name in ("text_embeds", "time_ids")}
    return {**batch, "step": part.step}


def _unet() -> mtu.MTUUNet2DConditionModel:
    """A tiny XL UNet with the same random weights in each process. It is built faster than upcycled."""
    torch.manual_seed(0)
    experts = {"num_experts": 2, "expert_ratio": 0.5, "routing_scale": 2.0, "router_width": 16}
    return mtu.MTUUNet2DConditionModel(tasks=SDXL_TASKS, **experts, **tiny.SDXL).eval()


def config(**changes: Any) -> TrainerConfig:
    """Settings of a short training that has all kinds of state."""
    settings = {"steps": STEPS, "learning_rate": 1e-2, "ema_decay": 0.9, "checkpoint_every": 2, "log_every": 1}
    # A larger denominator keeps rounding from deciding the sign of steps along gradients near zero.
    settings["epsilon"] = 1e-3
    return TrainerConfig(**{**settings, **changes})


def train(
    directory: Path | None,
    changes: dict[str, Any],
    stop_at: int | None = None,
    *,
    resume: bool = False,
    frozen_dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Train a tiny XL UNet in this process and those connected to it, and return the logged losses."""
    objective = NoisePrediction(_unet(), stop_at)
    for parameter in objective.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(frozen_dtype)
    with contextlib.suppress(Interruption):
        return [entry.loss for entry in Trainer(objective, config(**changes), directory).train(resume=resume)]
    return []


def train_with_and_without_interruption(
    directory: Path, changes: dict[str, Any], frozen_dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Train twice: in the folder `unbroken`, and in `resumed` with an interruption in the last step.

    Other processes than the main one have folders of their own, as on other machines.
    """
    if torch.distributed.get_rank() > 0:
        directory = directory / f"machine-{torch.distributed.get_rank()}"
    losses = train(directory / "unbroken", changes, frozen_dtype=frozen_dtype)
    train(directory / "resumed", changes, stop_at=STEPS - 1, frozen_dtype=frozen_dtype)
    return losses, train(directory / "resumed", changes, resume=True, frozen_dtype=frozen_dtype)


def end_of_training(directory: Path, actions: dict[int, dict[int, str]], **changes: Any) -> tuple[str, str]:
    """Train, and return the name and the message of the error that ends it in this process.

    Args:
        directory: the folder of the training.
        actions: what happens in a step: by process and step, a key of `ACTIONS`.
        **changes: changes of the settings.
    """
    process = torch.distributed.get_rank()
    objective = NoisePrediction(_unet())
    objective.actions = {
        step: functools.partial(ACTIONS[name], objective) for step, name in actions.get(process, {}).items()
    }
    try:
        Trainer(objective, config(**changes), directory).train()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "none", ""


def error_of_different_seeds(directory: Path | None) -> str:
    """Train with another seed in each process, and return the message of the error."""
    try:
        train(directory, {"seed": torch.distributed.get_rank()})
    except ValueError as error:
        return str(error)
    return ""


def _spoil(objective: NoisePrediction) -> None:
    """Let the loss of this process be NaN."""
    with torch.no_grad():
        objective.unet.conv_out.bias.fill_(float("nan"))


def _fill_disk(objective: NoisePrediction) -> None:
    """Let every later file of tensors fail as on a full disk."""

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    storage.save_file = fail


ACTIONS: dict[str, Callable[[NoisePrediction], None]] = {
    "terminate": lambda objective: os.kill(os.getpid(), signal.SIGTERM),
    "spoil": _spoil,
    "fill disk": _fill_disk,
}


def read_sharded_model() -> bool:
    """Whether the values of a sharded model, and what it computes, are those of the whole one."""
    unet = _unet()
    inputs = {**tiny.inputs(unet), "task_ids": torch.tensor([0, 1, 2, 3, 0])}
    objective = NoisePrediction(copy.deepcopy(unet))
    accelerator = distributed.make_accelerator()
    distributed.share_objective(accelerator, objective, fully_shard=True)
    whole = distributed.copy_whole_model(accelerator, objective.unet)
    with torch.no_grad():
        equal = torch.equal(objective.unet(**inputs).sample, unet(**inputs).sample)
    equal &= torch.equal(objective.unet.router_weights(), unet.router_weights())
    if whole is None:
        return equal and not accelerator.is_main_process
    states = whole.state_dict(), unet.state_dict()
    return equal and states[0].keys() == states[1].keys() and all(map(torch.equal, *(s.values() for s in states)))


def tensors_of_checkpoint(directory: Path, step: int = STEPS) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    return storage.read_description_and_tensors(directory / "checkpoints", f"step-{step:08d}")[1]


def digests_of_checkpoint(directory: Path, step: int = STEPS) -> dict[str, str]:
    """The SHA-256 of each tensor of a checkpoint, by name."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors_of_checkpoint(directory, step).items()
    }
