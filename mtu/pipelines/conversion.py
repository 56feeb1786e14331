"""Making a pipeline from another one, with another UNet and perhaps of another class.

`mtu.upcycle` makes multi-task pipelines so, and `MTUPipeline.export_task` makes stock ones.
"""

import inspect
from typing import TypeVar

from diffusers import DiffusionPipeline, UNet2DConditionModel

from mtu.compat.private_interfaces import (
    CONFIG_METADATA_KEYS,
    is_pipeline_offloaded,
    pipeline_attributes_outside_config,
)

__all__ = ["check_pipeline_not_offloaded", "pipeline_with_class_and_unet"]

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def check_pipeline_not_offloaded(pipeline: DiffusionPipeline) -> None:
    """Raise a ValueError if a pipeline is offloaded, because its hooks would go on moving its old UNet."""
    if is_pipeline_offloaded(pipeline):
        raise ValueError(
            "A pipeline that is not offloaded is needed, but this one is: call its remove_all_hooks() before, and "
            "offload the new pipeline."
        )


def pipeline_with_class_and_unet(
    pipeline: DiffusionPipeline, pipeline_class: type[Pipeline], unet: UNet2DConditionModel
) -> Pipeline:
    """Make a pipeline of another class from a pipeline, with another UNet.

    Args:
        pipeline: the pipeline whose other components, configuration and settings the new one shares.
        pipeline_class: the class of the new pipeline. Components that its constructor does not take are left out.
        unet: the UNet of the new pipeline.

    Returns:
        The new pipeline.
    """
    accepted = inspect.signature(pipeline_class.__init__).parameters
    arguments = {
        **pipeline.components,
        "unet": unet,
        "requires_safety_checker": pipeline.config.requires_safety_checker,
    }
    converted = pipeline_class(**{name: value for name, value in arguments.items() if name in accepted})
    vars(converted).update(pipeline_attributes_outside_config(pipeline))
    known = {*CONFIG_METADATA_KEYS, *converted.config}
    converted.register_to_config(**{name: value for name, value in pipeline.config.items() if name not in known})
    return converted
