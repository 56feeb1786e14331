"""Questions about how a call runs: eagerly, or while torch.compile, an exporter or a function transform traces it.

All of them can be asked in code that torch.compile traces, on every supported version of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

Result = TypeVar("Result")


def call_once_while_tracing(function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function. While torch.compile traces, it runs the function once and keeps the result.

    Args:
        function: a plain function of a module. Compilers do not take cached functions or methods here.
        arguments: anything but tensors.
    """
    if not torch.compiler.is_compiling():
        return function(*arguments)
    # Importing this module loads torch's compiler, which takes as long as importing torch.
    from mtu_kernels import traced_constant

    return traced_constant.call_as_traced_constant(function, *arguments)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces this call."""
    # Left to itself, the compiler of torch 2.11 takes torch's own answer for true in everything that it compiles.
    return torch.compiler.is_compiling() and call_once_while_tracing(torch.compiler.is_exporting)


def is_exporting_or_tracing() -> bool:
    """Whether this call is recorded for other runtimes: by ``torch.export``, ``torch.jit.trace`` or ``torch.onnx``."""
    return is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing()


def is_exporting_to_onnx() -> bool:
    """Whether an exporter of ``torch.onnx`` records this call."""
    # torch.onnx is imported only if the answer may be yes. A compiler would take its answer for false.
    return is_exporting_or_tracing() and call_once_while_tracing(torch.onnx.is_in_onnx_export)


def in_transform_or_forward_ad() -> bool:
    """Whether a function transform (`torch.func`, `torch.vmap`) or forward-mode differentiation is under way."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def supports_autocast(device_type: str) -> bool:
    """Whether ``torch.autocast`` supports a type of device, such as "cpu" or "cuda". It does not support "meta"."""
    # torch 2.11 cannot trace its own function. Of the devices that programs are compiled for, only meta is unsupported.
    if torch.compiler.is_compiling():
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def static_size(size: int) -> int:
    """A size that is the same at every call, such as the model width, as a Python number.

    ``torch.jit.trace`` gives sizes as tensors. In a shape, such a size becomes ONNX operators that compute it, and
    ONNX has no LayerNorm over a computed width.
    """
    return int(size) if torch.jit.is_tracing() else size
