"""Processes that start within milliseconds, and that torch.distributed connects.

They are forked from a server that has imported what they need. A new interpreter would take seconds for its imports,
and a fork of a process in which autograd has run may hang.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed

CONTEXT = multiprocessing.get_context("forkserver")
# Modules that are not there are passed over.
CONTEXT.set_forkserver_preload(["benchmarks.training.kill_cases", "mtu.training.runs.run", "tests.mtu.tiny"])


def start_processes(function: Callable[..., Any], store: Path, arguments: Sequence[tuple]) -> list[ForkServerProcess]:
    """Start a process for each tuple of arguments of a function.

    Args:
        function: a function of a module that can be imported.
        store: a file that does not exist yet, by which the processes find each other.
        arguments: those of each process.
    """
    count = len(arguments)
    processes = [
        CONTEXT.Process(target=_run, args=(rank, count, store, function, own)) for rank, own in enumerate(arguments)
    ]
    for process in processes:
        process.start()
    return processes


def _run(rank: int, count: int, store: Path, function: Callable[..., Any], arguments: tuple) -> None:
    # Workers that load batches start as in a process of a user, not from a server of their own.
    multiprocessing.set_start_method("fork", force=True)
    # accelerate reads these variables, which `accelerate launch` sets.
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in place.items()}
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    function(*arguments)
