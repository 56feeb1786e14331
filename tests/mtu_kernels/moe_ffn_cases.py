"""Problems for `moe_ffn`, and the rule by which a backend is right. Shared by the tests of all backends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtu_kernels import ExpertWeights, NormAffine, Routing, dense_weights, reference

NAMES = ("x", "norm.weight", "norm.bias", "w_in", "b_in", "w_out", "b_out", "routing.weights")


class Problem(NamedTuple):
    """One call of `moe_ffn`, and the gradient that comes back to it."""

    x: Tensor
    norm: NormAffine
    experts: ExpertWeights
    routing: Routing
    eps: float
    grad_y: Tensor

    @property
    def arguments(self) -> tuple[Tensor, NormAffine, ExpertWeights, Routing]:
        return self.x, self.norm, self.experts, self.routing

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What may have a gradient, in the order of NAMES."""
        return self.x, *self.norm, *self.experts[:4], self.routing.weights

    @property
    def op_arguments(self) -> tuple:
        return self.x, *self.norm, *self.experts[:4], *self.routing, self.experts.num_experts, self.eps

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with every floating-point tensor passed through a function."""
        return Problem(
            function(self.x),
            NormAffine(*map(function, self.norm)),
            ExpertWeights(*map(function, self.experts[:4]), self.experts.num_experts),
            Routing(function(self.routing.weights), self.routing.indices),
            self.eps,
            function(self.grad_y),
        )

    def requires_grad(self) -> Problem:
        return self.map(lambda t: t.detach().requires_grad_())


class Sizes(NamedTuple):
    B: int = 3
    L: int = 13
    D: int = 16
    E: int = 4
    F: int = 6
    K: int | None = None


DENSE = Sizes()
# For what is asked of a call besides its numbers.
SMALL = Sizes(B=2, L=5, D=8, F=3)


def make_problem(
    seed: int = 0,
    sizes: Sizes = DENSE,
    *,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    affine_dtype: torch.dtype | None = None,
    expert_norm: bool = False,
    expert_bias: bool = False,
    eps: float = 1e-5,
) -> Problem:
    """A random problem: inputs of variance 1, weights over sqrt(fan-in), everything rounded to its storage dtype.

    ``affine_dtype`` is that of the norm affines and the routing weights. It is x's by default.
    """
    B, L, D, E, size, K = sizes
    H = E * size
    x_dtype = x_dtype or dtype
    affine_dtype = affine_dtype or x_dtype
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, to: torch.dtype = dtype, fan_in: int = 1) -> Tensor:
        # Drawn in float64, so that a problem is the same one, rounded differently, in every dtype.
        unit = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (unit * (3 / fan_in) ** 0.5).to(to)

    norm_shape = (B, E, D) if expert_norm else (B, D)
    norm = NormAffine(1 + uniform(*norm_shape, to=affine_dtype) / 2, uniform(*norm_shape, to=affine_dtype) / 2)
    b_out_shape = (E, D) if expert_bias else (D,)
    experts = ExpertWeights(
        uniform(2 * H, D, fan_in=D), uniform(2 * H), uniform(D, H, fan_in=H), uniform(*b_out_shape), num_experts=E
    )
    weights = torch.softmax(uniform(B, K or E, to=torch.float64), dim=-1).to(affine_dtype)
    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)]) if K and B else None
    if K and indices is None:
        indices = torch.empty(0, K, dtype=torch.int64)
    routing = Routing(weights, None if indices is None else indices.to(torch.int32))
    return Problem(uniform(B, L, D, to=x_dtype), norm, experts, routing, eps, uniform(B, L, D))


def user_moe_ffn(
    x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing, *, eps: float, residual: bool = False
) -> Tensor:
    """What a user would write: the stock feed-forward, its hidden units weighed; every step in the compute dtype."""
    if residual:
        return x + user_moe_ffn(x, norm, experts, routing, eps=eps)
    w_in, b_in, w_out, b_out, E = experts
    dtype = w_in.dtype
    n = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    weights = dense_weights(routing, E).to(dtype)
    gamma, beta = (t.to(dtype) for t in norm)
    if gamma.dim() == 2:
        u, g = F.linear(n * gamma[:, None] + beta[:, None], w_in, b_in).chunk(2, dim=-1)
    else:
        x_hats = [n * gamma[:, e, None] + beta[:, e, None] for e in range(E)]
        slices = list(zip(w_in.chunk(2 * E), b_in.chunk(2 * E), strict=True))
        u = torch.cat([F.linear(x_hat, *part) for x_hat, part in zip(x_hats, slices[:E], strict=True)], dim=-1)
        g = torch.cat([F.linear(x_hat, *part) for x_hat, part in zip(x_hats, slices[E:], strict=True)], dim=-1)
    h = u * F.gelu(g) * weights.repeat_interleave(w_out.shape[1] // E, dim=1)[:, None]
    if b_out.dim() == 1:
        return F.linear(h, w_out, b_out)
    return F.linear(h, w_out) + (weights @ b_out)[:, None]


def forward_and_gradients(
    function: Callable[..., Tensor], problem: Problem, *, inference: bool = False
) -> list[Tensor]:
    """y, then the gradients in the order of NAMES; for inference y alone."""
    if inference:
        with torch.no_grad():
            return [function(*problem.arguments, eps=problem.eps)]
    problem = problem.requires_grad()
    y = function(*problem.arguments, eps=problem.eps)
    gradients = torch.autograd.grad(y, problem.tensors, problem.grad_y.detach(), allow_unused=True)
    # B = 0: nothing depends on the weights.
    pairs = zip(gradients, problem.tensors, strict=True)
    return [y.detach(), *(torch.zeros_like(t) if grad is None else grad for grad, t in pairs)]


def assert_as_exact_as_eager(
    function: Callable[..., Tensor], problems: Iterable[Problem], *, residual: bool = False, inference: bool = False
) -> None:
    """``max|f − ref64| <= 2 · max|user − ref64| + ulp · max|ref64|`` over the problems, for y and every gradient.

    For inference, without recording gradients, for y alone.
    """
    assert_all_as_exact_as_eager({"moe_ffn": function}, problems, residual=residual, inference=inference)


def assert_all_as_exact_as_eager(
    functions: Mapping[str, Callable[..., Tensor]],
    problems: Iterable[Problem],
    *,
    residual: bool = False,
    inference: bool = False,
) -> None:
    """`assert_as_exact_as_eager` for each of several functions, by names that a failure tells."""
    rows = {label: [] for label in functions}
    ulps = []
    asked = {"residual": True} if residual else {}
    for problem in problems:
        compute = functools.partial(forward_and_gradients, inference=inference)
        user = compute(functools.partial(user_moe_ffn, **asked), problem)
        exact = compute(functools.partial(reference.moe_ffn, **asked), problem.map(Tensor.double))
        stored = (problem.grad_y, *(() if inference else problem.tensors))
        ulps = [torch.finfo(t.dtype).eps for t in stored]
        for label, function in functions.items():
            actual = compute(functools.partial(function, **asked), problem)
            assert [(t.dtype, t.shape) for t in actual] == [(t.dtype, t.shape) for t in stored], label
            triples = zip(actual, user, exact, strict=True)
            rows[label].append([[_max_abs(a - e), _max_abs(u - e), _max_abs(e)] for a, u, e in triples])
    names = ("y",) if inference else ("y", *NAMES)
    for label, errors in rows.items():
        # Tensor.amax, and not max(), which loses NaN.
        maxima = torch.tensor(errors, dtype=torch.float64).amax(dim=0).tolist()
        for name, (error, user_error, scale), ulp in zip(names, maxima, ulps, strict=True):
            message = f"{label}, {name}: {error:.3g}, user's {user_error:.3g}, max {scale:.3g}"
            assert error <= 2 * user_error + ulp * scale, message


def _max_abs(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
