"""Tensor descriptors: blocks of a tensor that the hardware fetches by itself (TMA, sm_90 and later)."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def describable(tensor: Tensor | None) -> bool:
    """Whether a contiguous tensor's address and rows are multiples of 16 bytes, which descriptors ask for."""
    if tensor is None:
        return True
    if tensor.element_size() != 2 or tensor.numel() == 0:
        return False
    return tensor.shape[-1] % 8 == 0 and tensor.data_ptr() % 16 == 0


def describe(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor of a contiguous tensor whose loads and stores have the shape block."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
