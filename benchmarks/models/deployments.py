"""Contenders that are built: their UNets, and the calls that a batch is divided into."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.harness.memory import storage_bytes
from benchmarks.harness.timing import Call
from benchmarks.models.unet_models import Batch, select_rows

Rows = tuple[int, ...]
# Divides a batch into calls, each of some of its rows.
Division = Callable[[Batch], list[Rows]]


class UNetCall(NamedTuple):
    """One call of a UNet in a step.

    Attributes:
        predict: arguments → (rows, 4, height, width).
        inputs: the arguments.
        rows: of the batch.
        prepare_call: runs before the call, and is timed with it.
    """

    predict: Callable[..., Tensor]
    inputs: dict[str, Any]
    rows: Rows
    prepare_call: Call | None = None


class Deployment(NamedTuple):
    """A contender that is built.

    Attributes:
        unets: are compiled, and their weights count.
        unet_calls_of: batch → the calls of a step.
        kept_tensors: further tensors whose memory counts.
        switch_tasks: runs between two steps when the tasks of the batch change.
        after_check: runs after the check, which needs the original's weights, and before timing.
        call_sizes_depend_on_tasks: whether another mix of tasks may bring calls of other sizes, or of another UNet.
    """

    unets: tuple[UNet2DConditionModel, ...]
    unet_calls_of: Callable[[Batch], list[UNetCall]]
    kept_tensors: Callable[[], Iterable[Tensor]] = tuple
    switch_tasks: Call | None = None
    after_check: Call | None = None
    call_sizes_depend_on_tasks: bool = False

    def make_step(self, batch: Batch) -> Callable[[], list[Tensor]]:
        """The step of a batch. Rows are selected and laid out once, outside of it."""
        return functools.partial(_run, self.unet_calls_of(batch))

    def predict(self, batch: Batch) -> Tensor:
        """The outputs of all rows, in order."""
        parts = self.unet_calls_of(batch)
        outputs = torch.cat(_run(parts))
        order = torch.tensor([row for part in parts for row in part.rows], device=outputs.device)
        return torch.empty_like(outputs).index_copy_(0, order, outputs)

    def count_weight_bytes(self, device: torch.device) -> int:
        """Bytes of all tensors that are kept on the device."""
        tensors = [*self.kept_tensors()]
        for unet in self.unets:
            tensors += [*unet.parameters(), *unet.buffers()]
        return storage_bytes(tensor for tensor in tensors if tensor.device.type == device.type)


@torch.no_grad()
def _run(parts: Sequence[UNetCall]) -> list[Tensor]:
    outputs = []
    for part in parts:
        if part.prepare_call is not None:
            part.prepare_call()
        outputs.append(part.predict(**part.inputs))
    return outputs


def predict_noise(unet: UNet2DConditionModel, **inputs: Any) -> Tensor:
    """The output of a UNet as a tensor."""
    return unet(**inputs, return_dict=False)[0]


def rows_at_once(batch: Batch) -> list[Rows]:
    """The whole batch in one call."""
    return [tuple(range(len(batch.task_of_row)))]


def rows_by_picture(batch: Batch) -> list[Rows]:
    """The branches of one picture after those of another."""
    return [tuple(range(row, row + batch.branches)) for row in range(0, len(batch.task_of_row), batch.branches)]


def rows_by_task(batch: Batch) -> list[Rows]:
    """The rows of one task after those of another."""
    tasks = dict.fromkeys(batch.task_of_row)
    return [tuple(row for row, task in enumerate(batch.task_of_row) if task == wanted) for wanted in tasks]


def make_stock_call(unet: UNet2DConditionModel, batch: Batch, rows: Rows) -> UNetCall:
    """A call of an original, which reads the noisy latents alone."""
    return UNetCall(functools.partial(predict_noise, unet), select_rows(batch, rows, unet.config["in_channels"]), rows)
