"""The kernels of one step, counted and timed by the profiler: what a step of a UNet consists of on a GPU.

A profiled step is slower than one that is not, and kernels of a CUDA graph are seen as those that are launched one by
one are. On a CPU operators stand for kernels, for smoke tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.harness.recording import measured
from benchmarks.harness.rows import Table
from benchmarks.harness.workloads import Entry, Workload

TABLE = Table(
    "benchmarks.models.unet",
    (
        *("contender", "device", "model", "size", "B", "branches", "dtype", "E", "K", "tasks"),
        *("kernel", "count", "total_us"),
    ),
    fields={"kernel": "part"},
)
_DEVICES = {"cuda": DeviceType.CUDA, "cpu": DeviceType.CPU}


class Kernel(NamedTuple):
    """One kernel in a step: its name, how often it runs, and what all its runs take in µs."""

    part: str
    count: int
    total_us: float


def are_counted(path: Path, workload: Workload, entries: Iterable[Entry], source: dict[str, str]) -> bool:
    """Whether a file has kernels of all these contenders, of the same commit; without a file it has none."""
    return path.exists() and {(workload, entry) for entry in entries} <= measured(TABLE.read(path), source)


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
