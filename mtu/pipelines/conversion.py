"""A pipeline made from another one: another UNet, perhaps another class, and all else as it was."""

import inspect
from typing import TypeVar

from diffusers import DiffusionPipeline, UNet2DConditionModel

from mtu.compat.private_interfaces import is_pipeline_offloaded, pipeline_settings

__all__ = ["check_not_offloaded", "convert_pipeline"]

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def check_not_offloaded(pipeline: DiffusionPipeline) -> None:
    """Raise a ValueError if a pipeline is offloaded: its hooks would go on moving the UNet that it had."""
    if is_pipeline_offloaded(pipeline):
        raise ValueError(
            "A pipeline that is not offloaded is needed, but this one is: call its remove_all_hooks() before, and "
            "offload the new pipeline."
        )


def convert_pipeline(
    pipeline: DiffusionPipeline, pipeline_class: type[Pipeline], unet: UNet2DConditionModel
) -> Pipeline:
    """The pipeline of another class with another UNet; it keeps the other components, configuration and settings."""
    accepted = inspect.signature(pipeline_class.__init__).parameters
    given = {**pipeline.components, "unet": unet, "requires_safety_checker": pipeline.config.requires_safety_checker}
    made = pipeline_class(**{name: value for name, value in given.items() if name in accepted})
    vars(made).update(pipeline_settings(pipeline))
    own = {"_class_name", "_diffusers_version", "_module", *made.config}
    made.register_to_config(**{name: value for name, value in pipeline.config.items() if name not in own})
    return made
