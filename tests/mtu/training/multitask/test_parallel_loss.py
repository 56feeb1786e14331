"""`average_and_differentiate_losses_in_threads`: the same loss and gradients as the whole batch at once."""

import pytest
import torch
from torch import nn

from mtu.training.multitask.parallel_loss import average_and_differentiate_losses_in_threads


@pytest.mark.parametrize("count", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_whole_batch(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)).double()
    inputs = torch.randn(8, 3, dtype=torch.float64)
    parameters = list(model.parameters())
    whole = model(inputs).square().mean()
    expected = torch.autograd.grad(3 * whole, parameters)
    shards = [lambda rows=rows: model(rows).square().mean() for rows in inputs.chunk(count)]
    loss = average_and_differentiate_losses_in_threads(shards, parameters)
    torch.testing.assert_close(loss, whole)
    (3 * loss).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_error_in_a_shard_is_raised() -> None:
    weight = nn.Parameter(torch.ones(2))

    def broken() -> torch.Tensor:
        raise RuntimeError("no such picture")

    with pytest.raises(RuntimeError, match="no such picture"):
        average_and_differentiate_losses_in_threads([lambda: weight.sum(), broken], [weight])
