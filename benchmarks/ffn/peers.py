"""The contenders: the original, a loop over experts, this library's backends, compilers, and the bare products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ffn.inputs import EPS, Inputs
from benchmarks.harness.contenders import ALL, Contender, RunMode
from mtu_kernels import ExpertWeights, NormAffine, Routing, cpp, dense_weights, moe_ffn
from mtu_kernels.arguments import Options

FFN = Callable[[Tensor, NormAffine, ExpertWeights, Routing], Tensor]


def stock_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> Tensor:
    """LayerNorm and GEGLU feed-forward as diffusers executes them: one affine (D,), all in the compute dtype.

    It ignores the routing: its time is that of the original model.
    """
    w_in, b_in, w_out, b_out, _ = experts
    x_hat = F.layer_norm(x, x.shape[-1:], *norm, eps=EPS)
    hidden, gate = F.linear(x_hat, w_in, b_in).chunk(2, dim=-1)
    return F.linear(hidden * F.gelu(gate), w_out, b_out)


def user_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> Tensor:
    """A user's first version: the stock feed-forward with weighed hidden units, all in the compute dtype.

    It does the work of inactive experts, too. Its error sets the tolerance of all others; it is not timed.
    """
    w_in, b_in, w_out, b_out, E = experts
    hidden, gate = F.linear(_normalized(x, norm), w_in, b_in).chunk(2, dim=-1)
    weights = dense_weights(routing, E).to(x.dtype)
    weighed = hidden * F.gelu(gate) * weights.repeat_interleave(w_out.shape[1] // E, dim=1)[:, None]
    return F.linear(weighed, w_out, b_out)


def loop_ffn(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> Tensor:
    """A loop over the experts. With top-k each one selects its samples, for which the host waits for the device."""
    w_in, b_in, w_out, b_out, E = experts
    x_hat = _normalized(x, norm)
    weights = routing.weights.to(x.dtype)
    # One view for each expert, all from one operation: the gradients are then stacked once, not padded E times.
    inputs = zip(*(t.unflatten(0, (2, E, -1)).flatten(0, 1).unbind() for t in (w_in, b_in)), strict=True)
    inputs = list(inputs)
    outputs = w_out.unflatten(1, (E, -1)).unbind(1)
    y = b_out.expand_as(x)
    for e in range(E):
        if routing.indices is None:
            y = y + weights[:, e, None, None] * _expert(x_hat, inputs[e], inputs[E + e], outputs[e])
            continue
        samples, slots = (routing.indices == e).nonzero(as_tuple=True)
        if len(samples):
            out = _expert(x_hat[samples], inputs[e], inputs[E + e], outputs[e])
            y = y.index_add(0, samples, weights[samples, slots, None, None] * out)
    return y


def _expert(x_hat: Tensor, values: tuple[Tensor, Tensor], gates: tuple[Tensor, Tensor], w_out: Tensor) -> Tensor:
    return F.linear(F.linear(x_hat, *values) * F.gelu(F.linear(x_hat, *gates)), w_out)


def _normalized(x: Tensor, norm: NormAffine) -> Tensor:
    gamma, beta = (t.to(x.dtype)[:, None] for t in norm)
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * gamma + beta


def _routed_eager(x: Tensor, norm: NormAffine, experts: ExpertWeights, routing: Routing) -> Tensor:
    return moe_ffn(x, norm, experts, routing, eps=EPS, backend="eager")


def unchanged_inputs(inputs: Inputs) -> Inputs:
    return inputs


def to_stock_inputs(inputs: Inputs) -> Inputs:
    """The inputs of the original model: one task, one expert of weight 1, an affine (D,) in the compute dtype."""
    gamma, beta = (t[0].detach().to(inputs.x.dtype).requires_grad_(t.requires_grad) for t in inputs.norm)
    one = Routing(torch.ones_like(inputs.routing.weights[:, :1]))
    return inputs._replace(norm=NormAffine(gamma, beta), experts=inputs.experts._replace(num_experts=1), routing=one)


def to_folded_inputs(inputs: Inputs) -> Inputs:
    """The stock feed-forward with the output of the first sample's task: columns of w_out times its dense weights."""
    w_out = inputs.experts.w_out
    columns = inputs.routing.weights[0].repeat_interleave(w_out.shape[1] // inputs.experts.num_experts)
    folded = (w_out.detach() * columns.detach()).to(w_out.dtype).requires_grad_(w_out.requires_grad)
    return to_stock_inputs(inputs._replace(experts=inputs.experts._replace(w_out=folded)))


class Implementation(NamedTuple):
    """The code of a contender.

    Attributes:
        function: x, norm, experts, routing → y. None: the bare products, whose results mean nothing.
        prepare_inputs: changes the inputs before anything is timed.
        backend: of `mtu_kernels`, which an installation may lack.
        recompute: whether the backward pass computes hidden units again.
        instruction_set: instruction set of its kernels, where it is not the best that the processor has.
        synchronizes_for_top_k: whether top-k routing makes the host wait, so that no CUDA graph can hold it.
        adds_residual: whether x is added to y.
    """

    function: FFN | None
    prepare_inputs: Callable[[Inputs], Inputs] = unchanged_inputs
    backend: str | None = None
    recompute: bool = False
    instruction_set: str | None = None
    synchronizes_for_top_k: bool = False
    adds_residual: bool = False


def make_function(contender: Contender) -> FFN | None:
    """The function to call; compiled for the shapes of its first call, and never with dynamic shapes."""
    function = contender.implementation.function
    if contender.run_mode is None:
        return function
    return torch.compile(function, mode=contender.run_mode.compile_mode, dynamic=False, fullgraph=True)


def _backend(name: str, recompute: bool) -> Contender:
    about = f"this library's backend {name!r}" + (", hidden units recomputed in the backward pass" * recompute)
    function = functools.partial(moe_ffn, eps=EPS, backend=name, recompute=recompute)
    return Contender(about, Implementation(function, backend=name, recompute=recompute), ALL)


def _level(name: str) -> Contender:
    function = functools.partial(cpp.moe_ffn, options=Options(EPS), level=name)
    return Contender(
        f"this library's backend 'cpp', its kernels for {name}", Implementation(function, instruction_set=name), ALL
    )


def _with_residual(name: str) -> dict[str, Contender]:
    def add(*arguments: Any) -> Tensor:
        return arguments[0] + moe_ffn(*arguments, eps=EPS, backend=name)

    fused = functools.partial(moe_ffn, eps=EPS, backend=name, residual=True)
    about = f"this library's backend {name!r}, x added"
    ways = {"add": (add, "by an operator of its own"), "residual": (fused, "by residual=True")}
    return {
        f"mtu-{name}-{way}": Contender(
            f"{about} {how}", Implementation(function, backend=name, adds_residual=True), ALL
        )
        for way, (function, how) in ways.items()
    }


_COMPILE = RunMode("compile", "compiled", "default")
# Minutes for each shape.
TUNED = RunMode("max", "compiled with max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs")
_EAGER, _FOLDED = Implementation(_routed_eager), Implementation(stock_ffn, to_folded_inputs)
CONTENDERS: dict[str, Contender] = {
    "products": Contender(
        "the bare matrix products into preallocated outputs: the floor", Implementation(None), ("K",)
    ),
    "eager": Contender("the stock diffusers feed-forward, without routing", Implementation(stock_ffn, to_stock_inputs)),
    "loop": Contender("a loop over the experts", Implementation(loop_ffn, synchronizes_for_top_k=True), ALL),
    **{f"mtu-{name}": _backend(name, recompute=False) for name in ("eager", "triton", "cpp")},
    **{f"mtu-{name}-recompute": _backend(name, recompute=True) for name in ("eager", "triton", "cpp")},
    **_with_residual("cpp"),
    **_with_residual("triton"),
    **{f"mtu-cpp@{name}": _level(name) for name in ("avx512", "avx512_bf16", "avx2", "portable")},
    "compile-routed": Contender("the routed eager code, compiled", _EAGER, ALL, _COMPILE),
    "compile-routed-max": Contender(f"the routed eager code, {TUNED.description}", _EAGER, ALL, TUNED),
    "compile-folded": Contender("the folded stock feed-forward, compiled", _FOLDED, run_mode=_COMPILE),
    "compile-folded-max": Contender(f"the folded stock feed-forward, {TUNED.description}", _FOLDED, run_mode=TUNED),
}


def default_contender_names() -> tuple[str, ...]:
    """Contenders that are measured by default: all but those that are tuned, or of a level of their own."""
    return tuple(
        name for name, c in CONTENDERS.items() if c.run_mode != TUNED and c.implementation.instruction_set is None
    )


def make_calls(function: FFN | None, sets: Sequence[Inputs], direction: str) -> list[Callable[[], Any]]:
    """For each set of prepared inputs a call without arguments: the outputs, the gradients, or both."""
    if function is None:
        return make_product_calls(sets, direction)
    bound = {"forward": _forward, "backward": _backward, "forward+backward": _forward_backward}[direction]
    return [bound(function, inputs) for inputs in sets]


def _forward(function: FFN, inputs: Inputs) -> Callable[[], Any]:
    return torch.no_grad()(functools.partial(function, *inputs.moe_ffn_arguments))


def _backward(function: FFN, inputs: Inputs) -> Callable[[], Any]:
    y, leaves, grad_y = function(*inputs.moe_ffn_arguments), inputs.leaf_tensors, inputs.grad_y
    return lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True)


