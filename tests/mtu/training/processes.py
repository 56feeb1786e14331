"""Runs a function in several processes that torch.distributed connects.

They are forked from a server that has imported torch and mtu: a new interpreter would take seconds to import them, and
a fork of the test's own process may hang once autograd has run in it.
"""

import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mtu.training", "tests.mtu.tiny", "torch.distributed.fsdp"])
_SECONDS = 120


def run_in_processes(count: int, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
    """Call a function of a module in so many processes, and return the result of each.

    Results are sent by pickling, so they should hold numbers and texts.
    """
    call = functools.partial(function, *arguments, **keywords)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
        processes = [
            CONTEXT.Process(target=_run, args=(rank, count, Path(folder, "store"), send, call))
            for rank, (_, send) in enumerate(pipes)
        ]
        for process, (_, send) in zip(processes, pipes, strict=True):
            process.start()
            send.close()
        results = [_receive(receive) for receive, _ in pipes]
        for process in processes:
            process.join(_SECONDS)
            process.kill()
            process.join()
            process.close()
    failures = [text for kind, text in results if kind == "error"]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def connect(rank: int, count: int, store: Path) -> None:
    """Connect this process to the others, as `accelerate launch` does by environment variables."""
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in places.items()}
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)


def _run(rank: int, count: int, store: Path, send: Connection, call: Callable[[], Any]) -> None:
    try:
        connect(rank, count, store)
        send.send(("result", call()))
    except BaseException:
        send.send(("error", f"process {rank}: {traceback.format_exc()}"))
        raise
    finally:
        send.close()


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        if pipe.poll(_SECONDS):
            return pipe.recv()
    except EOFError:
        return "error", "a process ended without a result"
    return "error", f"a process gave no result within {_SECONDS} s"
