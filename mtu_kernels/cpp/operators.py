"""The operators of the backend "cpp": their schemas, and the backward kernels, which are in Python.

The extension registers the other kernels when it is loaded. A level is an instruction set. Operators count levels from
0, the fastest that this machine runs.
"""

from __future__ import annotations

import functools

import torch

from mtu_kernels.cpp.backward import compute_gradients
from mtu_kernels.cpp.extension import EXTENSION
from mtu_kernels.ops import LIBRARY, TENSORS, Ops, define_ops

_FASTEST = 0

OPS = define_ops("cpp", adds_residual=True)
LIBRARY.impl("moe_ffn_cpp_backward", functools.partial(compute_gradients, _FASTEST), "CPU")

# These operators run at a chosen level, or are steps of the backward pass. They have no gradients.
for _schema in (
    f"cpp_moe_ffn_at(int level, {TENSORS}, int num_experts, float eps, bool residual=False) -> Tensor",
    f"cpp_train_at(int level, bool with_y, {TENSORS}, int num_experts, float eps, bool residual=False) "
    "-> (Tensor y, Tensor hidden, Tensor mean, Tensor rstd)",
    "cpp_geglu_backward(Tensor(a!) d_weighted, Tensor hidden, Tensor routing_weights, bool expert_grads, int level) "
    "-> (Tensor d_hidden, Tensor d_weights, Tensor d_b_in)",
    "cpp_normalize(Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, Tensor like, int level) "
    "-> Tensor",
    "cpp_norm_backward(Tensor d_x_hat, Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, int level) "
    "-> (Tensor d_x, Tensor d_norm_weight, Tensor d_norm_bias)",
):
    LIBRARY.define(_schema)


@functools.cache
def ops_of_instruction_set(level: str) -> Ops:
    """The operators of one level. `OPS` are those of the fastest.

    Raises:
        ValueError: this machine does not have the level.
    """
    if level not in EXTENSION.instruction_sets:
        available = ", ".join(EXTENSION.instruction_sets) or "none"
        raise ValueError(f"level must be one that this machine runs, {available}, got {level!r}.")
    number = EXTENSION.instruction_sets.index(level)
    name = f"cpp_{level}"
    ops = define_ops(name, adds_residual=True)
    kernels = torch.ops.mtu_kernels
    LIBRARY.impl(f"moe_ffn_{name}", functools.partial(kernels.cpp_moe_ffn_at, number), "CPU")
    LIBRARY.impl(f"moe_ffn_{name}_train", functools.partial(kernels.cpp_train_at, number, True), "CPU")
    LIBRARY.impl(f"moe_ffn_{name}_backward", functools.partial(compute_gradients, number), "CPU")
    return ops
