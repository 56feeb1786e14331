"""Whether a program is being exported, and what exported programs need that others do not."""

import torch


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work, rather than ``torch.compile`` or neither. Compilers may ask, too."""
    if not torch.compiler.is_compiling():
        return False
    from mtu_kernels import constant_answers

    return constant_answers.is_exporting()


def becomes_program() -> bool:
    """Whether this call becomes part of a program that other runtimes may read: ``torch.export``, ``torch.jit.trace``
    and both exporters to ONNX."""
    return is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing()


def is_exporting_to_onnx() -> bool:
    """Whether one of the exporters of ``torch.onnx`` is at work. Where it is not, torch.onnx is not even imported."""
    if not becomes_program():
        return False
    if not torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    from mtu_kernels import constant_answers

    return constant_answers.is_exporting_to_onnx()


def fixed(size: int) -> int:
    """A size that is the same at every call, such as a width, as a number.

    ``torch.jit.trace`` hands out sizes as tensors. Where these are part of a shape, ONNX gets operators that compute
    them, and has none for the width of a normalisation.
    """
    return int(size) if torch.jit.is_tracing() else size
