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

Data sets are in `mtu.data`, and complete trainings in `mtu.recipes`.
"""

from mtu.training.fit_config import FitConfig
from mtu.training.loss_log import LogEntry
from mtu.training.objective import BatchPart, Objective, PartialLoss
from mtu.training.trainer import Trainer
from mtu.training.trainer_config import TrainerConfig
from mtu.training.training_loop import fit

__all__ = ["BatchPart", "FitConfig", "LogEntry", "Objective", "PartialLoss", "Trainer", "TrainerConfig", "fit"]
