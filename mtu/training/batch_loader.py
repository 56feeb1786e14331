"""The loading of batches, in this process or in workers, from any step on."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mtu.training.objective import BatchPart

__all__ = ["PartSequence", "iterate_over_batches", "part_seed"]


class PartSequence(NamedTuple):
    """The parts of batches that one process computes: those of each step, pass by pass.

    Args:
        start: the first step.
        stop: the step after the last one.
        passes: number of passes in a step.
        process: number of the process.
        processes: number of processes.
    """

    start: int
    stop: int
    passes: int
    process: int
    processes: int

    def of_step(self, step: int) -> list[BatchPart]:
        """The parts of a step."""
        count = self.passes * self.processes
        return [BatchPart(step, index * self.processes + self.process, count) for index in range(self.passes)]


class _PartSampler(torch.utils.data.Sampler[BatchPart]):
    def __init__(self, parts: PartSequence) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[BatchPart]:
        for step in range(self._parts.start, self._parts.stop):
            yield from self._parts.of_step(step)


class _Failure(NamedTuple):
    error: Exception


class _BatchDataset(Dataset[Any]):
    """Batches by their parts, as a data set that workers can read."""

    def __init__(self, load_batch: Callable[[BatchPart], Any]) -> None:
        self._load_batch = load_batch

    def __getitem__(self, part: BatchPart) -> Any:
        try:
            return self._load_batch(part)
        except (ValueError, OSError) as error:
            # A worker would add its traceback to the message.
            return _Failure(error)


def iterate_over_batches(
    load_batch: Callable[[BatchPart], Any], parts: PartSequence, num_workers: int, *, pin_memory: bool
) -> Generator[Any, None, None]:
    """Load the batches of parts, in their order. No earlier step is loaded, so the first batch is soon there.

    Close the generator to end the workers.

    Args:
        load_batch: loads the batch of a part.
        parts: the parts.
        num_workers: number of worker processes; 0: this process loads each batch when it is asked for.
        pin_memory: whether to load into memory from which a GPU copies faster.

    Raises:
        ValueError, OSError: `load_batch` raised it for the next batch.
    """
    # Shared with the workers: whether the training has ended.
    has_ended = multiprocessing.RawValue("b", 0)
    loader = DataLoader(
        _BatchDataset(load_batch),
        batch_size=None,
        sampler=_PartSampler(parts),
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=partial(_ignore_signals_until_the_end, has_ended),
        # The iterator draws a seed for its workers, which must not come from the generator of the training.
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    finally:
        has_ended.value = 1


def part_seed(seed: int, part: BatchPart) -> int:
    """The seed of PyTorch's global generators for a part of a batch, from which layers such as dropout draw."""
    return int(np.random.SeedSequence([seed, part.step, part.index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals_until_the_end(has_ended: Any, worker: int) -> None:
    """Let a worker live on after a signal to all processes, because the training finishes its step.

    Args:
        has_ended: shared with the training, which sets it. Python ends workers that are left over by a signal.
        worker: number of the worker.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        if has_ended.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
