"""A function call whose result torch.compile takes as a constant.

`mtu_kernels.tracing.call_once_while_tracing` imports this module, and only while torch.compile traces: the decorator
loads the whole compiler.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.assume_constant_result
def call_as_traced_constant(function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function, for arguments that the compiler knows."""
    return function(*arguments)
