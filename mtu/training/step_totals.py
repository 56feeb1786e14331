"""What the processes of a training tell each other in a step: losses, signals and time, in one reduction."""

import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mtu.training.objective import PartialLoss

__all__ = ["OwnReport", "StepTotals", "TotalsReducer"]


class OwnReport(NamedTuple):
    """What one process tells the others.

    Args:
        losses: the losses of its parts of the batch.
        seconds: training time so far; that of the main process counts.
        data_seconds: time that it waited for its batches.
        signal_number: SIGINT or SIGTERM, if it got one.
    """

    losses: Sequence[PartialLoss]
    seconds: float
    data_seconds: float
    signal_number: int | None = None


class StepTotals(NamedTuple):
    """What all processes know after the reduction.

    Args:
        loss: the loss of the step.
        terms: the terms of the loss, by name.
        norm: norm of the gradients.
        seconds: training time so far, by the clock of the main process.
        data_seconds: mean time that the processes waited for their batches.
        signal_number: SIGTERM if any process got it, else SIGINT if any got that, else None.
    """

    loss: float
    terms: dict[str, float]
    norm: float
    seconds: float
    data_seconds: float
    signal_number: int | None


_NUM_FIXED = 6


class TotalsReducer:
    """Sums the reports of all processes.

    The parts of a batch need not have the same terms, so the processes agree on the names whenever one of them has a
    new one. All other steps take one reduction.

    Args:
        accelerator: tells the processes.
        device: the device of the losses.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self._accelerator, self._device = accelerator, device
        # MPS has no float64, in which the clock of a long training keeps its milliseconds.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._names: list[str] = []

    def reduce(self, report: OwnReport, norm: Tensor) -> StepTotals:
        """Sum the reports of all processes. Only here does a step wait for its device.

        Args:
            report: the report of this process.
            norm: () norm of the gradients, the same in all processes.
        """
        values = self._sum(report, norm)
        if values[1]:
            own = {name for partial in report.losses for name in partial.terms}
            self._names = sorted({*self._names, *gather_object(sorted(own))})
            values = self._sum(report, norm)
        loss, _, seconds, data_seconds, interrupted, terminated = values[:_NUM_FIXED]
        count = len(self._names)
        present, terms = values[_NUM_FIXED : _NUM_FIXED + count], values[_NUM_FIXED + count : -1]
        return StepTotals(
            loss,
            {name: term for name, term, parts in zip(self._names, terms, present, strict=True) if parts},
            values[-1],
            seconds,
            data_seconds / self._accelerator.num_processes,
            signal.SIGTERM if terminated else signal.SIGINT if interrupted else None,
        )

    def _sum(self, report: OwnReport, norm: Tensor) -> list[float]:
        names = [name for partial in report.losses for name in partial.terms]
        known = [
            0.0,
            float(not set(names) <= set(self._names)),
            report.seconds if self._accelerator.is_main_process else 0.0,
            report.data_seconds,
            float(report.signal_number == signal.SIGINT),
            float(report.signal_number == signal.SIGTERM),
            *(float(names.count(name)) for name in self._names),
        ]
        own = torch.tensor([*known, *(0.0 for _ in self._names)], dtype=self._dtype).to(self._device)
        own[0] = torch.stack([partial.loss.to(own) for partial in report.losses]).sum()
        for index, name in enumerate(self._names, start=len(known)):
            for partial in report.losses:
                if name in partial.terms:
                    own[index] += partial.terms[name].to(own)
        total: Any = self._accelerator.reduce(own, "sum")
        return torch.cat([total, norm.to(total).view(1)]).tolist()
