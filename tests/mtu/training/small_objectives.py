"""Objectives that train in milliseconds, with every kind of parameter that the trainer tells apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mtu.training import BatchPart, Objective, PartialLoss

NUM_ROWS = 4


class Batch(NamedTuple):
    """Images, the row of each, and a factor of the loss of each."""

    images: Tensor
    rows: Tensor
    factors: Tensor


@dataclass(frozen=True)
class LoadBatch:
    """Draws a batch; `factors` of some (step, example) spoil a loss, and reading `unreadable_step` fails."""

    size: int
    factors: Mapping[tuple[int, int], float] = field(default_factory=dict)
    unreadable_step: int | None = None

    def rows(self, step: int) -> Tensor:
        """The rows of a step: never all of them."""
        return torch.arange(self.size) % 2 + step % (NUM_ROWS - 1)

    def __call__(self, part: BatchPart) -> Batch:
        if part.step == self.unreadable_step:
            raise ValueError(f"pictures/metadata.jsonl, line {part.step}: the image cannot be read.")
        generator = torch.Generator().manual_seed(part.step)
        images = torch.randn(self.size, 3, 8, 8, generator=generator)
        factors = torch.tensor([self.factors.get((part.step, i), 1.0) for i in range(self.size)])
        count = self.size // part.count
        return Batch(*(x[part.index * count :][:count] for x in (images, self.rows(part.step), factors)))


class Model(nn.Module):
    """A convolution, an embedding with a row per task, and a linear map after an optional dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.embedding = nn.Embedding(NUM_ROWS, 4)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, images: Tensor, rows: Tensor) -> Tensor:
        features = self.conv(images).mean((2, 3)) + self.embedding(rows)
        return self.frozen(self.linear(self.dropout(features)))


class SmallObjective(Objective):
    """The squared error of a small model, as the mean over the batch."""

    def __init__(self, load: LoadBatch | None = None, *, dropout: float = 0.5, has_rows: bool = True) -> None:
        super().__init__()
        self.model = Model(dropout)
        self.load = LoadBatch(6) if load is None else load
        self.has_rows = has_rows

    @property
    def settings(self) -> dict[str, Any]:
        return {"size": self.load.size}

    def check_part_count(self, count: int) -> None:
        if self.load.size % count:
            raise ValueError(f"A batch of {self.load.size} cannot be split into {count} equal parts.")

    @property
    def load_batch(self) -> LoadBatch:
        return self.load

    def forward(self, batch: Batch) -> PartialLoss:
        errors = (self.model(batch.images, batch.rows) - 1).square().mean(1) * batch.factors
        terms = {
            f"row {row}": errors.detach()[batch.rows == row].sum() / self.load.size
            for row in batch.rows.unique().tolist()
        }
        return PartialLoss(errors.sum() / self.load.size, terms, errors.detach())

    def describe_examples(self, part: BatchPart) -> Sequence[str]:
        count = self.load.size // part.count
        return [f"example {part.index * count + i}" for i in range(count)]

    def row_parameters(self) -> Sequence[Parameter]:
        return list(self.model.embedding.parameters()) if self.has_rows else []

    def trained_rows(self, step: int) -> Sequence[int]:
        return self.load.rows(step).unique().tolist()


class FunctionObjective(Objective):
    """A loss that is a function of the step's number, over the parameters of some modules."""

    def __init__(self, loss: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        for name, module in modules.items():
            self.add_module(name, module)

    @property
    def load_batch(self) -> Any:
        return _step_of

    def forward(self, step: Tensor) -> PartialLoss:
        return PartialLoss(self.loss(int(step)))


def _step_of(part: BatchPart) -> Tensor:
    return torch.tensor(part.step)
