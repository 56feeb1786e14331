"""The backend "cpp": C++ kernels for CPUs, from the extension that `csrc` is compiled to.

The forward pass is one call into the extension. The backward pass makes its products by the library, whose time they
take, and what lies between them by the extension. y does not depend on the number of threads; the library's products
and sums in the backward pass may, but two passes with the same number give the same gradients.

The extension holds kernels of several levels (instruction sets) and takes the best that the machine has.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.ops import LIBRARY, TENSORS, Ops, call_ops, define_ops, why_not_dtype
from mtu_kernels.routing import Routing

_BEST = 0
# Tokens that kernels compute at a time. With fewer in a sample, ordinary operators are faster.
PANEL = 16

_OPS = define_ops("cpp", adds_residual=True)
# What the extension offers besides: each at a level, counted from the best. They are parts of kernels: no autograd.
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
_kernels = torch.ops.mtu_kernels


def moe_ffn(
    x: Tensor,
    norm: NormAffine,
    experts: ExpertWeights,
    routing: Routing,
    *,
    eps: float = 1e-5,
    recompute: bool = False,
    residual: bool = False,
    level: str | None = None,
) -> Tensor:
    """`mtu_kernels.moe_ffn` for arguments that are already checked.

    Args:
        x, norm, experts, routing, eps, recompute, residual: as for `mtu_kernels.moe_ffn`.
        level: one of ``levels()``; the first by default.
    """
    ops = _OPS if level is None else _ops_at(level)
    return call_ops(ops, x, norm, experts, routing, eps=eps, recompute=recompute, residual=residual)


def why_not_installed() -> str | None:
    """What keeps this installation from running the backend, as a clause; or ``None``."""
    return _EXTENSION.why_not


def why_not(device: torch.device, compute: torch.dtype) -> str | None:
    """What keeps the backend from serving a call on this device in this compute dtype, as a clause; or ``None``."""
    if _EXTENSION.why_not is not None:
        return _EXTENSION.why_not
    if (reason := why_not_dtype(compute)) is not None:
        return reason
    if device.type not in ("cpu", "meta"):
        return f"it runs on CPUs, not on {device.type}"
    return None


def why_slow() -> str | None:
    """What keeps the backend from being faster than ordinary operators, as a clause; or ``None``."""
    if levels()[:1] == ("portable",):
        return "it has no kernels for this processor's vector instructions"
    return None


def levels() -> tuple[str, ...]:
    """The instruction sets that kernels are there for and this machine runs, the best first; none without extension.

    They are ``amx`` (bfloat16 by tiles), ``avx512``, ``avx512_bf16``, ``avx2`` and ``portable``.
    """
    return _EXTENSION.levels


class Extension(NamedTuple):
    """The loaded extension: its levels, or what keeps it from being loaded, as a clause."""

    levels: tuple[str, ...]
    why_not: str | None


def load(folder: Path) -> Extension:
    """Loads the extension from a package's folder, which registers its kernels. It raises nothing."""
    paths = sorted([*folder.glob("_C*.so"), *folder.glob("_C*.dylib")])
    if not paths:
        return Extension((), "its extension was not built when mtu was installed, for want of a compiler or of torch")
    try:
        torch.ops.load_library(paths[0])
        name_of = ctypes.CDLL(str(paths[0])).mtu_level_name
    except (OSError, AttributeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0].removeprefix(f"{paths[0]}: ")
        return Extension((), f"its extension does not load with torch {torch.__version__} ({reason}); reinstall mtu")
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    names = itertools.takewhile(lambda name: name is not None, map(name_of, itertools.count()))
    return Extension(tuple(name.decode() for name in names), None)


_EXTENSION = load(Path(__file__).parent)


@functools.cache
def _ops_at(level: str) -> Ops:
    """Operators of one level, as the backend's own are those of the best."""
    if level not in levels():
        raise ValueError(f"level must be one that this machine runs, {', '.join(levels()) or 'none'}, got {level!r}.")
    number = levels().index(level)
    name = f"cpp_{level}"
    ops = define_ops(name, adds_residual=True)
    LIBRARY.impl(f"moe_ffn_{name}", functools.partial(_kernels.cpp_moe_ffn_at, number), "CPU")
    LIBRARY.impl(f"moe_ffn_{name}_train", functools.partial(_kernels.cpp_train_at, number, True), "CPU")
    LIBRARY.impl(f"moe_ffn_{name}_backward", functools.partial(_backward, number), "CPU")
    return ops


