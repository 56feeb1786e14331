"""Whether a program is being exported."""

import torch


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work, rather than ``torch.compile`` or neither. Compilers may ask, too."""
    if not torch.compiler.is_compiling():
        return False
    from mtu_kernels import constant_answers

    return constant_answers.is_exporting()
