"""The settings of a training that any objective has: steps, optimizer, precision of the average, files and processes.

Each field says in its metadata what it does, in one sentence. The flags of the command line and the documentation are
made of these sentences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["TrainerConfig"]

_LEAST_INTEGERS = {
    "steps": 1,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,
    "num_workers": 0,
    "checkpoint_every": 1,
    "checkpoints_total_limit": 1,
    "log_every": 1,
    "validate_every": 1,
    "seed": 0,
}


def _choice(default: Any, description: str) -> Any:
    """A field with a default, whose metadata hold its description."""
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class TrainerConfig:
    """The settings of a training; each field's metadata describe it.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> config = TrainerConfig(steps=1000, learning_rate=5e-5, ema_decay=0.999)
        >>> {f.name: f.metadata["help"] for f in dataclasses.fields(config)}["steps"]
        'Number of optimizer steps; an upper limit if max_minutes is given.'
    """

    steps: int = field(metadata={"help": "Number of optimizer steps; an upper limit if max_minutes is given."})
    learning_rate: float = _choice(1e-4, "Highest learning rate, reached after the warm-up.")
    warmup_steps: int = _choice(0, "Steps of linear warm-up.")
    schedule: Literal["constant", "cosine"] = _choice(
        "constant", "Course of the learning rate after the warm-up: constant, or cosine, which ends at zero."
    )
    optimizer: Literal["adamw", "adamw8bit"] = _choice(
        "adamw", "AdamW of PyTorch, or that of bitsandbytes with states of 8 bits."
    )
    weight_decay: float = _choice(0.01, "Weight decay of the weights of linear layers and convolutions.")
    betas: tuple[float, float] = _choice((0.9, 0.999), "Decay rates of AdamW's averages of gradients and squares.")
    epsilon: float = _choice(1e-8, "Number that AdamW adds to its denominator.")
    max_grad_norm: float | None = _choice(
        1.0, "Norm to which larger gradients are scaled down; null leaves them as they are."
    )
    ema_decay: float | None = _choice(
        None, "Decay of the exponential moving average of the trained weights; null keeps no average."
    )
    gradient_accumulation_steps: int = _choice(
        1, "Number of passes in which each process computes its part of the batch, to save memory."
    )
    fully_shard: bool = _choice(False, "Whether the processes share out the weights and the optimizer's state (FSDP).")
    num_workers: int = _choice(0, "Number of worker processes that load batches, for each training process.")
    checkpoint_every: int = _choice(500, "Steps from one checkpoint to the next.")
    checkpoints_total_limit: int | None = _choice(2, "Number of checkpoints to keep; null keeps all.")
    log_every: int = _choice(50, "Steps from one entry of the log to the next.")
    validate_every: int | None = _choice(None, "Steps from one validation to the next; null validates never.")
    tensorboard: bool = _choice(False, "Whether the log is written for TensorBoard, too.")
    max_minutes: float | None = _choice(
        None, "Wall-clock limit; a cosine schedule then follows the clock, so that the rate still ends at zero."
    )
    seed: int = _choice(0, "Seed of the random numbers that modules draw in training, such as dropout.")

    def __post_init__(self) -> None:
        for name, least in _LEAST_INTEGERS.items():
            value, expected = getattr(self, name), f"an integer ≥ {least}"
            if name in ("checkpoints_total_limit", "validate_every"):
                self._check(name, value is None or (_is_integer(value) and value >= least), f"{expected}, or None")
            else:
                self._check(name, _is_integer(value) and value >= least, expected)
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and value > 0, "a positive number")
        for name in ("max_grad_norm", "max_minutes"):
            value = getattr(self, name)
            self._check(name, value is None or (_is_number(value) and value > 0), "a positive number or None")
        for name in ("fully_shard", "tensorboard"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        self._check("weight_decay", _is_number(self.weight_decay) and self.weight_decay >= 0, "a number ≥ 0")
        self._check("schedule", self.schedule in ("constant", "cosine"), "constant or cosine")
        self._check("optimizer", self.optimizer in ("adamw", "adamw8bit"), "adamw or adamw8bit")
        # bitsandbytes packs several numbers into one state, so parts of a tensor have other states than the whole.
        self._check("optimizer", self.optimizer == "adamw" or not self.fully_shard, "adamw where fully_shard is true")
        self._check("ema_decay", self.ema_decay is None or _is_fraction(self.ema_decay), "None, or a number in [0, 1)")
        is_pair = isinstance(self.betas, Sequence) and len(self.betas) == 2
        self._check("betas", is_pair and all(map(_is_fraction, self.betas)), "two numbers in [0, 1)")

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, but got {getattr(self, name)!r}.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1
