"""The answer of torch about exporting as a constant.

Compilers alone import this module: the mark that makes them take a result as constant loads the whole of torch's
compiler, which takes as long as importing torch.
"""

import torch


# Left to itself, the compiler of torch 2.11 takes this for true in everything that it compiles.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    return torch.compiler.is_exporting()
