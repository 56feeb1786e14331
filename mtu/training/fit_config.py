"""The settings of a training, and the learning rate that they give to each step."""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["FitConfig", "learning_rate_at"]


@dataclass(frozen=True)
class FitConfig:
    """The settings of a training.

    Attributes:
        steps: number of optimizer steps; an upper limit if `minutes` is given.
        learning_rate: highest learning rate, reached after the warm-up.
        warmup_steps: steps of linear warm-up.
        schedule: "cosine" lets the rate fall to zero at the end of training; "constant" keeps it.
        weight_decay: AdamW's weight decay, for the weights of linear layers and convolutions only.
        max_grad_norm: norm to which larger gradients are scaled down; None: gradients stay as they are.
        ema_decay: decay of the exponential moving average of the weights; None: no average is kept.
        betas: AdamW's momentum coefficients.
        checkpoint_every: steps from one checkpoint to the next.
        log_every: steps from one logged loss to the next.
        minutes: wall-clock limit. The cosine schedule then follows the clock, so that the rate still ends at zero.
        seed: seed of torch's global generators, set before the first step.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    checkpoint_every: int = 500
    log_every: int = 50
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1 or self.log_every < 1:
            raise ValueError("FitConfig: steps, checkpoint_every and log_every must each be at least 1.")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"FitConfig: minutes must be a positive number, got {self.minutes}.")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"FitConfig: unknown schedule {self.schedule!r}; choose constant or cosine.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"FitConfig: ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if self.warmup_steps < 0:
            raise ValueError(f"FitConfig: warmup_steps must be at least 0, got {self.warmup_steps}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"FitConfig: max_grad_norm must be a positive number or None, got {self.max_grad_norm}.")


def learning_rate_at(step: int, seconds: float, config: FitConfig) -> float:
    """Compute the learning rate of a step.

    Args:
        step: number of steps made before this one.
        seconds: training time before this step. It has an effect only if the configuration limits the minutes.
        config: the settings of the training.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warmup
    progress = step / config.steps
    if config.minutes is not None:
        progress = max(progress, seconds / (60 * config.minutes))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