class _Call(NamedTuple):
    """The arguments of a backward pass.

    Attributes:
        x: (B, L, D), contiguous.
        norm: float32 affines (B, slots, D) with a slot for all experts or for each active one.
        experts, weights: as given; weights (B, K) float32.
        active: of each sample the experts of its slots, or ``None``: all of them, in order.
        mean, rstd: (B, L) float32.
        level: number of the kernels' level.
    """

    x: Tensor
    norm: NormAffine
    experts: ExpertWeights
    weights: Tensor
    active: list[list[int]] | None
    mean: Tensor
    rstd: Tensor
    level: int

    @property
    def is_one_product(self) -> bool:
        """Whether all samples and experts go through the same product: dense routing behind one affine."""
        return self.active is None and self.norm.weight.shape[1] == 1

    @property
    def slots(self) -> list[tuple[int, int, int]]:
        """(b, k, e) of every active expert of every sample."""
        B, K = self.weights.shape
        return [(b, k, k if self.active is None else self.active[b][k]) for b in range(B) for k in range(K)]

    def units(self, e: int) -> slice:
        size = self.experts.w_out.shape[1] // self.experts.num_experts
        return slice(e * size, (e + 1) * size)


def _backward(level: int, grad_y: Tensor, *args) -> tuple[Tensor, ...]:
    """The kernel of ``moe_ffn_cpp_backward``; the formulas are in `mtu_kernels.reference_ops`."""
    # Where autograd runs under autocast, it would cast products of float32 in here.
    with torch.autocast("cpu", enabled=False):
        return _gradients(level, grad_y, *args)


def _gradients(level: int, grad_y: Tensor, *args) -> tuple[Tensor, ...]:
    *tensors, hidden, mean, rstd, num_experts, eps, expert_grads = args
    if hidden is None:
        _, hidden, mean, rstd = _kernels.cpp_train_at(level, False, *tensors, num_experts, eps)
    x, gamma, beta, w_in, b_in, w_out, b_out, weights, indices = tensors
    grad_y = grad_y.contiguous()
    call = _Call(
        x.contiguous(),
        NormAffine(*(_by_slot(affine, indices) for affine in (gamma, beta))),
        ExpertWeights(*(t.contiguous() for t in (w_in, b_in, w_out, b_out)), num_experts),
        weights.float().contiguous(),
        None if indices is None else indices.tolist(),
        mean.contiguous(),
        rstd.contiguous(),
        level,
    )
    # ∂(w·a) at first: the kernel puts w·a, if experts learn, in its place.
    h = _output_product_gradient(call, grad_y)
    d_hidden, d_weights, d_b_in = _kernels.cpp_geglu_backward(h, hidden.contiguous(), call.weights, expert_grads, level)
    d_weights = d_weights.sum(dim=1).float()
    grad_y_sum = grad_y.sum(dim=1, dtype=torch.float32)
    if b_out.dim() == 2:
        products_BE = grad_y_sum @ call.experts.b_out.float().T
        d_weights += products_BE if indices is None else products_BE.gather(1, indices.long())
    expert_gradients = [t.new_empty(0) for t in (w_in, b_in, w_out, b_out)]
    if expert_grads:
        expert_gradients = _expert_gradients(call, grad_y, grad_y_sum, h, d_hidden, d_b_in.sum(dim=1))
    del h
    d_x_hat = _input_product_gradient(call, d_hidden)
    d_x, d_gamma, d_beta = _kernels.cpp_norm_backward(
        d_x_hat, call.x, call.mean, call.rstd, call.norm.weight, call.level
    )
    d_norm = [_from_slots(runs.sum(dim=1), gamma.shape, indices) for runs in (d_gamma, d_beta)]
    gradients = (d_x, *d_norm, *expert_gradients, d_weights)
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(gradients, tensors[:-1], strict=True))


def _by_slot(affine: Tensor, indices: Tensor | None) -> Tensor:
    """(B, D) or (B, E, D) → float32 (B, 1, D) or that of the active experts (B, K, D)."""
    affine = affine.float()
    if affine.dim() == 2:
        return affine[:, None].contiguous()
    if indices is None:
        return affine.contiguous()
    return affine.gather(1, indices[:, :, None].expand(-1, -1, affine.shape[2]).long())


def _from_slots(gradient: Tensor, shape: torch.Size, indices: Tensor | None) -> Tensor:
    """(B, slots, D) → the affine's own shape, exact zeros for experts that a sample does not use."""
    if len(shape) == 2:
        return gradient[:, 0]
    if indices is None:
        return gradient
    spread = indices[:, :, None].expand(-1, -1, shape[2]).long()
    return gradient.new_zeros(shape).scatter(1, spread, gradient)


def _output_product_gradient(call: _Call, grad_y: Tensor) -> Tensor:
    """∂(w·a) without the factor w, (B, L, K·F): ``∂y W_out`` over the active experts' columns."""
    B, L, _ = grad_y.shape
    w_out = call.experts.w_out
    if call.active is None:
        return (grad_y.flatten(0, 1) @ w_out).view(B, L, w_out.shape[1])
    size = w_out.shape[1] // call.experts.num_experts
    d_weighted = grad_y.new_empty(B, L, call.weights.shape[1] * size)
    for b, k, e in call.slots:
        d_weighted[b, :, k * size : (k + 1) * size] = grad_y[b] @ w_out[:, call.units(e)]
    return d_weighted


