"""The check of a feed-forward on its own inputs, which it passes before it is timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ffn.inputs import EPS, Inputs
from benchmarks.ffn.peers import FFN, stock_ffn, user_ffn
from benchmarks.harness.correctness import WrongResult, check_close
from mtu_kernels import ExpertWeights, NormAffine, Routing, reference

# Tokens of a sample that are compared: spread over all of it, few enough for float64 on a CPU.
_TOKENS = 512


def assert_matches_reference(function: FFN, inputs: Inputs, residual: bool = False) -> None:
    """Asserts ``max|f − ref64| <= 2 · max|user − ref64| + ulp · max|ref64|`` for y, and for gradients if any are asked.

    The user's code is the stock feed-forward for stock inputs, and `user_ffn` for routed ones.

    The function runs on the whole inputs, and is compared on two samples, the first and the last. The gradient that
    comes back is zero elsewhere, so the exact gradients of all other tokens are zeros, and those of the weights are
    sums over the compared tokens. The ulp is that of the compute dtype for gradients, too, since their summands are
    stored in it. (The tests of `mtu_kernels` use the gradients' own dtype; that takes more numbers than one call has.)

    Args:
        function: x, norm, experts, routing → y.
        inputs: as the contender prepares them. Gradients are checked for all that require them.
        residual: whether the function adds x to y.

    Raises:
        WrongResult: one sentence with the first wrong tensor, its error and the tolerance.
    """
    B, L, _ = inputs.x.shape
    device = inputs.x.device
    samples = torch.tensor(sorted({0, B - 1}), device=device)
    tokens = torch.linspace(0, L - 1, min(L, _TOKENS), device=device).long()
    grad_y = torch.zeros_like(inputs.grad_y)
    grad_y[samples[:, None], tokens] = inputs.grad_y[samples[:, None], tokens]
    widened = _widened(inputs)
    user_code = stock_ffn if inputs.norm.weight.dim() == 1 else user_ffn
    exactly = _reference
    if residual:
        user_code, exactly = _plus_x(user_code), _plus_x(exactly)
    with torch.set_grad_enabled(bool(inputs.leaf_tensors)):
        y, *gradients = _outputs(function, inputs._replace(grad_y=grad_y), inputs.leaf_tensors)
        user = _outputs(user_code, _excerpt(inputs, samples, tokens), inputs.leaf_tensors)
        exact = _outputs(exactly, _excerpt(widened, samples, tokens), widened.leaf_tensors)
    actual = [y[samples[:, None], tokens], *gradients]
    labels = ("y", *(f"the gradient of {name}" for name in inputs.names_of_leaves))
    dtypes = (inputs.x.dtype, *(leaf.dtype for leaf in inputs.leaf_tensors))
    ulp = torch.finfo(inputs.x.dtype).eps
    for label, dtype, *tensors in zip(labels, dtypes, actual, user, exact, strict=True):
        check_close(label, *tensors, dtype=dtype, ulp=ulp)


def _outputs(function: FFN, inputs: Inputs, leaves: Sequence[Tensor]) -> list[Tensor]:
    y = function(*inputs.moe_ffn_arguments)
    if y.shape != inputs.x.shape:
        raise WrongResult(f"y must be {tuple(inputs.x.shape)} as x, got {tuple(y.shape)}.")
    return [y.detach(), *(torch.autograd.grad(y, leaves, inputs.grad_y) if leaves else ())]


def _reference(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> Tensor:
    # A stock affine (D,) is the same for each sample.
    rows = NormAffine(*(t if t.dim() == 2 else t.expand(len(x), -1) for t in norm))
    return reference.moe_ffn(x, rows, experts, routing, eps=EPS)


def _plus_x(function: FFN) -> FFN:
    return lambda x, *others: x + function(x, *others)


def _excerpt(inputs: Inputs, samples: Tensor, tokens: Tensor) -> Inputs:
    """The compared part, as a differentiable function of the whole."""
    x, norm, experts, routing, grad_y = inputs
    affines = (t[samples] if t.dim() == 2 else t for t in norm)
    rows = (None if t is None else t[samples] for t in routing)
    region = samples[:, None], tokens
    return Inputs(x[region], NormAffine(*affines), experts, Routing(*rows), grad_y[region])


def _widened(inputs: Inputs) -> Inputs:
    """Leaves of their own in float64."""

    def widen(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    x, norm, experts, routing, grad_y = inputs
    experts = ExpertWeights(*map(widen, experts[:4]), num_experts=experts.num_experts)
    return Inputs(widen(x), NormAffine(*map(widen, norm)), experts, Routing(*map(widen, routing)), widen(grad_y))
