"""The model that a training starts from: found and checked without weights, then loaded and upcycled."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from mtu.inspection.inspected_model import BUILT_IN_UNET_CONFIGS, InspectedModel, load_inspected_model
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.pipelines import MTUPipeline
from mtu.tasks import SD_TASKS, SDXL_TASKS, TaskSpec, as_task_specs
from mtu.training.runs.run_config import RunConfig
from mtu.training.runs.typed_values import nearest_name_hint
from mtu.upcycling import upcycle

__all__ = ["BaseModel", "find_base_model", "load_upcycled_pipeline"]

_PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    "MTUPipeline": MTUPipeline,
}


class BaseModel(NamedTuple):
    """A model to train, of which only configurations have been read.

    Attributes:
        name: the model, as the settings name it.
        folder: the folder of its pipeline; None for "sd15" and "sdxl", which are architectures without weights.
        pipeline_class: the class that loads the folder.
        inspected: its UNet.
        tasks: the tasks of the trained model.
    """

    name: str
    folder: Path | None
    pipeline_class: type[DiffusionPipeline]
    inspected: InspectedModel
    tasks: tuple[TaskSpec, ...]

    @property
    def is_xl(self) -> bool:
        """Whether the model belongs to the family of SDXL."""
        return _is_xl(self.inspected)

    def build_unet_without_weights(self, config: RunConfig) -> MTUUNet2DConditionModel:
        """Build the UNet to train on the meta device.

        Raises:
            ValueError: `upcycle` refuses the settings.
        """
        if self.inspected.upcycled_unet is not None:
            return self.inspected.upcycled_unet
        settings = _upcycle_settings(config)
        # Meta tensors have no values to preserve, and only init="paper" does not warn of that.
        return upcycle(self.inspected.build_stock(), self.tasks, **{**settings, "init": "paper", "backend": "eager"})


def find_base_model(config: RunConfig) -> BaseModel:
    """Find the model of a training, and check without reading weights that it can be trained on these tasks.

    Raises:
        ValueError: there is no such pipeline, it cannot be upcycled, or it does not have the tasks.
    """
    folder = _model_folder(config.model)
    if folder is None:
        inspected = load_inspected_model(config.model)
        pipeline_class = StableDiffusionXLPipeline if _is_xl(inspected) else StableDiffusionPipeline
    else:
        pipeline_class = _PIPELINES[_read_pipeline_class(folder)]
        inspected = load_inspected_model(folder)
    model = BaseModel(config.model, folder, pipeline_class, inspected, _resolve_tasks(config, inspected))
    model.build_unet_without_weights(config)
    return model


def load_upcycled_pipeline(model: BaseModel, config: RunConfig) -> MTUPipeline | StableDiffusionXLPipeline:
    """Load the pipeline in float32, with an upcycled UNet on the CPU.

    Raises:
        ValueError: the model is an architecture without weights, or its files are damaged.
        OSError: files are missing.
    """
    if model.folder is None:
        raise ValueError(
            f"The model {model.name!r} names an architecture, which serves --dry-run: training needs the folder of its "
            "pipeline, for example --model stable-diffusion-v1-5."
        )
    pipeline: Any = model.pipeline_class.from_pretrained(
        model.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    if isinstance(pipeline.unet, MTUUNet2DConditionModel):
        pipeline.unet.set_backend(config.backend)
        return pipeline
    settings = _upcycle_settings(config)
    if isinstance(pipeline, StableDiffusionXLPipeline):
        pipeline.register_modules(unet=upcycle(pipeline.unet, model.tasks, **settings))
        return pipeline
    return upcycle(pipeline, model.tasks, **settings)


def _upcycle_settings(config: RunConfig) -> dict[str, Any]:
    given = {key: value for key, value in dataclasses.asdict(config.upcycle).items() if value is not None}
    return {**given, "seed": config.upcycle_seed, "backend": config.backend}


def _is_xl(inspected: InspectedModel) -> bool:
    return inspected.stock_config.get("addition_embed_type") == "text_time"


def _model_folder(name: str) -> Path | None:
    if name in BUILT_IN_UNET_CONFIGS:
        return None
    if name == "icons":
        return Path(str(files("mtu"))) / "assets" / "icons-base"
    return Path(name).expanduser()


def _read_pipeline_class(folder: Path) -> str:
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(
            f"The model {str(folder)!r} holds no model_index.json: expected the folder of a pipeline, or one of "
            f"{', '.join(('icons', *BUILT_IN_UNET_CONFIGS))}."
        )
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{path} is not the index of a pipeline.") from None
    if name not in _PIPELINES:
        raise ValueError(f"{path} describes a {name}, but one of {', '.join(_PIPELINES)} is expected.")
    return name


def _resolve_tasks(config: RunConfig, inspected: InspectedModel) -> tuple[TaskSpec, ...]:
    built_in = SDXL_TASKS if _is_xl(inspected) else SD_TASKS
    if inspected.upcycled_unet is not None:
        return _check_tasks_of_upcycled_model(config, inspected.upcycled_unet)
    by_name = {task.name: task for task in built_in}
    if config.tasks is None and not config.data:
        return built_in
    given = config.tasks
    if given is None:
        unknown = sorted(set(config.data) - set(by_name))
        if unknown:
            raise ValueError(
                f"There are data for {unknown[0]!r}, which is not among the built-in tasks: "
                f"{nearest_name_hint(unknown[0], by_name)}; describe a task of your own under tasks."
            )
        given = tuple(name for name in by_name if name in config.data)
    specs: list[TaskSpec | str] = []
    for task in given:
        if isinstance(task, str):
            specs.append(task)
            continue
        fields, base = dict(task), by_name.get(task.get("name", ""))
        try:
            # A built-in task keeps the fields that are not given.
            specs.append(TaskSpec.from_dict(fields if base is None else {**base.to_dict(), **fields}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"tasks: {error}") from None
    return as_task_specs(specs, built_in)


def _check_tasks_of_upcycled_model(config: RunConfig, unet: MTUUNet2DConditionModel) -> tuple[TaskSpec, ...]:
    given = sorted(key for key, value in dataclasses.asdict(config.upcycle).items() if value is not None)
    if given:
        raise ValueError(
            f"The model {config.model!r} is upcycled already, its layout is fixed: expected no {given[0]} in upcycle."
        )
    names = [task.name for task in unet.tasks]
    for task in (*(config.tasks or ()), *config.data):
        if task not in names:
            raise ValueError(f"The upcycled model {config.model!r} has the tasks {', '.join(names)}, but got {task!r}.")
    return unet.tasks
