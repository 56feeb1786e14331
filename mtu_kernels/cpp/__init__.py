"""The backend "cpp": C++ kernels for CPUs, compiled from `csrc`.

The forward pass is one call into the extension (`extension.py`). The backward pass (`backward.py`) leaves its matrix
products to PyTorch and computes everything between them in the extension. `operators.py` registers both.

The forward pass gives the same bits for any number of threads. The products and sums of the backward pass give the same
bits from run to run only for the same number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine, Options
from mtu_kernels.cpp.extension import EXTENSION
from mtu_kernels.cpp.operators import OPS, ops_of_instruction_set
from mtu_kernels.ops import call_ops, why_dtype_unsupported
from mtu_kernels.routing import Routing

# The kernels compute 16 tokens at a time. For shorter samples, PyTorch's operators are faster.
MIN_TOKENS = 16


def moe_ffn(
    x: Tensor,
    norm: NormAffine,
    experts: ExpertWeights,
    routing: Routing,
    options: Options,
    *,
    level: str | None = None,
) -> Tensor:
    """`mtu_kernels.moe_ffn` for arguments that have been checked.

    Args:
        x, norm, experts, routing, options: as for `mtu_kernels.moe_ffn`.
        level: the instruction set to use, one of ``instruction_sets()``. ``None`` takes the first, which is the
            fastest.

    Raises:
        ValueError: this machine does not have the level.
    """
    ops = OPS if level is None else ops_of_instruction_set(level)
    return call_ops(ops, x, norm, experts, routing, options)


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the extension has kernels for and this machine runs, the fastest first.

    They are ``amx`` (bfloat16 in tiles), ``avx512``, ``avx512_bf16``, ``avx2`` and ``portable``. The tuple is empty if
    the extension is not loaded.
    """
    return EXTENSION.instruction_sets


def why_not_installed() -> str | None:
    """The reason why this installation cannot run the backend, as a clause; or ``None`` if it can."""
    return EXTENSION.why_not_loaded


def why_unsupported(device: torch.device, compute: torch.dtype) -> str | None:
    """The reason why the backend cannot serve this device and compute dtype, as a clause; or ``None`` if it can."""
    if EXTENSION.why_not_loaded is not None:
        return EXTENSION.why_not_loaded
    if (reason := why_dtype_unsupported(compute)) is not None:
        return reason
    if device.type not in ("cpu", "meta"):
        return f"it runs on CPUs, not on {device.type}"
    return None


def why_slower_than_eager() -> str | None:
    """The reason why PyTorch's operators are faster on this machine, as a clause; or ``None`` if they are not."""
    if instruction_sets()[:1] == ("portable",):
        return "it has no kernels for this processor's vector instructions"
    return None
