"""What compilers run while they trace, and take for a constant: answers that nothing changes, and a line in the log.

Compilers alone import this module: the mark that makes them take a result as constant loads the whole of torch's
compiler, which takes as long as importing torch.
"""

from __future__ import annotations

import functools
import logging

import torch

from mtu_kernels.triton import availability


@torch.compiler.assume_constant_result
def why_not_installed() -> str | None:
    return availability.why_not_installed()


@torch.compiler.assume_constant_result
def why_not(device: torch.device, compute: torch.dtype) -> str | None:
    return availability.why_not(device, compute)


@torch.compiler.assume_constant_result
def log_path(path: str) -> None:
    """Says once how calls are served under compilation."""
    _log_once(path)


@functools.cache
def _log_once(path: str) -> None:
    logging.getLogger("mtu_kernels").info("Under torch.compile, backend 'triton' runs %s.", path)
