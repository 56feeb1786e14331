"""The kernels of one step of a UNet on a GPU, counted and timed by the profiler.

A profiled step is slower than other steps, and kernels of a CUDA graph appear as those that are launched one by one do.
On a CPU operators stand for kernels, for smoke tests.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.harness.rows import CsvTable

TABLE = CsvTable(
    "benchmarks.models.unet",
    (
        *("contender", "device", "model", "size", "B", "branches", "dtype", "E", "K", "tasks"),
        *("kernel", "count", "total_us"),
    ),
    field_of_column={"kernel": "part"},
)
_DEVICES = {"cuda": DeviceType.CUDA, "cpu": DeviceType.CPU}


class KernelTotal(NamedTuple):
    """One kernel in a step: its name, the number of its runs, and their time in µs."""

    part: str
    count: int
    total_us: float


def profile_kernels(step: Callable[[], Any], device: torch.device) -> list[KernelTotal]:
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
    for event in profile.events() or ():
        if event.device_type == _DEVICES[device.type]:
            us = event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
            runs.setdefault(event.name, []).append(us)
    kernels = [KernelTotal(name, len(times), sum(times)) for name, times in runs.items()]
    return sorted(kernels, key=lambda kernel: -kernel.total_us)
