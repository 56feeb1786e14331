"""Kernel launches as values, and the machine that runs them.

The operators build launches and pass each to `LaunchDevice.run_launch`. On a GPU, `execute_launch` runs it at once.
Benchmarks and tests build launches on tensors without memory and collect them, to see which kernels a call runs on any
architecture.
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
        num_programs: the size of the one-dimensional grid. With 0 programs, nothing runs.
        arguments: the run-time arguments in order, with ``None`` for tensors that the call does not need.
        constant_arguments: the ``tl.constexpr`` arguments by name.
        num_warps: the number of warps of a program.
        num_stages: the depth of software pipelining.
        may_overlap_previous: whether it may start while the launch before it still runs (programmatic dependent launch,
            sm_90 and later). The kernel itself then waits before it reads what that launch writes.
        product_name: the matrix product that it computes, a name in `tiles.PRODUCTS`; ``None`` for other kernels.
    """

    kernel: Any
    num_programs: int
    arguments: tuple
    constant_arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    may_overlap_previous: bool = False
    product_name: str | None = None

    @property
    def compiler_options(self) -> dict[str, Any]:
        """The compiler's options. Compilers for AMD do not have the one for dependent launches."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"launch_pdl": True} if self.may_overlap_previous else options


class LaunchDevice(NamedTuple):
    """The device that launches are built for, and the function that runs them.

    Attributes:
        arch: the architecture, such as "sm_90" or "gfx942", or "interpreter" for Triton's interpreter.
        run_launch: called with each launch in turn.
    """

    arch: str
    run_launch: Callable[[Launch], None]


# Triton has these two as well, for kernels. On the host they are about twenty times slower.
def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n, for n > 0; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


def floor_power_of_2(n: int) -> int:
    """The greatest power of two that is not greater than n, for n > 0."""
    return 1 << n.bit_length() - 1


def fits_tensor_descriptor(tensor: Tensor | None) -> bool:
    """Whether a tensor descriptor can describe a contiguous tensor: its address and rows are multiples of 16 bytes.

    ``None``, the place of a tensor that a launch does not need, is describable.
    """
    if tensor is None:
        return True
    if tensor.element_size() != 2 or tensor.numel() == 0:
        return False
    return tensor.shape[-1] % 8 == 0 and tensor.data_ptr() % 16 == 0


def make_descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor of a contiguous tensor. The hardware (TMA, sm_90 and later) loads and stores blocks of it."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def execute_launch(launch: Launch) -> None:
    """Runs a launch on the current device (or in Triton's interpreter)."""
    if launch.num_programs:
        launch.kernel[(launch.num_programs,)](*launch.arguments, **launch.constant_arguments, **launch.compiler_options)


@contextlib.contextmanager
def current_launch_device(device: torch.device) -> Iterator[LaunchDevice]:
    """Makes a device the current one, on which Triton launches kernels, and gives its machine."""
    if device.type != "cuda":
        yield LaunchDevice("interpreter", execute_launch)
        return
    with torch.cuda.device(device):
        yield LaunchDevice("interpreter" if is_interpreted() else arch_of(device), execute_launch)


@functools.cache
def arch_of(device: torch.device) -> str:
    """The name of a GPU's architecture, as compilers spell it."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@triton.jit
def _probe():
    pass


def is_interpreted() -> bool:
    """Whether kernels run on CPU tensors, because Triton's own variable ``TRITON_INTERPRET`` was 1 at their import."""
    return not isinstance(_probe, triton.runtime.JITFunction)


@functools.cache
def is_sm_90_or_later(arch: str) -> bool:
    """Whether an architecture is NVIDIA's sm_90 or later, which have tensor descriptors and dependent launches."""
    number = arch.removeprefix("sm_")
    return number.isdecimal() and int(number) >= 90


def supports_launch_overlap(arch: str) -> bool:
    """Whether a launch may start before the previous one has ended. The interpreter cannot do that."""
    return is_sm_90_or_later(arch) and not is_interpreted()
