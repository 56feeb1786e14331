"""What `moe_ffn` refuses, and in which words; what it takes without looking."""

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtu_kernels import available_backends, check_backend, moe_ffn

from .moe_ffn_cases import Sizes, make_problem

DENSE, TOP_2 = make_problem(0), make_problem(0, Sizes(K=2))
ZEROS = torch.zeros


def norm(weight, bias=None):
    return DENSE._replace(norm=DENSE.norm._replace(weight=weight, bias=weight if bias is None else bias))


def experts(problem=DENSE, **changes):
    return problem._replace(experts=problem.experts._replace(**changes))


def routing(weights=TOP_2.routing.weights, indices=TOP_2.routing.indices):
    return DENSE._replace(routing=DENSE.routing._replace(weights=weights, indices=indices))


INDICES = {
    "indices of another shape": (ZEROS(3, 1, dtype=torch.int32), "be (B, K) as routing.weights = (3, 2), got (3, 1)"),
    "indices that are not integers": (TOP_2.routing.indices.float(), "be int32 or int64, got torch.float32"),
    "indices of int16": (TOP_2.routing.indices.short(), "be int32 or int64, got torch.int16"),
    "an index below zero": (torch.tensor([[0, 1], [-1, 2], [1, 2]]), "lie in [0, E = 4), got values from -1 to 2"),
    "an index too large": (torch.tensor([[0, 1], [3, 4], [1, 2]]), "lie in [0, E = 4), got values from 0 to 4"),
    "an expert twice": (
        torch.tensor([[0, 1], [3, 3], [1, 2]]),
        "name an expert at most once for each sample, got repeated indices",
    ),
}
REFUSED = {
    "no bias": (experts(b_in=None), "experts.b_in must be a tensor, got NoneType."),
    "x of two dimensions": (DENSE._replace(x=DENSE.x[0]), "x must be (B, L, D) with D >= 1, got (13, 16)."),
    "x without width": (DENSE._replace(x=DENSE.x[..., :0]), "x must be (B, L, D) with D >= 1, got (3, 13, 0)."),
    "w_out of another width": (
        experts(w_out=ZEROS(15, 24)),
        "experts.w_out must be (D, H) with D = 16 as in x, got (15, 24).",
    ),
    "w_out of one dimension": (
        experts(w_out=ZEROS(16)),
        "experts.w_out must be (D, H) with D = 16 as in x, got (16,).",
    ),
    "experts that do not divide H": (
        experts(num_experts=5),
        "experts.num_experts must divide the hidden width H = 24 of w_out, got 5.",
    ),
    "no experts": (experts(num_experts=0), "experts.num_experts must divide the hidden width H = 24 of w_out, got 0."),
    "no hidden units": (
        experts(w_out=ZEROS(16, 0)),
        "experts.num_experts must divide the hidden width H = 0 of w_out, got 4.",
    ),
    "w_in without gates": (experts(w_in=ZEROS(24, 16)), "experts.w_in must be (2H, D) = (48, 16), got (24, 16)."),
    "w_in transposed": (experts(w_in=ZEROS(16, 48)), "experts.w_in must be (2H, D) = (48, 16), got (16, 48)."),
    "b_in too short": (experts(b_in=ZEROS(24)), "experts.b_in must be (2H,) = (48,), got (24,)."),
    "b_out of other experts": (
        experts(b_out=ZEROS(3, 16)),
        "experts.b_out must be (D,) or (E, D) = (16,) or (4, 16), got (3, 16).",
    ),
    "norm not per sample": (
        norm(ZEROS(16)),
        "norm.weight must be (B, D) or (B, E, D) = (3, 16) or (3, 4, 16), got (16,).",
    ),
    "norm of another batch": (
        norm(ZEROS(2, 16)),
        "norm.weight must be (B, D) or (B, E, D) = (3, 16) or (3, 4, 16), got (2, 16).",
    ),
    "norm of two forms": (
        norm(ZEROS(3, 16), ZEROS(3, 4, 16)),
        "norm.bias must have the shape of norm.weight (3, 16), got (3, 4, 16).",
    ),
    "dense weights of too few experts": (
        routing(ZEROS(3, 2), None),
        "routing.weights must be (B, E) as routing.indices is None = (3, 4), got (3, 2).",
    ),
    "no active expert": (
        routing(ZEROS(3, 0), ZEROS(3, 0, dtype=torch.int32)),
        "routing.weights must be (B, K) with B = 3 and 1 <= K <= E = 4, got (3, 0).",
    ),
    "more active experts than experts": (
        routing(ZEROS(3, 5), ZEROS(3, 5, dtype=torch.int32)),
        "routing.weights must be (B, K) with B = 3 and 1 <= K <= E = 4, got (3, 5).",
    ),
    "weights of another batch": (
        routing(ZEROS(2, 2)),
        "routing.weights must be (B, K) with B = 3 and 1 <= K <= E = 4, got (2, 2).",
    ),
    **{
        name: (routing(indices=indices), f"routing.indices must {message}.")
        for name, (indices, message) in INDICES.items()
    },
    "integer experts": (
        experts(w_in=DENSE.experts.w_in.int()),
        "experts.w_in must be float32, bfloat16, float16 or float64, got torch.int32.",
    ),
    "experts of two dtypes": (
        experts(b_out=DENSE.experts.b_out.half()),
        "experts.b_out must have the compute dtype torch.float32 of experts.w_in, got torch.float16.",
    ),
    "x in neither dtype": (
        DENSE._replace(x=DENSE.x.bfloat16()),
        "x must be in the compute dtype torch.float32 of experts.w_in or float32, got torch.bfloat16.",
    ),
    "norm in neither dtype": (
        norm(DENSE.norm.weight.half()),
        "norm.weight must be in the dtype torch.float32 of x or float32, got torch.float16.",
    ),
    "routing in neither dtype": (
        routing(DENSE.routing.weights.half(), None),
        "routing.weights must be in the dtype torch.float32 of x or float32, got torch.float16.",
    ),
    "another device": (
        experts(w_out=DENSE.experts.w_out.to("meta")),
        "experts.w_out must be on the device cpu of x, got meta.",
    ),
    "indices on another device": (
        routing(indices=TOP_2.routing.indices.to("meta")),
        "routing.indices must be on the device cpu of x, got meta.",
    ),
}


