"""The settings of a training that any objective has: steps, optimizer, precision of the average, files and processes.

Each field says in its metadata what it does, in one sentence. The flags of the command line and the documentation are
made of these sentences.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["TrainerConfig"]


def _choice(default: Any, description: str) -> Any:
    """A field with a default, whose metadata hold its description."""
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class TrainerConfig:
    """The settings of a training; each field's metadata describe it.

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
        for name in ("steps", "gradient_accumulation_steps", "checkpoint_every", "log_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("checkpoints_total_limit", "validate_every"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or None")
        for name in ("warmup_steps", "num_workers", "weight_decay", "seed"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "epsilon"):
            self._check(name, getattr(self, name) > 0, "a positive number")
        for name in ("max_grad_norm", "max_minutes"):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, "a positive number or None")
        self._check("schedule", self.schedule in ("constant", "cosine"), "constant or cosine")
        self._check("optimizer", self.optimizer in ("adamw", "adamw8bit"), "adamw or adamw8bit")
        # bitsandbytes packs several numbers into one state, so parts of a tensor have other states than the whole.
        self._check("optimizer", self.optimizer == "adamw" or not self.fully_shard, "adamw where fully_shard is true")
        self._check("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "None, or a number in [0, 1)")
        self._check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, but got {getattr(self, name)!r}.")
