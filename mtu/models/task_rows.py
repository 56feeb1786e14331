"""Modules whose parameters hold one row per task, and access to the rows of one task.

The model decides which of its modules are per task, and passes them by name.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtu.compat import parameter_access

__all__ = ["PerTaskModule", "check_per_task_modules", "read_task_rows", "write_task_rows_"]


class PerTaskModule(nn.Module):
    """A module each of whose parameters has the shape (T, …): one row per task."""

    @torch.no_grad()
    def select_task_rows_(self, old_task_ids: Sequence[int]) -> None:
        """Make the old row `old_task_ids[i]` the new row i, in new parameters.

        Args:
            old_task_ids: the old task id of each new one.
        """
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter[list(old_task_ids)], parameter.requires_grad))


def check_per_task_modules(modules: Mapping[str, nn.Module], action: str) -> None:
    """Raise a ValueError unless rows can be read from these per-task modules and written to them.

    Args:
        modules: the per-task modules, by name.
        action: the name of the operation, for the message.
    """
    for name, module in modules.items():
        # Parametrizations of torch make a subclass, whose parameters have other names.
        if PerTaskModule not in type(module).__bases__:
            raise ValueError(f"Unload adapters before {action}: {name} is wrapped in a {type(module).__name__}.")
        parameter_access.check_plain_layers(module, action)


def read_task_rows(root: nn.Module, modules: Mapping[str, nn.Module], task_id: int) -> dict[str, Tensor]:
    """Read the rows of task `task_id`, also from values that offloading keeps elsewhere.

    Args:
        root: the model.
        modules: its per-task modules, by name.
        task_id: the task.

    Returns:
        The rows, by the names of the parameters that they belong to.
    """
    tensors = parameter_access.state_dict_with_offloaded_values(root, _parameters(modules))
    return {name: tensor[task_id] for name, tensor in tensors.items()}


@torch.no_grad()
def write_task_rows_(modules: Mapping[str, nn.Module], task_id: int, rows: Mapping[str, Tensor]) -> None:
    """Overwrite the rows of task `task_id`; a narrower input convolution is padded with zeros.

    Args:
        modules: the per-task modules, by name.
        task_id: the task.
        rows: the new rows, by the names of the parameters.
    """
    parameters = _parameters(modules)
    for name, row in rows.items():
        target = parameters[name][task_id]
        target.zero_()
        target[tuple(slice(size) for size in row.shape)].copy_(row)


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.named_parameters()}
