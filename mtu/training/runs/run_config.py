"""The settings of a training that `mtu train` runs: one declaration for each YAML key, each flag and the documentation.

The keys of a YAML file are flat: the fields of `RunConfig`, and beside them those of its two parts, `TrainerConfig` and
`MultiTaskConfig`. `settings_file` reads them.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from mtu.training.multitask.multitask_config import MultiTaskConfig
from mtu.training.runs.typed_values import field_types, nearest_name_hint
from mtu.training.trainer_config import TrainerConfig

__all__ = ["DataSource", "RunConfig", "Setting", "UpcycleConfig", "ValidationConfig", "settings_by_key"]


@dataclass(frozen=True)
class DataSource:
    """Where the examples of one task come from: a folder, or the icons that `mtu.data.icons` draws.

    Attributes:
        folder: a folder with images and `metadata.jsonl` (see `ImageFolder`).
        icons: the number of examples of the icon data set.
        split: the split of the icons.
        seed: the seed of the icons.

    Raises:
        ValueError: there must be exactly one of `folder` and `icons`.
    """

    folder: Path | None = None
    icons: int | None = None
    split: Literal["train", "validation", "test"] = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.icons is None):
            raise ValueError("expected either a folder or a number of icons.")
        if self.icons is not None and self.icons < 1:
            raise ValueError(f"icons must be at least 1, but got {self.icons}.")

    @classmethod
    def from_text(cls, text: str) -> "DataSource":
        """Parse "icons:COUNT"; any other text is a folder."""
        name, _, count = text.partition(":")
        if name == "icons" and count.isdigit():
            return cls(icons=int(count))
        return cls(folder=Path(text).expanduser())


@dataclass(frozen=True)
class UpcycleConfig:
    """The arguments of `mtu.upcycle`; None: its default, and for `seed` that of the run."""

    num_experts: int | None = None
    top_k: int | None = None
    expert_ratio: float | None = None
    norm: Literal["task", "task_expert"] | None = None
    init: Literal["preserve", "paper"] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ValidationConfig:
    """The pictures that a training makes of fixed examples.

    Attributes:
        examples: the number of examples of each task; 0: no pictures.
        data: the examples of tasks, by task; tasks that are missing here show rows of their training data.
        inference_steps: denoising steps; None: the tasks' own numbers.
        seed: the seed of the noise that all pictures start from.
    """

    examples: int = 4
    data: Mapping[str, DataSource] = field(default_factory=dict)
    inference_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ValueError(f"examples must be at least 0, but got {self.examples}.")
        if self.inference_steps is not None and self.inference_steps < 1:
            raise ValueError(f"inference_steps must be at least 1, but got {self.inference_steps}.")


@dataclass(frozen=True)
class RunConfig:
    """The settings of one training from a base model and data to a finished pipeline.

    Args:
        trainer: how the trainer optimises, saves and logs. Where `epochs` is given, its `steps` have no meaning.
        objective: what a step computes.

    The metadata of each other field describe it in a sentence.

    Raises:
        ValueError: settings contradict each other.
    """

    model: str = field(
        metadata={"help": "The folder of a Stable Diffusion, SDXL or MTU pipeline; or icons, the shipped base model."}
    )
    output: Path = field(metadata={"help": "The folder of checkpoints, log, pictures and the finished pipeline."})
    trainer: TrainerConfig
    objective: MultiTaskConfig
    data: Mapping[str, DataSource] = field(
        default_factory=dict, metadata={"help": "The examples of each task: a folder, or icons:COUNT."}
    )
    tasks: tuple[str | Mapping[str, Any], ...] | None = field(
        default=None, metadata={"help": "The tasks of the model, by name or, in YAML, by their fields; null: as data."}
    )
    upcycle: UpcycleConfig = field(
        default_factory=UpcycleConfig, metadata={"help": "Arguments of mtu.upcycle, such as num_experts=4."}
    )
    backend: Literal["auto", "eager", "triton", "cpp", "reference"] = field(
        default="auto", metadata={"help": "The implementation of the feed-forward networks."}
    )
    frozen_dtype: Literal["bfloat16"] | None = field(
        default=None, metadata={"help": "The dtype of the UNet's frozen weights in training; null: float32."}
    )
    epochs: float | None = field(
        default=None,
        metadata={"help": "Length of the training instead of steps; one epoch has as many examples as there are rows."},
    )
    validation: ValidationConfig = field(
        default_factory=ValidationConfig, metadata={"help": "The pictures of a validation, such as examples=4."}
    )

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs must be a positive number, but got {self.epochs:g}.")
        if self.frozen_dtype is not None and self.objective.precision != "bf16":
            raise ValueError(
                f"frozen_dtype: {self.frozen_dtype} needs precision: bf16, but got precision: "
                f"{self.objective.precision}: without autocast, weights of two dtypes do not work together."
            )
        if self.objective.prediction_type == "epsilon" and self.objective.rescale_betas_zero_snr:
            raise ValueError(
                "prediction_type: epsilon needs a signal at every timestep, but rescale_betas_zero_snr: true ends the "
                "schedule in noise alone: choose prediction_type: v_prediction, or leave the schedule as it is."
            )
        if self.trainer.fully_shard and self.objective.loss_threads > 1:
            raise ValueError(
                f"fully_shard needs loss_threads: 1, but got {self.objective.loss_threads}: each block gathers its "
                "weights for one thread at a time."
            )
        names = {task if isinstance(task, str) else task.get("name") for task in self.tasks or ()}
        if self.tasks is not None:
            _check_tasks_have_data(names, self.data)
        for key in ("shares", "loss_weights"):
            _check_names(key, getattr(self.objective, key), self.data)
        _check_names("validation: data", self.validation.data, self.data)

    @property
    def upcycle_seed(self) -> int:
        """The seed of the initial values of routers and task embedding."""
        return self.trainer.seed if self.upcycle.seed is None else self.upcycle.seed

    def count_steps(self, rows: int) -> int:
        """The number of optimizer steps: `steps`, or ⌈epochs · rows / batch_size⌉.

        Args:
            rows: the number of rows of all tasks together.
        """
        if self.epochs is None:
            return self.trainer.steps
        return max(1, math.ceil(self.epochs * rows / self.objective.batch_size))

    def to_yaml(self) -> str:
        """The settings as a YAML file that runs again, from any directory."""
        values = {key: _plain(value) for key, value in self._values_by_key().items()}
        if self.epochs is not None:
            del values["steps"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)

    def _values_by_key(self) -> dict[str, Any]:
        own = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("trainer", "objective")
        }
        own["model"] = self.model if not Path(self.model).is_dir() else Path(self.model)
        parts = (self.trainer, self.objective)
        return own | {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}


class Setting(NamedTuple):
    """One setting of a training, as YAML key and as flag.

    Attributes:
        key: the key in YAML; the flag is `--` and the key with hyphens.
        annotation: its type.
        default: its default; `dataclasses.MISSING` if it must be given.
        help: one sentence.
        section: the heading under which `mtu train --help` lists it.
    """

    key: str
    annotation: Any
    default: Any
    help: str
    section: str

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return f"--{self.key.replace('_', '-')}"


@cache
def settings_by_key() -> dict[str, Setting]:
    """All settings by their key, in the order in which help lists them."""
    sections = {"Model and data": RunConfig, "Training": TrainerConfig, "Loss and encoding": MultiTaskConfig}
    found: dict[str, Setting] = {}
    for section, part in sections.items():
        types = field_types(part)
        for f in dataclasses.fields(part):
            if f.name in ("trainer", "objective") or f.name in found:
                continue
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            # Both parts have a seed, and one setting serves them.
            help_text = "Seed of everything random." if f.name == "seed" else f.metadata["help"]
            found[f.name] = Setting(f.name, types[f.name], default, help_text, section)
    return found


def _check_tasks_have_data(names: set[Any], data: Mapping[str, DataSource]) -> None:
    missing, unknown = sorted(names - set(data), key=str), sorted(set(data) - names)
    if missing and data:
        nearest = difflib.get_close_matches(str(missing[0]), unknown or data, n=1)
        others = f", and there are data for {unknown[0]!r}, which is not among the tasks" if unknown else ""
        advice = (
            f"the nearest one is {nearest[0]!r}." if nearest else "give it some under data, or take it out of tasks."
        )
        raise ValueError(f"Task {missing[0]!r} has no data{others}: {advice}")
    if unknown:
        hint = nearest_name_hint(unknown[0], map(str, names))
        raise ValueError(f"There are data for {unknown[0]!r}, which is not among the tasks: {hint}.")


def _check_names(key: str, given: Mapping[str, Any], data: Mapping[str, DataSource]) -> None:
    unknown = [name for name in given if name not in data]
    if unknown and data:
        raise ValueError(f"{key} names {unknown[0]!r}, which has no data: {nearest_name_hint(unknown[0], data)}.")


def _plain(value: Any) -> Any:
    """A value as `yaml.safe_dump` takes it; paths become absolute, so that the file runs from any directory."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, DataSource):
        values = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: _plain(own) for f, own in values if own != f.default}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
