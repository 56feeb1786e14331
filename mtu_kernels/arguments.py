"""The arguments of `moe_ffn`, and the one place that checks them. `Routing` is in `routing.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from mtu_kernels.routing import Routing


class NormAffine(NamedTuple):
    """The affine part of LayerNorm, gathered per sample.

    Attributes:
        weight: (B, D), or (B, E, D) where each expert has its own affine. x's dtype or float32.
        bias: the shape of weight. x's dtype or float32.
    """

    weight: Tensor
    bias: Tensor


class ExpertWeights(NamedTuple):
    """All experts of one FFN, in the layout of a stock GEGLU feed-forward with H = E·F hidden units.

    Expert e owns the hidden units [e·F, (e+1)·F), which are rows of both halves of w_in and columns of w_out.

    Attributes:
        w_in: (2H, D) compute dtype. The rows of the H values come first, then those of the H gates.
        b_in: (2H,) compute dtype.
        w_out: (D, H) compute dtype.
        b_out: (D,), which is added once, or (E, D), where each row is multiplied by the weight of its expert. Compute
            dtype.
        num_experts: E.
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    num_experts: int


class Options(NamedTuple):
    """How a backend computes a call, as for `mtu_kernels.moe_ffn`.

    Attributes:
        eps: added to the variance.
        recompute: whether the backward pass computes the hidden units again.
        residual: whether the result is x + y.
    """

    eps: float = 1e-5
    recompute: bool = False
    residual: bool = False


COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(
    x: Tensor,
    norm: NormAffine,
    experts: ExpertWeights,
    routing: Routing,
    are_valid: Callable[[Tensor, int], Tensor] | None = None,
) -> None:
    """Raises on the first argument that breaks a tensor rule of `moe_ffn`.

    Shapes, dtypes and devices are compared on the host, and become guards under torch.compile. Index values are checked
    only where that needs neither a synchronisation nor a graph break.

    Args:
        x, norm, experts, routing: as for `moe_ffn`.
        are_valid: the function that checks indices on a GPU, `indices_valid_flag` by default.

    Raises:
        ValueError: an argument breaks a rule. The message names the argument, the expected and the given value.
    """
    _check_are_tensors(x, norm, experts, routing)
    _check_shapes(x, norm, experts, routing)
    _check_dtypes(x, norm, experts, routing)
    _check_devices(x, norm, experts, routing)
    if routing.indices is not None and has_values(routing.indices):
        _check_index_values(routing.indices, experts.num_experts, are_valid or indices_valid_flag)


