"""The answers of torch about exporting as constants.

Compilers alone import this module: the mark that makes them take a result as constant loads the whole of torch's
compiler, which takes as long as importing torch.
"""

import torch


# Left to itself, the compiler of torch 2.11 takes this for true in everything that it compiles.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    return torch.compiler.is_exporting()


# Left to itself, the compiler takes this for false.
@torch.compiler.assume_constant_result
def is_exporting_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()
