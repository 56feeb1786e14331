"""`MultiTaskConfig`: the settings of the multi-task objective."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

__all__ = ["MultiTaskConfig"]

CacheKind = Literal["disk", "memory", "none"]

_CHOICES = {
    "prediction_type": (None, "epsilon", "v_prediction"),
    "latent_sampling": ("sample", "mode"),
    "latent_cache": ("disk", "memory", "none"),
    "text_cache": ("disk", "memory", "none"),
}


@dataclass(frozen=True)
class MultiTaskConfig:
    """The settings of `MultiTaskObjective`. The metadata of each field describe it.

    Raises:
        ValueError: a setting is out of its range.
    """

    batch_size: int = field(
        default=16, metadata={"help": "Number of examples in a step, over all processes and accumulation steps."}
    )
    resolution: int | tuple[int, int] = field(
        default=512,
        metadata={"help": "Height and width in pixels to which images are resized and cropped: a number, or a pair."},
    )
    shares: Mapping[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Examples of each task in proportion to those of the others; a task that is not named has 1."
        },
    )
    loss_weights: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "Factor of each task's loss; a task that is not named has 1."}
    )
    conditioning_dropout_prob: float = field(
        default=0.05,
        metadata={
            "help": "Fraction of examples that lose their prompt; with dual guidance, as many lose the image, or both."
        },
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "γ of min-SNR loss weights, such as 5.0; null weighs all timesteps alike."}
    )
    max_inverse_snr: float = field(
        default=0.0,
        metadata={"help": "Cap of a second loss weight, 1 / SNR, which lifts the noisiest timesteps; 0 leaves it out."},
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = field(
        default=None,
        metadata={"help": "What the UNet predicts, epsilon or v_prediction; null takes it from the model's scheduler."},
    )
    rescale_betas_zero_snr: bool = field(
        default=False,
        metadata={"help": "Whether the noise schedule is rescaled to end in noise alone, which needs v_prediction."},
    )
    latent_sampling: Literal["sample", "mode"] = field(
        default="sample",
        metadata={"help": "Whether target latents are drawn from the VAE's distribution (sample), or are its mode."},
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Whether half of the examples are mirrored, condition and target alike."}
    )
    precision: Literal["no", "bf16"] = field(
        default="no", metadata={"help": "Precision of computing: bf16 by autocast, or that of the weights (no)."}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Whether activations are computed again in the backward pass, which saves memory."},
    )
    loss_threads: int = field(
        default=1,
        metadata={"help": "Number of CPU threads that each compute an equal part of the loss, for small models."},
    )
    latent_cache: CacheKind = field(
        default="disk", metadata={"help": "Where encoded images are kept: on disk, in memory, or nowhere (none)."}
    )
    text_cache: CacheKind = field(
        default="disk",
        metadata={
            "help": "Where encoded prompts are kept: on disk, in memory, or nowhere (none); one takes 0.24 MB with "
            "SD 1.5, and 0.64 MB with SDXL."
        },
    )
    cache_directory: Path | str | None = field(
        default=None,
        metadata={"help": "Folder of the caches on disk; mtu train keeps them in its output folder by default."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of examples, timesteps, noise and dropout."})

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("loss_threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if not _is_integer(value) or value < least:
                raise ValueError(f"{name} must be an integer ≥ {least}, but got {value!r}.")
        if self.batch_size % self.loss_threads:
            raise ValueError(f"loss_threads must divide batch_size = {self.batch_size}, but got {self.loss_threads}.")
        edges = self.resolution if isinstance(self.resolution, Sequence) else (self.resolution,) * 2
        if len(edges) != 2 or not all(_is_integer(edge) and edge > 0 for edge in edges):
            raise ValueError(f"resolution must be a positive integer or a pair of them, but got {self.resolution!r}.")
        for name in ("shares", "loss_weights"):
            for task, value in getattr(self, name).items():
                if not _is_number(value) or value <= 0:
                    raise ValueError(f"{name} must be positive numbers, but got {value!r} for task {task!r}.")
        if not _is_number(self.conditioning_dropout_prob) or not 0 <= self.conditioning_dropout_prob <= 1 / 3:
            raise ValueError(
                "conditioning_dropout_prob must lie in [0, 1/3], because dual guidance drops three times this "
                f"fraction, but got {self.conditioning_dropout_prob!r}."
            )
        if self.snr_gamma is not None and (not _is_number(self.snr_gamma) or self.snr_gamma <= 0):
            raise ValueError(f"snr_gamma must be a positive number or None, but got {self.snr_gamma!r}.")
        if not _is_number(self.max_inverse_snr) or self.max_inverse_snr < 0:
            raise ValueError(f"max_inverse_snr must be a number ≥ 0, but got {self.max_inverse_snr!r}.")
        if self.precision not in ("no", "bf16"):
            raise ValueError(
                f"precision must be 'no' or 'bf16', but got {self.precision!r}: float16 would need loss scaling, which "
                "skips steps and so changes what a resumed training computes."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, but got {getattr(self, name)!r}.")

    @property
    def height_and_width(self) -> tuple[int, int]:
        """The resolution as a pair."""
        if isinstance(self.resolution, Sequence):
            return self.resolution[0], self.resolution[1]
        return self.resolution, self.resolution

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the loss of a step, as JSON values.

        Those are left out that change nothing, or the order of summation alone. `precision` is no such setting: a step
        in bfloat16 has other numbers. Nor is `loss_threads` where a UNet has dropout layers, whose masks then depend on
        the order of the threads; it is left out all the same, because the UNets of Stable Diffusion and SDXL have none.
        """
        how = {"gradient_checkpointing", "loss_threads", "latent_cache", "text_cache", "cache_directory"}
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in how}
        return {
            **values,
            "resolution": list(self.height_and_width),
            "shares": dict(self.shares),
            "loss_weights": dict(self.loss_weights),
        }


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
