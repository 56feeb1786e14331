"""The multi-task objective: noise or velocity prediction on all tasks at once, over data sets of images.

- `objective`: the loss of the paper, `MultiTaskObjective`.
- `checking`: what pipelines, data and settings must fulfil.
- `multitask_config`: its settings, `MultiTaskConfig`.
- `step_plan`: which example each position of a step's batch holds.
- `batches`: what is random in a batch, and where its tensors come from.
- `encoding`: what the VAE and the text encoders make of images and prompts.
- `precomputing`: encoding before the first step.
- `encoded_cache`: a cache of encoded images and prompts.
- `timesteps`: timesteps, and the weight of each one in the loss.
- `parallel_loss`: a loss whose parts run on several CPU threads.

The loop that minimises the loss is `mtu.training.trainer`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mtu.training.multitask.multitask_config import MultiTaskConfig

if TYPE_CHECKING:
    from mtu.training.multitask.objective import MultiTaskObjective

__all__ = ["MultiTaskConfig", "MultiTaskObjective"]


def __getattr__(name: str) -> Any:
    # The settings can be read without waiting for PyTorch.
    if name != "MultiTaskObjective":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("mtu.training.multitask.objective").MultiTaskObjective
