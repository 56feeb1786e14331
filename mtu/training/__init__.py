"""Training: one trainer for every objective, and the multi-task objective.

- `trainer`: the loop, `Trainer`.
- `trainer_config`: its settings, `TrainerConfig`.
- `objective`: the interface of what it minimises, `Objective`.
- `multitask`: the loss of the paper, an objective over data sets of images.
- `optimizer`: parameter groups, the rows of tasks, and the learning rate.
- `batch_loader`: the loading of batches, in this process or in workers.
- `training_state`: the state that checkpoints save and restore.
- `checkpoints`: atomic checkpoints in a directory, the check that they belong to a training, and the directory's lock.
- `distributed`: what several processes do together.
- `step_totals`: what they tell each other in a step.
- `numerical_faults`: the description of a step that is not finite.
- `interruption`: signals that end a training after its step.
- `loss_log`: the losses of a training, in memory, in `log.jsonl` and for TensorBoard.
- `precision`: autocast, and the check of parameters' dtypes.
- `runs`: complete trainings from a configuration, which `mtu train` runs.

Data sets are in `mtu.data`, and complete recipes in `mtu.recipes`. Names are loaded at their first use, so that the
settings of a training can be read without waiting for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtu.training.loss_log import LogEntry
    from mtu.training.multitask.multitask_config import MultiTaskConfig
    from mtu.training.multitask.objective import MultiTaskObjective
    from mtu.training.objective import BatchPart, Objective, PartialLoss
    from mtu.training.runs.run import run_training
    from mtu.training.runs.settings_file import read_run_config
    from mtu.training.trainer import Trainer
    from mtu.training.trainer_config import TrainerConfig

__all__ = [
    "BatchPart",
    "LogEntry",
    "MultiTaskConfig",
    "MultiTaskObjective",
    "Objective",
    "PartialLoss",
    "Trainer",
    "TrainerConfig",
    "read_run_config",
    "run_training",
]

_MODULES = {
    "BatchPart": "mtu.training.objective",
    "LogEntry": "mtu.training.loss_log",
    "MultiTaskConfig": "mtu.training.multitask.multitask_config",
    "MultiTaskObjective": "mtu.training.multitask.objective",
    "Objective": "mtu.training.objective",
    "PartialLoss": "mtu.training.objective",
    "Trainer": "mtu.training.trainer",
    "TrainerConfig": "mtu.training.trainer_config",
    "read_run_config": "mtu.training.runs.settings_file",
    "run_training": "mtu.training.runs.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
