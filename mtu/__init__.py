"""MTU: one pre-trained diffusion model upcycled into a model of many tasks.

The public names are listed here and live in the modules beside this file. Names that need torch and diffusers are
loaded at their first use, as diffusers does with its own names.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mtu import tasks
from mtu.tasks import TaskSpec

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin as ModelMixin

    from mtu.models.unet import MTUUNet2DConditionModel
    from mtu.pipelines import MTUPipeline
    from mtu.runtime.compiling import compile, warmup
    from mtu.upcycling import load_trained, upcycle

__all__ = [
    "MTUPipeline",
    "MTUUNet2DConditionModel",
    "TaskSpec",
    "compile",
    "load_trained",
    "tasks",
    "upcycle",
    "warmup",
]

# The module that each name is loaded from. No module of this package may have the name of a public function, because
# importing the module would replace the function.
_MODULES = {
    "MTUPipeline": "mtu.pipelines",
    "MTUUNet2DConditionModel": "mtu.models.unet",
    # Pipelines accept a UNet class from outside diffusers only if its module also exposes this name.
    "ModelMixin": "diffusers.models.modeling_utils",
    "compile": "mtu.runtime.compiling",
    "load_trained": "mtu.upcycling",
    "upcycle": "mtu.upcycling",
    "warmup": "mtu.runtime.compiling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
