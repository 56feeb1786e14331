"""The kernels of one step, counted and timed by the profiler: what a step of a UNet consists of on a GPU.

A profiled step is slower than one that is not, and kernels of a CUDA graph are seen as those that are launched one by
one are. On a CPU operators stand for kernels, for smoke tests.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.harness.sweeps import Entry
from benchmarks.models.unet_rows import Workload

KERNEL_COLUMNS = ("contender", "device", *Workload._fields, "E", "K", "tasks", "kernel", "count", "total_us")
# What a file of one device tells contenders apart by.
_PLACE = ("contender", *Workload._fields, "E", "K", "tasks")
_DEVICES = {"cuda": DeviceType.CUDA, "cpu": DeviceType.CPU}


class Kernel(NamedTuple):
    """One kernel in a step: how often it runs, and what all its runs take in µs."""

    name: str
    count: int
    total_us: float


class KernelRow(NamedTuple):
    """A kernel of a contender's step; columns as `benchmarks.models.unet` has them."""

    entry: Entry
    device: str
    workload: Workload
    kernel: Kernel
    source: dict[str, str]

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        E, K, tasks = self.entry.setting
        cells = {"contender": self.entry.contender, "device": self.device}
        cells |= {name: str(value) for name, value in self.workload._asdict().items()}
        cells |= {"E": str(E), "K": "dense" if K is None else str(K), "tasks": str(tasks)}
        name, count, total_us = self.kernel
        return cells | {"kernel": name, "count": str(count), "total_us": f"{total_us:.2f}"} | self.source


def are_counted(path: Path, workload: Workload, entries: Iterable[Entry], source: dict[str, str]) -> bool:
    """Whether a file has kernels of all these contenders, of the same commit; without a file it has none."""
    if not path.exists():
        return False
    with path.open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row["commit"] == source["commit"]]
    known = {tuple(row[name] for name in _PLACE) for row in rows}
    cells = (KernelRow(entry, "", workload, Kernel("", 0, 0), {}).cells() for entry in entries)
    return all(tuple(row[name] for name in _PLACE) in known for row in cells)


def kernels_of(step: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """The kernels of a step, those that take longest first. The step must be warmed up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    runs: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == _DEVICES[device.type]:
            us = event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
            runs.setdefault(event.name, []).append(us)
    kernels = [Kernel(name, len(times), sum(times)) for name, times in runs.items()]
    return sorted(kernels, key=lambda kernel: -kernel.total_us)
