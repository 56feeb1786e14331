"""What a training does differently when several processes share it.

The trainer calls these functions in one process, too, where they do nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from mtu.training.objective import Objective

__all__ = [
    "delayed_reduction_context",
    "full_tensor",
    "gradient_norm",
    "load_into",
    "raise_in_all_processes",
    "share_objective",
]


def share_objective(accelerator: Accelerator, objective: Objective, fully_shard: bool) -> nn.Module:
    """Return a module whose backward pass averages the gradients over all processes.

    Args:
        accelerator: tells the processes.
        objective: the objective, on the device.
        fully_shard: whether the processes share out its weights.
    """
    if fully_shard:
        raise NotImplementedError("fully_shard")
    if accelerator.num_processes == 1:
        return objective
    # With this setting DDP keeps the order of its buckets from the first step on, so that a resumed training sums
    # gradients in the same order.
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    return accelerator.prepare_model(objective)


def delayed_reduction_context(
    accelerator: Accelerator, module: nn.Module, is_last_pass: bool
) -> AbstractContextManager:
    """Return a context in which a backward pass keeps its gradients to its process, unless it is the last one.

    Args:
        accelerator: tells the processes.
        module: the module that `share_objective` returned.
        is_last_pass: whether the gradients of all passes of the step are averaged now.
    """
    return torch.enable_grad() if is_last_pass else accelerator.no_sync(module)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the () norm of all gradients together, the same in all processes."""
    return nn.utils.get_total_norm(gradients)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, or gather it if the processes share it out; all processes call this together."""
    return tensor.detach()


def load_into(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of the same shape, of which this process may hold only a part."""
    with torch.no_grad():
        tensor.copy_(values)


def raise_in_all_processes(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise an error of the main process in all processes, so that none waits for the others.

    Args:
        accelerator: tells the processes.
        error: the error in the main process; None: there is none.
    """
    if accelerator.num_processes > 1:
        error = broadcast_object_list([error])[0]
    if error is not None:
        raise error
