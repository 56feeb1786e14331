"""MTU: one pre-trained diffusion model upcycled into a model of many tasks."""

# Pipelines accept a UNet class from outside diffusers only if its module also exposes this name.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin

from mtu import tasks
from mtu.pipelines import MTUPipeline
from mtu.tasks import TaskSpec
from mtu.unet import MTUUNet2DConditionModel
from mtu.upcycle import load_trained, upcycle

__all__ = ["MTUPipeline", "MTUUNet2DConditionModel", "TaskSpec", "load_trained", "tasks", "upcycle"]
