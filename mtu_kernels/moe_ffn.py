"""The public operation: check the arguments once, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtu_kernels import eager, reference_ops
from mtu_kernels.arguments import ExpertWeights, NormAffine, check_arguments
from mtu_kernels.routing import Routing

# What runs here. All take (x, norm, experts, routing, *, eps, recompute), already checked.
_BACKENDS: dict[str, Callable[..., Tensor]] = {"eager": eager.moe_ffn, "reference": reference_ops.moe_ffn}
# What some installation may have.
_KNOWN_BACKENDS = ("eager", "reference", "triton", "cpp")


def moe_ffn(
    x: Tensor,
    norm: NormAffine,
    experts: ExpertWeights,
    routing: Routing,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    """LayerNorm, the active experts' GEGLU feed-forwards, and their weighted sum, with routing per sample.

    ``x̂_e = LayerNorm(x[b]) · γ[b,e] + β[b,e]``, ``u_e, g_e = x̂_e W_in,eᵀ + b_in,e``, ``a_e = u_e · gelu(g_e)``,
    ``y[b] = Σ_e w[b,e] · (W_out,e a_e) + bias``, where bias is b_out (D,) once or ``Σ_e w[b,e] · b_out[e]``.

    The compute dtype is that of experts.w_in. Statistics and accumulators are float32 (float64 for float64). Every
    gradient has its input's dtype. Under autocast the experts alone are cast, to the autocast dtype.

    Args:
        x: (B, L, D) compute dtype or float32.
        norm: weight and bias (B, D), or (B, E, D) for an affine per expert; x's dtype or float32.
        experts: w_in (2H, D), b_in (2H,), w_out (D, H), b_out (D,) or (E, D) float32, bfloat16, float16 or float64, and
            the number of experts E, which divides H.
        routing: weights (B, K), x's dtype or float32, and indices (B, K) int32 or int64, distinct for each sample;
            indices ``None``: dense, K = E.
        eps: added to the variance.
        backend: a name in ``available_backends()``, or "auto" for the fastest that serves the call.
        recompute: save the inputs only and compute the hidden units again in the backward pass.

    Returns:
        y (B, L, D) compute dtype, without the residual.

    Raises:
        ValueError: an argument's shape, dtype, device or index values break the rules above, or the backend's name is
            unknown. On CUDA wrong index values raise from the device, at the next synchronisation; under
            ``torch.compile`` they are not looked at.
        RuntimeError: the backend is not part of this installation.

    Source:
        Upcycling Text-to-Image Diffusion Models for Multi-Task Capabilities, arXiv 2503.11905, section 3.
    """
    check_backend(backend)
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        check_arguments(x, norm, experts, routing)
        return _run(backend)(x, norm, experts, routing, eps=eps, recompute=recompute)
    experts = _autocast(experts, torch.get_autocast_dtype(device_type))
    check_arguments(x, norm, experts, routing)
    # Autocast would go on inside and cast the routing weights and norm affines as well.
    with torch.autocast(device_type, enabled=False):
        return _run(backend)(x, norm, experts, routing, eps=eps, recompute=recompute)


def available_backends() -> tuple[str, ...]:
    """The backends that this installation can run, whatever the device."""
    return tuple(_BACKENDS)


def check_backend(name: str) -> None:
    """Checks that a backend may be asked for: "auto", or a name in ``available_backends()``.

    Device, dtype and shape are no matter here: they are checked at each call.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is not part of this installation.
    """
    if name == "auto" or name in _BACKENDS:
        return
    if name not in _KNOWN_BACKENDS:
        known = ", ".join(("auto", *_KNOWN_BACKENDS))
        raise ValueError(f"There is no backend {name!r}: it must be one of {known}.")
    raise RuntimeError(
        f"The backend {name!r} is not part of this installation: available are {', '.join(available_backends())}."
    )


def _run(backend: str) -> Callable[..., Tensor]:
    return _BACKENDS["eager" if backend == "auto" else backend]


def _autocast(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    # As autocast itself does, float64 is left alone.
    if experts.w_in.dtype == torch.float64:
        return experts
    w_in, b_in, w_out, b_out = (tensor.to(dtype) for tensor in experts[:4])
    return ExpertWeights(w_in, b_in, w_out, b_out, experts.num_experts)
