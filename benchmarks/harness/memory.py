"""Memory: the most that a call holds at once, the bytes that it keeps for the backward pass, and those of weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def measure_peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a call holds at once beyond those held before it, its results included.

    Both ways ask torch's allocator: its own statistics on a GPU, the profiler's record of it on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = call()
        torch.cuda.synchronize(device)
        del results
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = call()
    del results
    held = peak = 0
    # Torch declares these results as optional, but they are there after the block; it does not declare `nbytes`.
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, held)
    return peak


def measure_saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that a forward pass saves for its backward pass.

    Each storage counts once and whole, however many views of it are saved. Those of the inputs (x, parameters, norm
    affines, routing) do not count: they are kept anyway.
    """
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph behind y keeps everything that was packed alive, so no address is given out twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(saved.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
