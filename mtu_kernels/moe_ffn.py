"""The public function `moe_ffn`: it checks the arguments, chooses a backend and calls it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtu_kernels import cpp, eager, reference_ops, triton
from mtu_kernels.arguments import ExpertWeights, NormAffine, Options, check_arguments, indices_valid_flag
from mtu_kernels.routing import Routing
from mtu_kernels.tracing import (
    in_transform_or_forward_ad,
    is_exporting_or_tracing,
    is_exporting_to_onnx,
    supports_autocast,
)


class _Backend(NamedTuple):
    """What the public functions need of a backend. Reasons are clauses, or ``None`` if nothing speaks against it.

    Attributes:
        moe_ffn: the public function, for arguments that have been checked.
        why_not_installed: the reason why this installation cannot run the backend.
        why_unsupported: the reason why the backend cannot serve a device and a compute dtype.
        indices_valid_flag: checks expert indices on a GPU.
        why_slower_than_eager: the reason why "auto" prefers PyTorch's operators on this machine.
        min_tokens: "auto" prefers PyTorch's operators for samples with fewer tokens.
    """

    moe_ffn: Callable[..., Tensor]
    why_not_installed: Callable[[], str | None] = lambda: None
    why_unsupported: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    indices_valid_flag: Callable[[Tensor, int], Tensor] = indices_valid_flag
    why_slower_than_eager: Callable[[], str | None] = lambda: None
    min_tokens: int = 0


_BACKENDS = {
    "eager": _Backend(eager.moe_ffn),
    "reference": _Backend(reference_ops.moe_ffn),
    "triton": _Backend(triton.moe_ffn, triton.why_not_installed, triton.why_unsupported, triton.indices_valid_flag),
    "cpp": _Backend(
        cpp.moe_ffn,
        cpp.why_not_installed,
        cpp.why_unsupported,
        why_slower_than_eager=cpp.why_slower_than_eager,
        min_tokens=cpp.MIN_TOKENS,
    ),
}
# The fused backend of each device type.
_FASTEST = {"cuda": "triton", "cpu": "cpp"}


def moe_ffn(
    x: Tensor,
    norm: NormAffine,
    experts: ExpertWeights,
    routing: Routing,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
    recompute: bool = False,
    residual: bool = False,
) -> Tensor:
    """LayerNorm, the active experts' GEGLU feed-forwards, and their weighted sum, with routing per sample.

    ``x̂_e = LayerNorm(x[b]) · γ[b,e] + β[b,e]``, ``u_e, g_e = x̂_e W_in,eᵀ + b_in,e``, ``a_e = u_e · gelu(g_e)``,
    ``y[b] = Σ_e w[b,e] · (W_out,e a_e) + bias``, where bias is b_out (D,) once or ``Σ_e w[b,e] · b_out[e]``.
    With the residual, the result is ``x + y``.

    The compute dtype is that of experts.w_in. Statistics and accumulators are float32 (float64 for float64). Every
    gradient has the dtype of its input. Autocast casts only the experts.

    Args:
        x: (B, L, D) compute dtype or float32.
        norm: weight and bias (B, D), or (B, E, D) for an affine per expert; x's dtype or float32.
        experts: w_in (2H, D), b_in (2H,), w_out (D, H), b_out (D,) or (E, D) float32, bfloat16, float16 or float64, and
            the number of experts E, which divides H.
        routing: weights (B, K), x's dtype or float32, and indices (B, K) int32 or int64, distinct for each sample. If
            indices are ``None``, routing is dense and K = E.
        eps: added to the variance.
        backend: a name in ``available_backends()``, or "auto" for the fastest that serves the call. Fused backends have
            first derivatives only. "eager" has all derivatives, and works under ``torch.func``.
        recompute: whether to save only the inputs, and compute the hidden units again in the backward pass.
        residual: whether to return x + y. If x has the compute dtype, "cpp" and "reference" round this sum once. In all
            other cases, PyTorch adds x and y.

    Returns:
        y (B, L, D) in the compute dtype, or x + y in the dtype that PyTorch gives the sum.

    Raises:
        ValueError: an argument's shape, dtype, device or index values break the rules above, or no backend has the
            name. On CUDA, wrong index values raise from the device at the next synchronisation. Under
            ``torch.compile``, index values are not checked.
        RuntimeError: this installation cannot run the backend, or the backend cannot serve the device or dtype.

    Source:
        Upcycling Text-to-Image Diffusion Models for Multi-Task Capabilities, arXiv 2503.11905, section 3.
    """
    check_backend(backend)
    options = Options(eps, recompute, residual)
    device_type = x.device.type
    if not supports_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        chosen = _choose(backend, x, experts)
        check_arguments(x, norm, experts, routing, chosen.indices_valid_flag)
        return chosen.moe_ffn(x, norm, experts, routing, options)
    experts = _autocast(experts, torch.get_autocast_dtype(device_type))
    chosen = _choose(backend, x, experts)
    check_arguments(x, norm, experts, routing, chosen.indices_valid_flag)
    # Inside the backend, autocast would cast the routing weights and norm affines as well.
    with torch.autocast(device_type, enabled=False):
        return chosen.moe_ffn(x, norm, experts, routing, options)


def warmup(
    x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, *, backward: bool = False, **options: Any
) -> None:
    """Compiles and loads the kernels of a call with these arguments, so that a CUDA graph can capture it.

    Kernels depend on shapes, dtypes and 16-byte alignment, and not on values.

    Args:
        x, norm, experts, routing: as for ``moe_ffn``.
        backward: whether to prepare the forward and backward pass of training as well. Tensors with ``requires_grad``
            are trained; if no tensor has it, all are.
        options: eps, backend, recompute and residual, as for ``moe_ffn``.

    Raises:
        ValueError, RuntimeError: as ``moe_ffn``.
    """
    with torch.no_grad():
        moe_ffn(x, norm, experts, routing, **options)
    if backward:
        given = (x, *norm, *experts[:4], routing.weights)
        train_all = not any(t.requires_grad for t in given)
        x, gamma, beta, w_in, b_in, w_out, b_out, weights = (
            t.detach().requires_grad_(train_all or t.requires_grad) for t in given
        )
        experts = ExpertWeights(w_in, b_in, w_out, b_out, experts.num_experts)
        with torch.enable_grad():
            y = moe_ffn(x, NormAffine(gamma, beta), experts, Routing(weights, routing.indices), **options)
        trained = [t for t in (x, gamma, beta, *experts[:4], weights) if t.requires_grad]
        torch.autograd.grad(y, trained, torch.zeros_like(y))
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def available_backends() -> tuple[str, ...]:
    """The names of the backends that this installation can run on some device."""
    return tuple(name for name, backend in _BACKENDS.items() if backend.why_not_installed() is None)


def check_backend(name: str) -> None:
    """Checks that a name is "auto" or in ``available_backends()``.

    Each call checks whether the backend can serve its device, dtype and shape.

    Args:
        name: the name of a backend.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: this installation cannot run the backend.
    """
    if name == "auto":
        return
    if name not in _BACKENDS:
        raise ValueError(f"There is no backend {name!r}: it must be one of {', '.join(('auto', *_BACKENDS))}.")
    reason = _BACKENDS[name].why_not_installed()
    if reason is not None:
        available = ", ".join(available_backends())
        raise RuntimeError(f"The backend {name!r} cannot run here: {reason}; available are {available}.")


def _choose(backend: str, x: Tensor, experts: ExpertWeights) -> _Backend:
    if backend == "auto":
        return _fastest(x, experts)
    reason = _BACKENDS[backend].why_unsupported(x.device, experts.w_in.dtype)
    if reason is None and backend != "eager" and is_exporting_to_onnx():
        reason = "ONNX does not know its operators, so export with backend='auto' or 'eager'"
    if reason is not None:
        raise RuntimeError(f"The backend {backend!r} cannot serve this call: {reason}.")
    return _BACKENDS[backend]


def _fastest(x: Tensor, experts: ExpertWeights) -> _Backend:
    name = _FASTEST.get(x.device.type)
    if name is None or _wants_plain_operators():
        return _BACKENDS["eager"]
    backend = _BACKENDS[name]
    if backend.min_tokens and x.shape[1] < backend.min_tokens:
        return _BACKENDS["eager"]
    reason = backend.why_unsupported(x.device, experts.w_in.dtype)
    if reason is None:
        reason = backend.why_slower_than_eager()
    if reason is None:
        return backend
    if not torch.compiler.is_compiling():
        _log_once(f"backend='auto' takes 'eager' on {x.device} instead of {name!r}: {reason}.")
    return _BACKENDS["eager"]


def _wants_plain_operators() -> bool:
    """Whether the call is recorded for other runtimes, or transformed in a way that fused operators do not support."""
    return is_exporting_or_tracing() or (not torch.compiler.is_compiling() and in_transform_or_forward_ad())


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger("mtu_kernels").warning(message)


def _autocast(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    # Autocast never casts float64.
    if experts.w_in.dtype == torch.float64:
        return experts
    w_in, b_in, w_out, b_out = (tensor.to(dtype) for tensor in experts[:4])
    return ExpertWeights(w_in, b_in, w_out, b_out, experts.num_experts)