def _check_are_tensors(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> None:
    named = [("x", x), *(("norm." + name, t) for name, t in norm._asdict().items())]
    named += [("experts." + name, t) for name, t in experts._asdict().items() if name != "num_experts"]
    for name, tensor in (*named, ("routing.weights", routing.weights)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}.")


def _check_shapes(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> None:
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be (B, L, D) with D >= 1, got {tuple(x.shape)}.")
    B, _, D = x.shape
    E = experts.num_experts
    if experts.w_out.dim() != 2 or experts.w_out.shape[0] != D:
        raise ValueError(f"experts.w_out must be (D, H) with D = {D} as in x, got {tuple(experts.w_out.shape)}.")
    H = experts.w_out.shape[1]
    if E < 1 or H < 1 or H % E != 0:
        raise ValueError(f"experts.num_experts must divide the hidden width H = {H} of w_out, got {E}.")
    _check_shape("experts.w_in", experts.w_in, "(2H, D)", (2 * H, D))
    _check_shape("experts.b_in", experts.b_in, "(2H,)", (2 * H,))
    _check_shape("experts.b_out", experts.b_out, "(D,) or (E, D)", (D,), (E, D))
    _check_shape("norm.weight", norm.weight, "(B, D) or (B, E, D)", (B, D), (B, E, D))
    if norm.bias.shape != norm.weight.shape:
        raise ValueError(
            f"norm.bias must have the shape of norm.weight {tuple(norm.weight.shape)}, got {tuple(norm.bias.shape)}."
        )
    if routing.indices is None:
        _check_shape("routing.weights", routing.weights, "(B, E) as routing.indices is None", (B, E))
        return
    if routing.weights.dim() != 2 or routing.weights.shape[0] != B or not 1 <= routing.weights.shape[1] <= E:
        raise ValueError(
            f"routing.weights must be (B, K) with B = {B} and 1 <= K <= E = {E}, got {tuple(routing.weights.shape)}."
        )
    _check_shape("routing.indices", routing.indices, "(B, K) as routing.weights", tuple(routing.weights.shape))


def _check_shape(name: str, tensor: Tensor, symbols: str, *allowed: tuple[int, ...]) -> None:
    if not any(tensor.shape == shape for shape in allowed):
        expected = " or ".join(str(tuple(shape)) for shape in allowed)
        raise ValueError(f"{name} must be {symbols} = {expected}, got {tuple(tensor.shape)}.")


def _check_dtypes(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> None:
    compute = experts.w_in.dtype
    if compute not in COMPUTE_DTYPES:
        raise ValueError(f"experts.w_in must be float32, bfloat16, float16 or float64, got {compute}.")
    for name in ("b_in", "w_out", "b_out"):
        dtype = getattr(experts, name).dtype
        if dtype != compute:
            raise ValueError(f"experts.{name} must have the compute dtype {compute} of experts.w_in, got {dtype}.")
    if x.dtype not in (compute, torch.float32):
        raise ValueError(f"x must be in the compute dtype {compute} of experts.w_in or float32, got {x.dtype}.")
    for name, tensor in (
        ("norm.weight", norm.weight),
        ("norm.bias", norm.bias),
        ("routing.weights", routing.weights),
    ):
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must be in the dtype {x.dtype} of x or float32, got {tensor.dtype}.")
    if routing.indices is not None and routing.indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"routing.indices must be int32 or int64, got {routing.indices.dtype}.")


def _check_devices(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> None:
    for group, value in (("norm", norm), ("experts", experts), ("routing", routing)):
        for name, tensor in value._asdict().items():
            if isinstance(tensor, Tensor) and tensor.device != x.device:
                raise ValueError(f"{group}.{name} must be on the device {x.device} of x, got {tensor.device}.")


def has_values(tensor: Tensor) -> bool:
    """Whether the host can read the tensor's values: not while tracing, nor for fake, meta or vmapped tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta:
        return False
    # Subclasses of Tensor, such as FakeTensor, FunctionalTensor and DTensor, hold no values that can be read here.
    return type(tensor) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(tensor)


def indices_valid_flag(indices: Tensor, num_experts: int) -> Tensor:
    """Whether indices (B, K) lie in [0, E) and are distinct for each sample, as a flag () bool on their device.

    They are valid if and only if, summed over samples, B·K experts are named exactly once by their sample.
    """
    all_experts = torch.arange(num_experts, device=indices.device, dtype=indices.dtype)
    used_once = (indices[:, :, None] == all_experts).sum(dim=1) == 1
    return used_once.sum() == indices.numel()


def _check_index_values(indices: Tensor, num_experts: int, are_valid: Callable[[Tensor, int], Tensor]) -> None:
    if indices.is_cuda:
        # Reading a flag would wait for the GPU. Instead, the assertion runs on the GPU, in order with the kernels.
        torch._assert_async(
            are_valid(indices, num_experts),
            f"routing.indices must lie in [0, E = {num_experts}) and name an expert at most once for each sample.",
        )
        return
    # For a few numbers, Python is faster than operators.
    rows = indices.tolist()
    values = [value for row in rows for value in row]
    if any(not 0 <= value < num_experts for value in values):
        raise ValueError(
            f"routing.indices must lie in [0, E = {num_experts}), got values from {min(values)} to {max(values)}."
        )
    if any(len(set(row)) < len(row) for row in rows):
        raise ValueError("routing.indices must name an expert at most once for each sample, got repeated indices.")
