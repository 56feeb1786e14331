"""The operators of all fused backends: their schemas, fake kernels, autograd rules and FLOP formulas.

`define_ops("name")` defines three operators without kernels:

- ``mtu_kernels::moe_ffn_name`` returns y only. Its gradient saves only its inputs, and the backward operator computes
  the rest again, as ``recompute=True`` asks.
- ``mtu_kernels::moe_ffn_name_train`` returns y, and ``hidden``, ``mean`` and ``rstd`` for the backward pass.
- ``mtu_kernels::moe_ffn_name_backward`` returns the gradients of every floating-point input.

A backend adds only kernels: in Python with ``LIBRARY.impl("moe_ffn_name", kernel, "CUDA")``, in C++ with
``TORCH_LIBRARY_IMPL(mtu_kernels, CPU, m)``. Schemas are in Python, so that the package imports without the extension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from mtu_kernels.arguments import ExpertWeights, NormAffine, Options
from mtu_kernels.routing import Routing
from mtu_kernels.tracing import in_transform_or_forward_ad

LIBRARY = torch.library.Library("mtu_kernels", "DEF")

TENSORS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, "
    "Tensor routing_weights, Tensor? expert_indices"
)
NUM_TENSORS = 9
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Ops(NamedTuple):
    """The forward operators of one backend. Their arguments are those of `moe_ffn`, flattened.

    Attributes:
        inference: returns y.
        train: returns y, hidden, mean and rstd.
        adds_residual: whether both take the argument ``residual``.
    """

    inference: torch._ops.OpOverload
    train: torch._ops.OpOverload
    adds_residual: bool


def define_ops(backend: str, *, adds_residual: bool = False) -> Ops:
    """Defines the operators of a backend without their kernels.

    The kernels must do the following, with K = E if ``expert_indices`` is ``None``:

    - ``moe_ffn_{backend}(x, ..., num_experts, eps) -> y``: y (B, L, D) compute dtype, contiguous.
    - ``moe_ffn_{backend}_train(x, ..., num_experts, eps) -> (y, hidden, mean, rstd)``: hidden (B, L, 2·K·F) compute
      dtype, the pre-activations ``[values; gates]`` of the active experts in the order of the indices; mean and rstd
      (B, L) float32 (float64 for float64), the statistics of LayerNorm.
    - ``moe_ffn_{backend}_backward(grad_y, x, ..., hidden, mean, rstd, num_experts, eps, expert_grads) -> 8 gradients``:
      each has the shape and dtype of its input and is contiguous. hidden, mean and rstd are all given or all ``None``;
      if they are ``None``, the kernel computes them again. If ``expert_grads`` is false, the experts are frozen, and
      their four gradients have no elements. grad_y may have any strides.

    Outputs share no memory with each other or with inputs.

    With ``adds_residual`` the first two take ``bool residual=False`` as their last argument. If it is true, they return
    x + y, rounded once, and x has the compute dtype. (torch passes Python kernels no argument that has its default.)

    Args:
        backend: the suffix of the operators' names.
        adds_residual: whether the kernels of this backend add the residual.

    Returns:
        The two forward operators.
    """
    name = f"moe_ffn_{backend}"
    tags = (torch.Tag.pt2_compliant_tag,)
    forward = f"({TENSORS}, int num_experts, float eps{', bool residual=False' if adds_residual else ''})"
    LIBRARY.define(f"{name}{forward} -> Tensor", tags=tags)
    LIBRARY.define(f"{name}_train{forward} -> (Tensor y, Tensor hidden, Tensor mean, Tensor rstd)", tags=tags)
    LIBRARY.define(
        f"{name}_backward(Tensor grad_y, {TENSORS}, Tensor? hidden, Tensor? mean, Tensor? rstd, int num_experts, "
        f"float eps, bool expert_grads) -> ({', '.join(['Tensor'] * 8)})",
        tags=tags,
    )
    packets = [getattr(torch.ops.mtu_kernels, name + suffix) for suffix in ("", "_train", "_backward")]
    fakes = (_fake_inference, _fake_train, _fake_backward)
    formulas = (_inference_flops, _train_flops, _backward_flops)
    for packet, fake, formula in zip(packets, fakes, formulas, strict=True):
        torch.library.register_fake(packet.default, fake, lib=LIBRARY)
        register_flop_formula(packet)(formula)
    _register_autograd(*(packet.default for packet in packets))
    return Ops(packets[0].default, packets[1].default, adds_residual)


def why_dtype_unsupported(compute: torch.dtype) -> str | None:
    """The reason why fused kernels do not compute in this dtype, as a clause; or ``None`` if they do."""
    if compute in _FUSED_DTYPES:
        return None
    return f"it computes in float32, bfloat16 and float16, not in {str(compute).removeprefix('torch.')}"


def call_ops(
    ops: Ops, x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, options: Options
) -> Tensor:
    """`mtu_kernels.moe_ffn` with the operators of a backend, for arguments that have been checked.

    The training operator runs only if gradients are recorded and ``recompute`` is false. If the operators do not add
    the residual, PyTorch adds it, so that a compiler may fuse the sum with the next operator.

    Raises:
        NotImplementedError: a function transform (``torch.func``) or forward-mode differentiation is under way.
    """
    eps, recompute, residual = options
    tensors = (x, *norm, *experts[:4], *routing)
    _refuse_transforms(ops, tensors)
    is_fused = residual and ops.adds_residual and x.dtype == experts.w_in.dtype
    arguments = (*tensors, experts.num_experts, eps, *((True,) if is_fused else ()))
    y = ops.train(*arguments)[0] if autograd_records(tensors) and not recompute else ops.inference(*arguments)
    return x + y if residual and not is_fused else y


def autograd_records(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_transforms(ops: Ops, tensors: tuple[Tensor | None, ...]) -> None:
    """Raises where torch would return zero derivatives, or fail with a message that names no remedy."""
    if torch.compiler.is_compiling() or not in_transform_or_forward_ad():
        return
    transform = peek_interpreter_stack()
    if transform is None:
        if not any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            return
        what = "forward-mode differentiation"
    else:
        what = f"functional transforms ({transform.key().name})"
    raise NotImplementedError(f"{ops.train} has no rule for {what}: use backend='eager', which has one.")


def _register_autograd(
    inference: torch._ops.OpOverload, train: torch._ops.OpOverload, backward: torch._ops.OpOverload
) -> None:
    def save_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:NUM_TENSORS])
        ctx.options = inputs[NUM_TENSORS:]

    def backward_of_inference(ctx, grad_y):
        return gradients(ctx, grad_y, ctx.saved_tensors, (None, None, None))

    def save_inputs_and_outputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:NUM_TENSORS], *output[1:])
        ctx.options = inputs[NUM_TENSORS:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward_of_train(ctx, grad_y, *_):
        if grad_y is None:
            return (None,) * (NUM_TENSORS + len(ctx.options))
        # The saved tensors are read once, because checkpointing unpacks each of them once.
        saved = ctx.saved_tensors
        return gradients(ctx, grad_y, saved[:NUM_TENSORS], saved[NUM_TENSORS:])

    def gradients(ctx, grad_y, tensors, saved):
        num_experts, eps, *residual = ctx.options
        expert_grads = any(ctx.needs_input_grad[3:7])
        grads = list(backward(grad_y, *tensors, *saved, num_experts, eps, expert_grads))
        if not expert_grads:
            grads[3:7] = [None] * 4
        if any(residual) and ctx.needs_input_grad[0]:
            grads[0] = grads[0] + grad_y
        return *grads, None, *(None for _ in ctx.options)

    def no_second_derivative(ctx, *grads):
        raise NotImplementedError(f"{backward} has no second derivative: use backend='eager', which has one.")

    register = torch.library.register_autograd
    register(inference, backward_of_inference, setup_context=save_inputs, lib=LIBRARY)
    register(train, backward_of_train, setup_context=save_inputs_and_outputs, lib=LIBRARY)
    # Without this, differentiating twice would give silent zeros.
    register(backward, no_second_derivative, lib=LIBRARY)


def _active_hidden(w_out_shape: torch.Size, weights_shape: torch.Size, num_experts: int) -> int:
    return w_out_shape[1] // num_experts * weights_shape[1]


def _fake_inference(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, weights, indices, *options):
    return x.new_empty(x.shape, dtype=w_in.dtype)


def _fake_train(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, weights, indices, num_experts, *options):
    hidden_shape = (*x.shape[:2], 2 * _active_hidden(w_out.shape, weights.shape, num_experts))
    statistics = torch.promote_types(w_in.dtype, torch.float32)
    return (
        x.new_empty(x.shape, dtype=w_in.dtype),
        x.new_empty(hidden_shape, dtype=w_in.dtype),
        x.new_empty(x.shape[:2], dtype=statistics),
        x.new_empty(x.shape[:2], dtype=statistics),
    )


def _fake_backward(grad_y, *args):
    expert_grads = args[-1]
    x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, weights = args[: NUM_TENSORS - 1]
    experts = [t.new_empty(t.shape if expert_grads else (0,)) for t in (w_in, b_in, w_out, b_out)]
    x_and_norm = [t.new_empty(t.shape) for t in (x, norm_weight, norm_bias)]
    return (*x_and_norm, *experts, weights.new_empty(weights.shape))


def _product_flops(x_shape, w_out_shape, weights_shape, num_experts: int) -> int:
    """The FLOPs of the products with w_in and w_out over the active experts."""
    B, L, D = x_shape
    active_hidden = _active_hidden(w_out_shape, weights_shape, num_experts)
    return 2 * B * L * D * (2 * active_hidden) + 2 * B * L * active_hidden * D


def _inference_flops(*args, out_shape=None) -> int:
    x, _, _, _, _, w_out, _, weights, _, num_experts, *_ = args
    return _product_flops(x, w_out, weights, num_experts)


def _train_flops(*args, out_shape=None) -> int:
    return _inference_flops(*args)


def _backward_flops(*args, out_shape=None) -> int:
    _, x, _, _, _, _, w_out, _, weights, _, hidden, _, _, num_experts, _, expert_grads = args
    forward = _product_flops(x, w_out, weights, num_experts)
    # The backward pass computes only the first product again, which is two thirds of the forward pass.
    recomputed = 0 if hidden is not None else forward // 3 * 2
    return (2 if expert_grads else 1) * forward + recomputed
