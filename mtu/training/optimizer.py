"""The optimizer of a training: its parameter groups, the rows of tasks, and the learning rate of each step.

Some parameters have one row per task. An optimizer step with weight decay or momentum would also move the rows whose
task has no example in the step. So the optimizer gets each row as a parameter of its own, which is a view of the row,
and a row without examples has no gradient.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from mtu.compat.plain_linear import RouterLinear
from mtu.training.trainer_config import TrainerConfig

__all__ = ["build_optimizer", "learning_rate_at", "parameter_groups", "row_name", "row_views"]


def learning_rate_at(step: int, seconds: float, config: TrainerConfig) -> float:
    """Compute the learning rate of a step.

    Args:
        step: number of steps made before this one.
        seconds: training time before this step. It has an effect only if the configuration limits the minutes.
        config: the settings of the training.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warmup
    progress = step / config.steps
    if config.max_minutes is not None:
        progress = max(progress, seconds / (60 * config.max_minutes))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def row_name(name: str, row: int) -> str:
    """The name of a row of a parameter, such as "unet.task_embedding.weight[2]"."""
    return f"{name}[{row}]"


def row_views(parameter: Parameter) -> list[Parameter]:
    """Return each row of a parameter (T, …) as a parameter that shares its memory."""
    if not parameter.is_contiguous():
        # bitsandbytes would replace a row that is not contiguous by a copy.
        parameter.data = parameter.data.contiguous()
    # `detach` shares the counter of in-place changes with the parameter, which `data` does not.
    return [Parameter(row, requires_grad=True) for row in parameter.detach().unbind()]


def parameter_groups(
    module: nn.Module, parameters: Mapping[str, Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into a group with weight decay and a group without.

    Weights of linear layers and convolutions decay. Vectors, embeddings and rows of tasks do not.

    Args:
        module: the module that owns the parameters.
        parameters: the parameters to train, by name. They may be views of the module's own ones.
        weight_decay: weight decay of the first group.

    Returns:
        Parameter groups of an optimizer, without empty ones.
    """
    layers = (nn.Linear, RouterLinear, nn.modules.conv._ConvNd)
    weights = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, layers)}
    decayed, kept = [], []
    for name, parameter in parameters.items():
        (decayed if name in weights else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, parameters: Mapping[str, Parameter], config: TrainerConfig
) -> torch.optim.Optimizer:
    """Build the optimizer that a configuration names.

    Args:
        module: the module that owns the parameters.
        parameters: the parameters by name, or views in their place: the rows of parameters with one row per task, and
            the parts of sharded ones.
        config: the settings of the training.

    Raises:
        ValueError: the configuration names the optimizer of bitsandbytes, which is not installed.
    """
    groups = parameter_groups(module, parameters, config.weight_decay)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": tuple(config.betas), "eps": config.epsilon}
    if config.optimizer == "adamw":
        # The fused kernel reads each tensor once. The others take ten times as long on a CPU. On a GPU they copy all
        # moments, which would often be the peak of a step's memory.
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "The optimizer adamw8bit needs the library bitsandbytes: install mtu with its extra 8bit, or choose adamw."
        ) from error
    for parameter in parameters.values():
        # bitsandbytes does the same in its first step. A resumed training must begin with that memory format.
        parameter.data = parameter.data.contiguous()
    return AdamW8bit(groups, **settings)
