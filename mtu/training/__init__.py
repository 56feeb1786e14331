"""Training: one loop for every model of the library, and the multi-task objective.

- `training_loop`: the loop, `fit`.
- `fit_config`: its settings, `FitConfig`, and the learning rate.
- `training_state`: the state that checkpoints save and restore.
- `objective`: the interface of what a training minimises.
- `multitask`: the loss of the paper, over data sets of images.
- `precision`: autocast, and the check of parameters' dtypes.
- `parallel_loss`: a loss whose parts run on several CPU threads.
- `checkpoint`: atomic checkpoints in a directory.
- `loss_log`: the losses of a training, in memory and in `log.jsonl`.

- `runs`: complete trainings from a configuration, which `mtu train` runs.

Data sets are in `mtu.data`, and complete recipes in `mtu.recipes`. Names are loaded at their first use, so that the
settings of a training can be read without waiting for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtu.training.fit_config import FitConfig
    from mtu.training.loss_log import LogEntry
    from mtu.training.multitask.multitask_config import MultiTaskConfig
    from mtu.training.multitask.objective import MultiTaskObjective
    from mtu.training.objective import BatchPart, Objective, PartialLoss
    from mtu.training.runs.run import run_training
    from mtu.training.runs.settings_file import read_run_config
    from mtu.training.trainer import Trainer
    from mtu.training.trainer_config import TrainerConfig
    from mtu.training.training_loop import fit

__all__ = [
    "BatchPart",
    "FitConfig",
    "LogEntry",
    "MultiTaskConfig",
    "MultiTaskObjective",
    "Objective",
    "PartialLoss",
    "Trainer",
    "TrainerConfig",
    "fit",
    "read_run_config",
    "run_training",
]

_MODULES = {
    "BatchPart": "mtu.training.objective",
    "FitConfig": "mtu.training.fit_config",
    "LogEntry": "mtu.training.loss_log",
    "MultiTaskConfig": "mtu.training.multitask.multitask_config",
    "MultiTaskObjective": "mtu.training.multitask.objective",
    "Objective": "mtu.training.objective",
    "PartialLoss": "mtu.training.objective",
    "Trainer": "mtu.training.trainer",
    "TrainerConfig": "mtu.training.trainer_config",
    "fit": "mtu.training.training_loop",
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
