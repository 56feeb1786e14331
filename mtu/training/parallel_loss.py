"""A loss whose batch is cut into shards, each computed forward and backward by its own thread on one core."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class _Precomputed(torch.autograd.Function):
    """A loss that was computed together with its gradients: backward hands them out."""

    @staticmethod
    def forward(context: Any, loss: Tensor, gradients: list[Tensor], *parameters: Parameter) -> Tensor:
        context.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # In place, on gradients that belong to no one else: backward runs once.
        torch._foreach_mul_(context.gradients, grad_outputs[0])
        return None, None, *context.gradients


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Split each operation over `count` threads, and over as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def average_loss_in_threads(partial_losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Parameter]) -> Tensor:
    """Return the mean of several losses, whose gradients are computed at once, one thread each.

    With `intra_op_threads(1)` this uses a CPU's cores better than splitting every operation over them: small
    models spend much time in operations too short to share, and a core that another process takes away for a moment
    stops one shard, not all cores at the next barrier.

    Args:
        partial_losses: each gives the loss of a part of the batch; the parts are of equal size.
        parameters: what the losses are differentiated by; every shard depends on all of them.

    Returns:
        () the mean loss, differentiable once, by the parameters alone.
    """

    def compute(shard: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = shard()
        return loss.detach(), torch.autograd.grad(loss, parameters)

    with ThreadPoolExecutor(len(partial_losses)) as pool:
        results = list(pool.map(compute, partial_losses))
    # Summed in the order of the parts, whichever finished first.
    loss = torch.stack([loss for loss, _ in results]).mean()
    gradients = list(results[0][1])
    for _, others in results[1:]:
        torch._foreach_add_(gradients, others)
    torch._foreach_div_(gradients, len(results))
    return _Precomputed.apply(loss, gradients, *parameters)
