"""Modules whose parameters hold one row per task, and one task's rows among them.

A model passes its per-task modules by name. Which modules those are, the model knows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtu.compat import parameter_access

__all__ = ["PerTaskModule", "check_per_task_modules", "read_task_rows", "write_task_rows_"]


class PerTaskModule(nn.Module):
    """A module each of whose parameters has the shape (T, …): one row per task."""

    @torch.no_grad()
    def select_tasks_(self, rows: Sequence[int]) -> None:
        """Make the old row `rows[i]` the new row i, in new parameters."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter[list(rows)], parameter.requires_grad))


def check_per_task_modules(modules: Mapping[str, nn.Module], action: str) -> None:
    """Raise a ValueError unless rows can be read from these per-task modules and written to them.

    Args:
        modules: by name.
        action: what is about to be done, the subject of the message.
    """
    for name, module in modules.items():
        if not isinstance(module, PerTaskModule):
            raise ValueError(f"Unload adapters before {action}: {name} is wrapped in a {type(module).__name__}.")
        parameter_access.check_plain_layers(module, action)


def read_task_rows(root: nn.Module, modules: Mapping[str, nn.Module], index: int) -> dict[str, Tensor]:
    """The rows of task id `index`, by the names of the parameters that they are rows of.

    Args:
        root: the model; offloading may keep its values elsewhere.
        modules: its per-task modules, by name.
        index: the task's id.
    """
    tensors = parameter_access.read_state_dict(root, _parameters(modules))
    return {name: tensor[index] for name, tensor in tensors.items()}


@torch.no_grad()
def write_task_rows_(modules: Mapping[str, nn.Module], index: int, rows: Mapping[str, Tensor]) -> None:
    """Overwrite the rows of task id `index`; a narrower input convolution is padded with zeros."""
    parameters = _parameters(modules)
    for name, row in rows.items():
        target = parameters[name][index]
        target.zero_()
        target[tuple(slice(size) for size in row.shape)].copy_(row)


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.named_parameters()}
