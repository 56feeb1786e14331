"""What only a GPU can show: `python -m pytest tests/mtu_kernels -m gpu`, from a plain checkout."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.products import ProductShape, draw_operands, prepare_product
from benchmarks.kernels.tile_measure import assert_matches_reference
from benchmarks.kernels.tile_measure import reference_outputs as reference_of
from mtu_kernels import NormAffine, Routing, dense_weights, moe_ffn, reference, warmup
from mtu_kernels.triton.launch import execute_launch
from mtu_kernels.triton.tiles import TileConfig

from .moe_ffn_cases import Problem, Sizes, assert_as_exact_as_eager, make_problem
from .places import Place, why_not_most_of_a_gpu

pytestmark = pytest.mark.gpu
TRITON = Place("triton", "cuda")
# D, L, F of the FFNs of SD 1.5 and SDXL, and one that no tile divides.
SHAPES = [(320, 4096, 4), (640, 1024, 8), (1280, 256, 4), (1280, 64, 8), (328, 333, 4)]


def large_problem(D: int, L: int, E: int, seed: int = 0, **options) -> Problem:
    return TRITON.move(make_problem(seed, Sizes(2, L, D, E, 4 * D // E, options.pop("K", None)), **options))


def triton(*arguments, **options):
    return moe_ffn(*arguments, backend="triton", **options)


@pytest.mark.parametrize("options", [{}, {"expert_norm": True, "expert_bias": True}], ids=["norm", "expert_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [None, 2], ids=["dense", "top2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_stable_diffusion(shape, K, dtype, options):
    """With the shipped tiles; maxima are over so many numbers that one seed is enough."""
    problem = large_problem(*shape, dtype=dtype, affine_dtype=torch.float32, K=K, **options)
    assert_as_exact_as_eager(triton, [problem])


@pytest.mark.parametrize("K", [None, 2], ids=["dense", "top2"])
def test_the_same_bits_every_time(K):
    problem = large_problem(320, 1024, 8, dtype=torch.bfloat16, K=K).requires_grad()

    def gradients(recompute):
        y = triton(*problem.arguments, recompute=recompute)
        return torch.autograd.grad(y, problem.tensors, problem.grad_y.detach())

    first = gradients(False)
    for recompute in (False, True, False):
        assert all(torch.equal(a, b) for a, b in zip(gradients(recompute), first, strict=True))


@pytest.mark.parametrize("K", [None, 2], ids=["dense", "top2"])
def test_one_cuda_graph_serves_all_routings(K):
    problem, other = (large_problem(640, 256, 8, seed, dtype=torch.bfloat16, K=K) for seed in (0, 1))
    warmup(*problem.arguments, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = triton(*problem.arguments)
    changed = problem._replace(norm=other.norm, routing=other.routing)
    expected = triton(*changed.arguments)
    for old, new in zip((*problem.norm, *problem.routing), (*other.norm, *other.routing), strict=True):
        if old is not None:
            old.copy_(new)
    graph.replay()
    assert torch.equal(y, expected)


def test_a_cuda_graph_of_training():
    problem = large_problem(320, 256, 4, dtype=torch.bfloat16).requires_grad()
    grad_y = problem.grad_y.detach()
    warmup(*problem.arguments, backend="triton", backward=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(triton(*problem.arguments), problem.tensors, grad_y)
    graph.replay()
    expected = torch.autograd.grad(triton(*problem.arguments), problem.tensors, grad_y)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("K", [None, 2], ids=["dense", "top2"])
def test_the_host_never_waits(K):
    problem = large_problem(320, 64, 8, dtype=torch.bfloat16, K=K).requires_grad()
    warmup(*problem.arguments, backend="triton", backward=True)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(triton(*problem.arguments), problem.tensors, problem.grad_y.detach())
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def most_of_a_gpu():
    def memory():
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()

    reason = why_not_most_of_a_gpu(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"), memory)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("most_of_a_gpu")
@pytest.mark.parametrize("K", [None, 1], ids=["dense", "top1"])
def test_more_elements_than_32_bits_count(K):
    """z has 2^32 elements: rows at its end are as right as they are alone."""
    D, H, rows = 64, 1024, 512
    L = 2**32 // (2 * H * 2) * (1 if K is None else 4) + rows
    small = make_problem(0, Sizes(2, rows, D, 4, H // 4, K), dtype=torch.bfloat16, affine_dtype=torch.float32)
    small = TRITON.move(small)
    x = torch.zeros(2, L, D, dtype=torch.bfloat16, device="cuda")
    grad_y = torch.zeros_like(x)
    x[:, -rows:], grad_y[:, -rows:] = small.x, small.grad_y
    large = small._replace(x=x, grad_y=grad_y)
    outputs = []
    for problem in (small, large):
        leaf = problem.x.detach().requires_grad_()
        y = triton(leaf, *problem.arguments[1:])
        (d_x,) = torch.autograd.grad(y, leaf, problem.grad_y)
        outputs.append((y[:, -rows:].detach().clone(), d_x[:, -rows:].clone()))
        del y, d_x
    for a, b in zip(*outputs, strict=True):
        # Other tiles may add in another order.
        assert (a.float() - b.float()).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.float().abs().max()


def test_tf32_only_when_torch_allows_it():
    problem = large_problem(320, 256, 8, dtype=torch.float32, K=2)
    exact = reference.moe_ffn(*problem.map(Tensor.double).arguments)
    before = torch.get_float32_matmul_precision()
    errors = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors.append((triton(*problem.arguments) - exact).abs().max().item())
    finally:
        torch.set_float32_matmul_precision(before)
    # TF32 keeps 10 of 23 bits.
    assert errors[0] < 2**-16 < 2**-14 < errors[1]


def test_top_k_of_all_experts_is_dense():
    problem = large_problem(320, 256, 4, dtype=torch.bfloat16)
    order = torch.stack([torch.randperm(4) for _ in range(2)]).cuda()
    by_index = Routing(problem.routing.weights.gather(1, order), order.int())
    assert torch.equal(dense_weights(by_index, 4), problem.routing.weights)
    dense, sparse = (triton(*problem._replace(routing=r).arguments).float() for r in (problem.routing, by_index))
    assert (dense - sparse).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * dense.abs().max()


def test_auto_is_triton():
    problem = large_problem(320, 64, 4, dtype=torch.bfloat16)
    assert torch.equal(moe_ffn(*problem.arguments), triton(*problem.arguments))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    problem = large_problem(320, 64, 4, dtype=torch.bfloat16)
    expected = triton(*problem.arguments)
    moved = problem.map(lambda t: t.to("cuda:1"))
    assert torch.equal(triton(*moved.arguments).cuda(), expected)


@pytest.mark.parametrize("indices", [[[0, 4]], [[-1, 0]], [[2, 2]]], ids=["large", "negative", "twice"])
def test_wrong_indices_raise_from_the_device(indices):
    """In a process of its own: a device-side assertion ends the use of the GPU."""
    code = (
        "import torch; from mtu_kernels import moe_ffn, Routing; "
        "from tests.mtu_kernels.moe_ffn_cases import make_problem, Sizes; "
        "from tests.mtu_kernels.places import Place; "
        "p = Place('triton', 'cuda').move(make_problem(0, Sizes(B=1, K=2))); "
        f"r = Routing(p.routing.weights, torch.tensor({indices}, device='cuda')); "
        "moe_ffn(p.x, p.norm, p.experts, r, backend='triton'); torch.cuda.synchronize()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "routing.indices must lie in [0, E = 4)" in result.stderr or "device-side assert" in result.stderr


def test_routings_of_a_batch_are_independent():
    """A mixed batch gives each sample what it gets alone."""
    problem = large_problem(320, 256, 8, dtype=torch.bfloat16, K=2)
    mixed = triton(*problem.arguments)
    for b in range(2):
        rows = slice(b, b + 1)
        norm = NormAffine(*(t[rows] for t in problem.norm))
        routing = Routing(*(t[rows] for t in problem.routing))
        alone = triton(problem.x[rows], norm, problem.experts, routing)
        # One sample may be given other tiles than two, which add in another order.
        assert (alone - mixed[rows]).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * mixed.abs().max()


@pytest.mark.parametrize(
    "shape", [ProductShape(1280, 1024, 2, 4, None, 1280), ProductShape(320, 77, 3, 4, None, 320)], ids=str
)
@pytest.mark.parametrize(
    "tile",
    [
        TileConfig(256, 96, 64, 8, 3, descriptors=True),
        pytest.param(
            TileConfig(128, 64, 64, 4, 5, descriptors=True, persistent=True),
            marks=pytest.mark.skipif(
                torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="It is for sm_90."
            ),
        ),
    ],
    ids=["wide", "persistent"],
)
def test_first_product_with_tiles_that_the_interpreter_cannot_show(tile, shape):
    """More tiles than multiprocessors, and fewer; rows of several samples in one tile."""
    operands = draw_operands(shape, "bf16", "cuda")
    work = prepare_product("expert_in", operands, tile)
    work.outputs["h"].fill_(float("nan"))
    work.run(execute_launch)
    assert_matches_reference(work.outputs, reference_of("expert_in", operands), torch.bfloat16)
