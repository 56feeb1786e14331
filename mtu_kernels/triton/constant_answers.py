"""The answers of `mtu_kernels.triton.availability` as constants, which nothing changes while a program runs.

Compilers alone import this module: the mark that makes them take a result as constant loads the whole of torch's
compiler, which takes as long as importing torch.
"""

from __future__ import annotations

import torch

from mtu_kernels.triton import availability


@torch.compiler.assume_constant_result
def why_not_installed() -> str | None:
    return availability.why_not_installed()


@torch.compiler.assume_constant_result
def why_not(device: torch.device, compute: torch.dtype) -> str | None:
    return availability.why_not(device, compute)
