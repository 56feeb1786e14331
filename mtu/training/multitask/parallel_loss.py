"""A loss on several CPU threads: each thread runs a part of the batch forward and backward on one core.

Small models spend much time in operations that are too short to split over cores. It is faster to give each core its
own part of the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["average_and_differentiate_losses_in_threads", "intra_op_threads_context"]


class _Precomputed(torch.autograd.Function):
    """A loss that was computed together with its gradients, which `backward` returns."""

    @staticmethod
    def forward(context: Any, loss: Tensor, gradients: list[Tensor], *parameters: Parameter) -> Tensor:
        context.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients may be scaled in place, because nothing else holds them and backward runs once.
        torch._foreach_mul_(context.gradients, grad_outputs[0])
        return None, None, *context.gradients


@contextmanager
def intra_op_threads_context(count: int) -> Iterator[None]:
    """Split each operation over `count` threads within this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def average_and_differentiate_losses_in_threads(
    partial_losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Parameter]
) -> Tensor:
    """Compute the mean of several losses and its gradients, with one thread for each loss.

    Use it within `intra_op_threads_context(1)`, so that each thread keeps to one core. A core that another process
    takes away for a moment then stops one thread, and not all cores at the next barrier.

    Args:
        partial_losses: functions that compute the losses of equally large parts of the batch.
        parameters: the parameters to differentiate by. Every loss depends on all of them.

    Returns:
        () mean loss. It can be differentiated once, by the parameters alone.
    """

    def compute(partial_loss: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = partial_loss()
        return loss.detach(), torch.autograd.grad(loss, parameters)

    with ThreadPoolExecutor(len(partial_losses)) as pool:
        results = list(pool.map(compute, partial_losses))
    # The order of the sum does not depend on which thread finished first, so that the result is reproducible.
    loss = torch.stack([loss for loss, _ in results]).mean()
    gradients = list(results[0][1])
    for _, others in results[1:]:
        torch._foreach_add_(gradients, others)
    torch._foreach_div_(gradients, len(results))
    return _Precomputed.apply(loss, gradients, *parameters)
