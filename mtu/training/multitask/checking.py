"""What a pipeline, data sets and settings must fulfil to be trained together, checked before anything changes."""

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from mtu.compat import parameter_access
from mtu.data.task_dataset import TaskDataset
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.pipelines import MTUPipeline
from mtu.pipelines.conversion import check_pipeline_not_offloaded
from mtu.training.multitask.batches import TrainedTask
from mtu.training.multitask.multitask_config import MultiTaskConfig

__all__ = ["check_pipeline", "trained_tasks", "training_scheduler"]


def check_pipeline(pipeline: MTUPipeline | StableDiffusionXLPipeline, config: MultiTaskConfig) -> None:
    """Raise a ValueError unless the pipeline can be trained with these settings."""
    if not isinstance(pipeline.unet, MTUUNet2DConditionModel):
        raise ValueError(
            f"This pipeline holds a {type(pipeline.unet).__name__}, but an upcycled UNet is needed: mtu.upcycle(pipe)."
        )
    parameter_access.check_trainable(pipeline.unet, "MultiTaskObjective")
    check_pipeline_not_offloaded(pipeline)
    dtypes = {parameter.dtype for parameter in pipeline.unet.parameters() if parameter.is_floating_point()}
    if config.precision == "no" and len(dtypes) > 1:
        raise ValueError(
            f"Parameters of several dtypes ({', '.join(sorted(map(str, dtypes)))}) compute together by autocast alone: "
            "choose precision='bf16', or one dtype."
        )
    if pipeline.vae.config.get("latents_mean") is not None:
        raise ValueError("This VAE normalizes its latents by latents_mean, which is not supported.")
    factor = pipeline.vae_scale_factor
    if any(edge % factor for edge in config.height_and_width):
        raise ValueError(f"resolution must be a multiple of {factor} pixels, but got {config.resolution}.")
    for kind in ("latent_cache", "text_cache"):
        if getattr(config, kind) == "disk" and config.cache_directory is None:
            raise ValueError(f"{kind}='disk' needs a cache_directory: name a folder, or choose 'memory' or 'none'.")
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
    if (pipeline.unet.config.addition_embed_type == "text_time") != is_xl:
        raise ValueError(
            f"A {type(pipeline).__name__} does not give its UNet the inputs that it needs "
            f"(addition_embed_type={pipeline.unet.config.addition_embed_type!r})."
        )


def trained_tasks(
    pipeline: MTUPipeline | StableDiffusionXLPipeline, datasets: Mapping[str, TaskDataset], config: MultiTaskConfig
) -> list[TrainedTask]:
    """The tasks with data in the order of the model. Raise a ValueError unless they can be trained."""
    if not datasets:
        raise ValueError("There is nothing to train on: expected a data set of at least one task.")
    for name in datasets:
        pipeline.unet.task_index(name)  # raises for an unknown task
    for field in ("shares", "loss_weights"):
        unknown = [name for name in getattr(config, field) if name not in datasets]
        if unknown:
            raise ValueError(f"{field} names the task {unknown[0]!r}, but there are data for {list(datasets)} alone.")
    channels = pipeline.vae.config.latent_channels
    tasks = []
    for index, spec in enumerate(pipeline.unet.tasks):
        if spec.name not in datasets:
            continue
        if spec.condition_channels not in (0, channels):
            raise ValueError(
                f"Task {spec.name!r} reads {spec.condition_channels} condition channels, but an image has {channels} "
                "latent channels."
            )
        if len(datasets[spec.name]) == 0:
            raise ValueError(f"Task {spec.name!r} has no examples: give it some, or leave it out.")
        tasks.append(TrainedTask(spec, index, datasets[spec.name]))
    return tasks


def training_scheduler(pipeline: MTUPipeline | StableDiffusionXLPipeline, config: MultiTaskConfig) -> DDPMScheduler:
    """The noise schedule of the training. Raise a ValueError if the prediction type does not suit it."""
    stock = pipeline.scheduler.config
    changes: dict[str, Any] = {}
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.rescale_betas_zero_snr:
        changes["rescale_betas_zero_snr"] = True
    scheduler = DDPMScheduler.from_config(stock, **changes)
    assert isinstance(scheduler, DDPMScheduler)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"Training predicts 'epsilon' or 'v_prediction', but got {kind!r}.")
    if kind == "epsilon" and scheduler.alphas_cumprod.min() <= 0:
        raise ValueError(
            "Training that predicts 'epsilon' needs a signal at every timestep, but this schedule ends in noise "
            "alone (rescale_betas_zero_snr): predict 'v_prediction', or use another schedule."
        )
    return scheduler
