"""A kernel launch as a value: built from tensors of any kind, run by whoever has a device for it.

The operators build launches and hand each to `Machine.run`. On a GPU, `execute` runs it at once. Built on tensors
without memory and collected instead, the same launches say which kernels a call compiles to, for any architecture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Launch(NamedTuple):
    """One kernel call.

    Attributes:
        kernel: the function under ``triton.jit``.
        programs: size of the one-dimensional grid; 0 launches nothing.
        arguments: run-time arguments in order; ``None`` for a tensor that the call has no use for.
        constants: the ``tl.constexpr`` arguments by name.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        overlaps: whether it may start while the launch before it still runs (programmatic dependent launch, sm_90 and
            later). The kernel itself then waits before it reads what that launch writes.
        product: the matrix product that it computes, a name in `tiles.PRODUCTS`; ``None`` for other kernels.
    """

    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    overlaps: bool = False
    product: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told besides the constants. Compilers for AMD know no dependent launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"launch_pdl": True} if self.overlaps else options


class Machine(NamedTuple):
    """Where launches go.

    Attributes:
        arch: "sm_90", "gfx942", …; "interpreter" under Triton's interpreter.
        run: takes each launch in turn.
    """

    arch: str
    run: Callable[[Launch], None]


# Triton has these two as well, callable from kernels, and some twenty times slower on the host.
def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n, for n > 0; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


def floor_power_of_2(n: int) -> int:
    """The greatest power of two that is not greater than n, for n > 0."""
    return 1 << n.bit_length() - 1


def is_describable(tensor: Tensor | None) -> bool:
    """Whether a tensor descriptor can describe a contiguous tensor: its address and rows are multiples of 16 bytes.

    ``None``, the place of a tensor that a launch does not need, is describable.
    """
    if tensor is None:
        return True
    if tensor.element_size() != 2 or tensor.numel() == 0:
        return False
    return tensor.shape[-1] % 8 == 0 and tensor.data_ptr() % 16 == 0


def describe(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor of a contiguous tensor. The hardware (TMA, sm_90 and later) loads and stores blocks of it."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def execute(launch: Launch) -> None:
    """Runs a launch on the current device (or in Triton's interpreter)."""
    if launch.programs:
        launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants, **launch.options)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[Machine]:
    """The machine of a device, which is the current one meanwhile: kernels launch on the current device."""
    if device.type != "cuda":
        yield Machine("interpreter", execute)
        return
    with torch.cuda.device(device):
        yield Machine("interpreter" if interpreted() else arch_of(device), execute)


@functools.cache
def arch_of(device: torch.device) -> str:
    """The name of a GPU's architecture, as compilers write it."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@triton.jit
def _probe():
    pass


def interpreted() -> bool:
    """Whether kernels were defined under ``TRITON_INTERPRET=1``, Triton's own switch, and so run on CPU tensors."""
    return not isinstance(_probe, triton.runtime.JITFunction)


@functools.cache
def is_sm_90_or_later(arch: str) -> bool:
    """Whether it is NVIDIA's sm_90 or a later one: those with tensor descriptors and dependent launches."""
    number = arch.removeprefix("sm_")
    return number.isdecimal() and int(number) >= 90


def starts_early(arch: str) -> bool:
    """Whether launches may overlap with the one before, which the interpreter cannot do."""
    return is_sm_90_or_later(arch) and not interpreted()