@pytest.mark.parametrize(("problem", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(problem, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moe_ffn(*problem.arguments)


def test_backend_names():
    assert available_backends()[0] == "eager"
    for name in ("auto", *available_backends()):
        check_backend(name)
    with pytest.raises(
        ValueError, match=r"^There is no backend 'cuda': it must be one of auto, eager, .*triton, cpp\.$"
    ):
        check_backend("cuda")
    with pytest.raises(ValueError, match="There is no backend"):
        moe_ffn(*DENSE.arguments, backend="Eager")


@pytest.mark.parametrize("name", sorted({"triton", "cpp"} - set(available_backends())))
def test_backends_that_are_not_there(name):
    available = ", ".join(available_backends())
    words = f"^The backend {name!r} cannot run here: it.*; available are {available}.$"
    with pytest.raises(RuntimeError, match=words):
        check_backend(name)
    with pytest.raises(RuntimeError, match=words):
        moe_ffn(*DENSE.arguments, backend=name)


@pytest.mark.parametrize(("tokens", "fastest"), [(15, "eager"), (16, "cpp"), (40, "cpp")])
def test_auto_is_the_fastest_that_is_there(tokens, fastest):
    problem = make_problem(0, Sizes(L=tokens))
    fastest = fastest if fastest in available_backends() else "eager"
    assert torch.equal(moe_ffn(*problem.arguments), moe_ffn(*problem.arguments, backend=fastest))


@pytest.mark.parametrize("backend", available_backends())
def test_tensors_without_values(backend):
    """Meta and fake tensors have shapes and dtypes alone: index values must not be asked for."""

    def check(x, gamma, beta, w_in, b_in, w_out, b_out, weights, indices, num_experts, eps):
        experts = type(DENSE.experts)(w_in, b_in, w_out, b_out, num_experts)
        routing = type(DENSE.routing)(weights, indices)
        y = moe_ffn(x, type(DENSE.norm)(gamma, beta), experts, routing, eps=eps, backend=backend)
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)

    check(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in TOP_2.op_arguments))
    with FakeTensorMode() as mode:
        check(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in TOP_2.op_arguments))


def test_gradients_by_functional_transforms():
    def loss(x):
        return moe_ffn(x, *TOP_2.arguments[1:], backend="eager").square().sum()

    x = TOP_2.x.clone().requires_grad_()
    loss(x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(TOP_2.x), x.grad)


def test_maps_over_routings():
    """Under vmap the indices are many at once: their values are not to be had."""

    def call(indices):
        return moe_ffn(*TOP_2.arguments[:3], TOP_2.routing._replace(indices=indices), backend="eager")

    several = torch.stack([TOP_2.routing.indices, TOP_2.routing.indices.flip(0)])
    expected = torch.stack([call(indices) for indices in several])
    torch.testing.assert_close(torch.func.vmap(call)(several), expected)


@pytest.mark.slow
def test_imports_without_triton_and_without_diffusers():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['diffusers'] = sys.modules['mtu'] = None; import mtu_kernels; "
        "print(mtu_kernels.available_backends())"
    )
    assert "eager" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