def _forward_backward(function: FFN, inputs: Inputs) -> Callable[[], Any]:
    arguments, leaves, grad_y = inputs.moe_ffn_arguments, inputs.leaf_tensors, inputs.grad_y
    return lambda: torch.autograd.grad(function(*arguments), leaves, grad_y)


def make_product_calls(sets: Sequence[Inputs], direction: str) -> list[Callable[[], Any]]:
    """The products over the K/E of the hidden units that are active: two forward, with their biases; four backward.

    All sets share the results and the hidden units, as those of other contenders share the allocator's blocks.
    """
    x, _, experts, routing, _ = sets[0]
    D, H = experts.w_out.shape
    H = H * routing.weights.shape[1] // experts.num_experts
    BL = x.shape[0] * x.shape[1]
    # One product's result is not the next one's operand: GEGLU and its derivative lie between them.
    generator = torch.Generator(x.device).manual_seed(0)
    options = {"generator": generator, "dtype": x.dtype, "device": x.device}
    h, d_z = torch.randn(BL, H, **options), torch.randn(BL, 2 * H, **options)
    z, y = x.new_empty(BL, 2 * H), x.new_empty(BL, D)
    d_h, d_x_hat = torch.empty_like(h), torch.empty_like(y)
    d_w_in, d_w_out = experts.w_in.new_empty(2 * H, D), experts.w_out.new_empty(D, H)

    def bound(inputs: Inputs) -> Callable[[], None]:
        x_hat, grad_y = inputs.x.detach().flatten(0, 1), inputs.grad_y.flatten(0, 1)
        w_in, b_in, w_out, b_out = (t.detach() for t in inputs.experts[:4])
        w_in, b_in, w_out = w_in[: 2 * H], b_in[: 2 * H], w_out[:, :H].contiguous()

        def products() -> None:
            if direction != "backward":
                torch.addmm(b_in, x_hat, w_in.T, out=z)
                torch.addmm(b_out, h, w_out.T, out=y)
            if direction != "forward":
                torch.mm(grad_y, w_out, out=d_h)
                torch.mm(grad_y.T, h, out=d_w_out)
                torch.mm(d_z, w_in, out=d_x_hat)
                torch.mm(d_z.T, x_hat, out=d_w_in)

        return products

    return [bound(inputs) for inputs in sets]
