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


class Part(NamedTuple):
    """One call of a UNet in a step.

    Attributes:
        predict: arguments → (rows, 4, height, width).
        inputs: the arguments.
        rows: of the batch.
        prepare: runs before the call, and is timed with it.
    """

    predict: Callable[..., Tensor]
    inputs: dict[str, Any]
    rows: Rows
    prepare: Call | None = None


class Deployment(NamedTuple):
    """A contender that is built.

    Attributes:
        unets: are compiled, and their weights count.
        parts: batch → the calls of a step.
        kept: further tensors whose memory counts.
        switch: runs between two steps when the tasks of the batch change.
        after_check: runs after the check, which needs the original's weights, and before timing.
        sizes_differ: whether another mix of tasks may bring calls of other sizes, or of another UNet.
    """

    unets: tuple[UNet2DConditionModel, ...]
    parts: Callable[[Batch], list[Part]]
    kept: Callable[[], Iterable[Tensor]] = tuple
    switch: Call | None = None
    after_check: Call | None = None
    sizes_differ: bool = False

    def bind(self, batch: Batch) -> Callable[[], list[Tensor]]:
        """The step of a batch. Rows are selected and laid out once, outside of it."""
        return functools.partial(_run, self.parts(batch))

    def predict(self, batch: Batch) -> Tensor:
        """The outputs of all rows, in order."""
        parts = self.parts(batch)
        outputs = torch.cat(_run(parts))
        order = torch.tensor([row for part in parts for row in part.rows], device=outputs.device)
        return torch.empty_like(outputs).index_copy_(0, order, outputs)

    def weight_bytes(self, device: torch.device) -> int:
        """Bytes of all tensors that are kept on the device."""
        tensors = [*self.kept()]
        for unet in self.unets:
            tensors += [*unet.parameters(), *unet.buffers()]
        return storage_bytes(tensor for tensor in tensors if tensor.device.type == device.type)


@torch.no_grad()
def _run(parts: Sequence[Part]) -> list[Tensor]:
    outputs = []
    for part in parts:
        if part.prepare is not None:
            part.prepare()
        outputs.append(part.predict(**part.inputs))
    return outputs


def call(unet: UNet2DConditionModel, **inputs: Any) -> Tensor:
    """The output of a UNet as a tensor."""
    return unet(**inputs, return_dict=False)[0]


def at_once(batch: Batch) -> list[Rows]:
    """The whole batch in one call."""
    return [tuple(range(len(batch.tasks)))]


def each_picture(batch: Batch) -> list[Rows]:
    """The branches of one picture after those of another."""
    return [tuple(range(row, row + batch.branches)) for row in range(0, len(batch.tasks), batch.branches)]


def by_task(batch: Batch) -> list[Rows]:
    """The rows of one task after those of another."""
    tasks = dict.fromkeys(batch.tasks)
    return [tuple(row for row, task in enumerate(batch.tasks) if task == wanted) for wanted in tasks]


def stock_part(unet: UNet2DConditionModel, batch: Batch, rows: Rows) -> Part:
    """A call of an original, which reads the noisy latents alone."""
    return Part(functools.partial(call, unet), select_rows(batch, rows, unet.config["in_channels"]), rows)
