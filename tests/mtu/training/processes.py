"""Runs a function in several processes that torch.distributed connects, and collects its results."""

import functools
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.training.processes import CONTEXT, start_processes

_SECONDS = 120


def run_in_processes(count: int, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
    """Call a function of a module in so many processes, and return the result of each.

    Results are sent by pickling, so they should hold numbers and texts.
    """
    call = functools.partial(function, *arguments, **keywords)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        processes = start_processes(_send_result, Path(folder, "store"), [(call, send) for _, send in pipes])
        for _, send in pipes:
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


def _send_result(call: Callable[[], Any], send: Connection) -> None:
    try:
        send.send(("result", call()))
    except BaseException:
        send.send(("error", traceback.format_exc()))
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