def _input_product_gradient(call: _Call, d_hidden: Tensor) -> Tensor:
    """∂x̂ (B, slots, L, D): ``∂z W_in`` over the active experts' rows, summed over those that share an affine."""
    B, L, D = call.x.shape
    w_in = call.experts.w_in
    if call.is_one_product:
        return (d_hidden.flatten(0, 1) @ w_in).view(B, 1, L, D)
    num_slots = call.norm.weight.shape[1]
    d_x_hat = d_hidden.new_empty(B, num_slots, L, D)
    w_in_2HD = w_in.unflatten(0, (2, -1))
    d_hidden_BL2KF = d_hidden.unflatten(-1, (2, call.weights.shape[1], -1))
    if call.active is None:
        # Each expert behind an affine of its own: one product for all samples.
        for e in range(num_slots):
            rows = w_in_2HD[:, call.units(e)].flatten(0, 1)
            d_x_hat[:, e] = (d_hidden_BL2KF[:, :, :, e].reshape(B * L, rows.shape[0]) @ rows).view(B, L, D)
        return d_x_hat
    # One product for all experts behind the same affine: their sum is rounded once.
    for (b, i), group in itertools.groupby(call.slots, key=lambda slot: (slot[0], slot[1] if num_slots > 1 else 0)):
        _, slots, members = zip(*group, strict=True)
        rows = torch.cat([w_in_2HD[:, call.units(e)] for e in members], dim=1).flatten(0, 1)
        d_x_hat[b, i] = d_hidden_BL2KF[b, :, :, slots[0] : slots[-1] + 1].reshape(L, rows.shape[0]) @ rows
    return d_x_hat


def _expert_gradients(
    call: _Call, grad_y: Tensor, grad_y_sum: Tensor, h: Tensor, d_hidden: Tensor, d_hidden_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂W_in, ∂b_in, ∂W_out and ∂b_out, exact zeros for experts of no sample; the sums are over a sample's tokens."""
    w_in, b_in, w_out, b_out, num_experts = call.experts
    x_hat = _kernels.cpp_normalize(call.x, call.mean, call.rstd, *call.norm, w_in, call.level)
    d_b_in_B2KF = d_hidden_sum.unflatten(-1, (2, call.weights.shape[1], -1))
    if call.active is None:
        d_w_out = grad_y.flatten(0, 1).T @ h.flatten(0, 1)
        d_b_in = d_b_in_B2KF.sum(dim=0).flatten()
        d_b_out = call.weights.T @ grad_y_sum if b_out.dim() == 2 else grad_y_sum.sum(dim=0)
    else:
        d_w_out, d_b_in = torch.zeros_like(w_out), torch.zeros_like(b_in, dtype=torch.float32)
        d_b_out = torch.zeros_like(b_out, dtype=torch.float32) if b_out.dim() == 2 else grad_y_sum.sum(dim=0)
        d_b_in_2EF = d_b_in.view(2, num_experts, -1)
        for b, k, e in call.slots:
            d_b_in_2EF[:, e] += d_b_in_B2KF[b, :, k]
            if b_out.dim() == 2:
                d_b_out[e] += call.weights[b, k] * grad_y_sum[b]
    if call.is_one_product:
        return d_hidden.flatten(0, 1).T @ x_hat.flatten(0, 2), d_b_in, d_w_out, d_b_out
    d_w_in_2HD = torch.zeros_like(w_in).unflatten(0, (2, -1))
    d_hidden_BL2KF = d_hidden.unflatten(-1, (2, call.weights.shape[1], -1))
    h_BLKF = h.unflatten(-1, (call.weights.shape[1], -1))
    for e, slots in itertools.groupby(sorted(call.slots, key=lambda slot: slot[2]), key=lambda slot: slot[2]):
        # One product for all samples of an expert: their sum is rounded once.
        members = [(b, k) for b, k, _ in slots]
        x_hat_ND = torch.cat([x_hat[b, k if x_hat.shape[1] > 1 else 0] for b, k in members])
        d_hidden_N2F = torch.cat([d_hidden_BL2KF[b, :, :, k].flatten(1) for b, k in members])
        d_w_in_2HD[:, call.units(e)] = (d_hidden_N2F.T @ x_hat_ND).unflatten(0, (2, -1))
        if call.active is not None:
            h_NF = torch.cat([h_BLKF[b, :, k] for b, k in members])
            d_w_out[:, call.units(e)] = torch.cat([grad_y[b] for b, _ in members]).T @ h_NF
    return d_w_in_2HD.flatten(0, 1), d_b_in, d_w_out, d_b_out


LIBRARY.impl("moe_ffn_cpp_backward", functools.partial(_backward, _BEST), "CPU")
