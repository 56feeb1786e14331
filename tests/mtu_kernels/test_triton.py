"""What is particular to the backend "triton": tiles of all architectures, memory, repeatability, refusals."""

import functools
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton as triton_package
import triton.language as tl
from torch import Tensor

from benchmarks.ffn.training_memory import count_step_bytes
from benchmarks.harness.workloads import Setting, Workload
from benchmarks.kernels.products import ProductShape, draw_operands, prepare_product
from mtu_kernels import ExpertWeights, available_backends, moe_ffn, reference, triton, warmup
from mtu_kernels.arguments import indices_valid_flag
from mtu_kernels.moe_ffn import _fastest
from mtu_kernels.triton import operators
from mtu_kernels.triton.kernels.activation import normal_cdf
from mtu_kernels.triton.launch import LaunchDevice, execute_launch
from mtu_kernels.triton.tiles import LIBRARY, TileConfig

from .moe_ffn_cases import NAMES, Sizes, forward_and_gradients, make_problem, user_moe_ffn
from .places import PLACES

TRITON_PLACES = [param for param in PLACES if param.values[0].backend == "triton"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")

FORMS = {
    "dense": (None, {}),
    "top2": (2, {}),
    "dense_per_expert": (None, {"expert_norm": True, "expert_bias": True}),
    "top2_per_expert": (2, {"expert_norm": True, "expert_bias": True}),
}


@pytest.mark.slow
def test_only_the_first_call_imports_the_kernels():
    code = "import sys, mtu_kernels; assert 'mtu_kernels.triton.launch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_operators(arch, problem, run=execute_launch):
    """y and gradients, y and gradients recomputed, with the tiles of an architecture."""
    call = operators.build_call(LaunchDevice(arch, run), problem.op_arguments[:9], problem.experts.num_experts)
    y, *saved = operators.run_training_forward(call, problem.eps)
    recomputed = operators.compute_gradients(call, problem.grad_y, None, problem.eps, True)
    return [y, *operators.compute_gradients(call, problem.grad_y, saved, problem.eps, True)], [
        operators.run_inference(call, problem.eps),
        *recomputed,
    ]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(("K", "options"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(
    ("arch", "dtype"),
    # Other architectures launch the kernels of sm_80 or sm_90. Of those, sm_86 has tiles of sizes that neither has.
    [("sm_80", torch.float16), ("sm_86", torch.float16), ("sm_90", torch.float16), ("sm_90", torch.float32)],
    ids=str,
)
def test_the_tiles_of_architectures(arch, dtype, K, options):
    """Large tiles over few tokens: masks, tensor descriptors and library products, where these tiles choose them."""
    rows = []
    for seed in range(1 if dtype == torch.float16 else 2):
        problem = make_problem(seed, Sizes(2, 40, 32, 3, 32, K), dtype=dtype, **options)
        saved, recomputed = run_operators(arch, problem)
        assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))
        user = forward_and_gradients(user_moe_ffn, problem)
        exact = forward_and_gradients(reference.moe_ffn, problem.map(Tensor.double))
        triples = zip(saved, user, exact, strict=True)
        rows.append([((a - e).abs().max(), (u - e).abs().max(), e.abs().max()) for a, u, e in triples])
    maxima = torch.tensor(rows).amax(dim=0)
    for name, (error, user_error, scale) in zip(("y", *NAMES), maxima.tolist(), strict=True):
        assert error <= 2 * user_error + torch.finfo(dtype).eps * scale, name


@interpreted
@pytest.mark.parametrize(
    ("F", "tile", "kernel"),
    [
        # Rows of both samples in one tile, whose columns belong to one expert.
        (64, TileConfig(64, 32, 16, 4, 2), "expert_in_kernel"),
        (64, TileConfig(64, 32, 16, 4, 2, descriptors=True), "expert_in_descriptor_kernel"),
        # Columns of several experts in one tile, which has one sample.
        (24, TileConfig(64, 32, 16, 4, 2), "expert_in_kernel"),
        (24, TileConfig(64, 32, 16, 4, 2, descriptors=True), "expert_in_descriptor_kernel"),
        # Two accumulators; 256 columns are 2.7 tiles of them.
        (64, TileConfig(32, 96, 16, 4, 2, descriptors=True), "expert_in_wide_descriptor_kernel"),
        (24, TileConfig(32, 96, 16, 4, 2, descriptors=True), "expert_in_descriptor_kernel"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_tiles_across_samples_and_experts(F, tile, kernel):
    """The first product with dense routing, where a row tile ends amid a sample and a column tile amid an expert."""
    operands = draw_operands(ProductShape(40, 37, 2, 4, None, F), "fp16", "cpu")
    work = prepare_product("expert_in", operands, tile)
    assert [step.kernel.__name__ for step in work.steps] == [kernel]
    work.outputs["h"].fill_(float("nan"))
    work.run(execute_launch)
    z = torch.nn.functional.linear(
        *(t.double() for t in (operands.x_hat, operands.experts.w_in, operands.experts.b_in))
    )
    assert_rounded_once(work.outputs["h"], z, operands.routing.weights)


@interpreted
def test_activations_after_a_library_product_are_rounded_once():
    operands = draw_operands(ProductShape(40, 37, 2, 4, None, 24), "fp16", "cpu")
    work = prepare_product("expert_in_train", operands, LIBRARY)
    work.run(execute_launch)
    assert_rounded_once(work.outputs["h"], work.outputs["z"], operands.routing.weights)


def assert_rounded_once(h, z, weights):
    """``h = w · u · gelu(g)``, but for one rounding to float16, Φ's polynomial, and z summed in float32 over D = 40.

    Were w applied to rounded activations, h would be rounded twice, and err by up to twice as much.
    """
    u, g = z.double().unflatten(-1, (2, weights.shape[1], -1)).unbind(2)
    w = weights.double()[:, None, :, None]
    gelu = torch.nn.functional.gelu(g)
    exact = w * u * gelu
    # `activation.py` has the error of gelu, whose slope is at most 1.13.
    before_rounding = w * (4.2e-5 * u.abs() + 40 * 2**-24 * z.abs().max() * (gelu.abs() + 1.13 * u.abs()))
    # Half an ulp of float16, for normal and for subnormal numbers.
    rounding = 2**-11 * (exact.abs() + before_rounding) + 2**-25
    assert ((h.double() - exact.flatten(2)).abs() <= (before_rounding + rounding).flatten(2)).all()


# Elements around a tensor: more than a tile has.
MARGIN = 8192
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run_amid_a_pattern(launch):
    """Runs a launch on copies of its tensors that lie amid a pattern, which must stay as it is.

    Small negative numbers are NaN as a float of any width, and no expert as an index. Each tensor has its own, so that
    a NaN that is read beyond one tensor does not look untouched beyond another.
    """
    copies = {}

    def move(argument):
        if not isinstance(argument, Tensor):
            return argument
        if argument.data_ptr() not in copies:
            size = argument.numel()
            pattern = -3 - 2 * len(copies)
            memory = torch.full((size + 2 * MARGIN,), pattern, dtype=BITS[argument.element_size()])
            inner = memory[MARGIN : MARGIN + size].view(argument.dtype).as_strided(argument.shape, argument.stride())
            copies[argument.data_ptr()] = argument, memory, pattern, inner.copy_(argument)
        return copies[argument.data_ptr()][-1]

    execute_launch(launch._replace(arguments=tuple(map(move, launch.arguments))))
    for original, memory, pattern, inner in copies.values():
        outside = torch.cat([memory[:MARGIN], memory[-MARGIN:]])
        assert (outside == pattern).all(), launch.kernel.__name__
        original.copy_(inner)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("form", ["dense", "top2_per_expert"])
@pytest.mark.parametrize(("arch", "dtype"), [("interpreter", torch.float32), ("sm_80", torch.float16)], ids=str)
def test_kernels_stay_within_their_tensors(arch, dtype, form):
    """Nothing fits its tiles, and the last group of row tiles is smaller than the others."""
    K, options = FORMS[form]
    problem = make_problem(0, Sizes(3, 13, 17, 3, 9, K), dtype=dtype, **options)
    for outputs in run_operators(arch, problem, run_amid_a_pattern):
        assert not any(t.isnan().any() for t in outputs)


@interpreted
def test_descriptors_are_used_where_strides_allow_them():
    def kernels(D):
        launches = []
        problem = make_problem(0, Sizes(2, 40, D, 4, 32, 2), dtype=torch.float16)
        call = operators.build_call(LaunchDevice("sm_90", launches.append), problem.op_arguments[:9], 4)
        operators.run_inference(call, 1e-5)
        return [launch.kernel.__name__ for launch in launches]

    assert kernels(32) == ["layer_norm_kernel", "expert_in_descriptor_kernel", "expert_sum_descriptor_kernel"]
    # Rows of 36 numbers of 16 bits are no multiple of 16 bytes.
    assert kernels(36) == ["layer_norm_kernel", "expert_in_kernel", "expert_sum_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_the_same_bits_every_time(place):
    problem = place.move(make_problem(0, Sizes(K=2), dtype=place.low, expert_norm=True, expert_bias=True))
    first, second = (
        forward_and_gradients(lambda *args, **o: moe_ffn(*args, backend="triton", **o), problem) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("expert_norm", [False, True], ids=["norm", "expert_norm"])
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_several_tiles_in_every_direction(place, expert_norm):
    """Samples of several row tiles, experts of several column tiles, and a last tile of each that is not full."""
    assert_exact_to_rounding(place, Sizes(2, 37, 20, 3, 33, 2), expert_norm=expert_norm, expert_bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_samples_longer_than_a_partial_sum(place):
    """Where a sample has more rows than one program of LayerNorm sums, or than one part of a weight's gradient has."""
    assert_exact_to_rounding(place, Sizes(B=1, L=300, D=4, E=2, F=3))


def assert_exact_to_rounding(place, sizes, **options):
    problem = make_problem(3, sizes, dtype=torch.float32, **options)
    actual = forward_and_gradients(place.op, problem)
    exact = forward_and_gradients(reference.moe_ffn, problem.map(Tensor.double))
    for a, e in zip(actual, exact, strict=True):
        # Sums of up to B·L terms of order 1, rounded one after the other.
        assert (a - e).abs().max() <= sizes.B * sizes.L * 2**-24 * max(1.0, e.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_wrong_indices_are_clamped(place):
    """On a GPU the assertion about indices comes later than the kernels: these must not read out of bounds."""
    problem = place.move(make_problem(0, Sizes(K=2), expert_norm=True, expert_bias=True)).requires_grad()
    wrong = problem.routing.indices.clone()
    wrong[0, 0], wrong[1, 1] = -5, 1000
    outputs = []
    for indices in (wrong, wrong.clamp(0, 3)):
        arguments = (*problem.op_arguments[:8], indices, 4, 1e-5)
        y = torch.ops.mtu_kernels.moe_ffn_triton_train(*arguments)[0]
        outputs.append([y, *torch.autograd.grad(y, problem.tensors, problem.grad_y.detach())])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("check", [indices_valid_flag, triton.indices_valid_flag], ids=["torch", "kernel"])
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_indices_are_checked_on_the_device(place, check):
    def is_valid(rows, num_experts=4):
        return bool(check(torch.tensor(rows, device=place.device), num_experts))

    assert is_valid([[0, 3], [2, 1]])
    assert is_valid([[2]])
    assert is_valid([[i % 5, (i + 1) % 5, (i + 2) % 5] for i in range(100)], 5)
    assert not is_valid([[0, 4], [2, 1]])
    assert not is_valid([[0, 3], [-1, 1]])
    assert not is_valid([[0, 3], [1, 1]])
    # Not even if one mistake makes up for another in a count.
    assert not is_valid([[1, 4], [2, 2]])
    assert not is_valid([[0, 1, 2]] * 99 + [[3, 0, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_saved_tensors_may_come_back_with_other_strides(place):
    problem = place.move(make_problem(0)).requires_grad()

    def transposed(tensor):
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor

    outputs = []
    for pack in (lambda t: t, transposed):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = moe_ffn(*problem.arguments, backend="triton")
        outputs.append(torch.autograd.grad(y, problem.tensors, problem.grad_y.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@interpreted
def test_a_backward_pass_under_autocast_computes_library_products_in_their_dtype(monkeypatch):
    """Tiles of the interpreter leave no product to a library. Those of GPUs do, above all in float32."""
    find_tile = operators.find_tile
    monkeypatch.setattr(operators, "find_tile", lambda key: find_tile(key._replace(arch="sm_90")))
    problem = make_problem(0).requires_grad()
    expected = forward_and_gradients(functools.partial(moe_ffn, backend="triton"), problem)[1:]
    y = moe_ffn(*problem.arguments, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(y, problem.tensors, problem.grad_y.detach())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@triton_package.jit
def cdf_kernel(g_ptr, out_ptr, EXACT: tl.constexpr, N: tl.constexpr):
    n_N = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + n_N, normal_cdf(tl.load(g_ptr + n_N), EXACT))


def cdf_errors(dtype: torch.dtype) -> tuple[float, float]:
    """Errors of Φ and gelu in the kernels, over gates far into both tails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.linspace(-30, 30, 2**16, device=device)
    out = torch.empty_like(g)
    cdf_kernel[(16,)](g, out, dtype == torch.float32, 4096)
    error = (out.double() - 0.5 * (1 + torch.erf(g.double() / math.sqrt(2)))).abs()
    return error.max().item(), (error * g.abs()).max().item()


def test_the_activation_is_exact_to_storage():
    """Below float16's half ulp at 1, 2^-12 = 2.4e-4, and float32's at 1, 6e-8 (times 30 for gelu at |g| = 30)."""
    cdf, gelu = cdf_errors(torch.float16)
    assert cdf <= 2.8e-5
    assert gelu <= 4.2e-5
    cdf, gelu = cdf_errors(torch.float32)
    assert cdf <= 2**-23
    assert gelu <= 30 * 2**-23


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_memory_of_training(arch):
    """Where a batch has fewer tokens than this, gradients of weights, the same for both, outweigh all else."""
    ratios = count_step_bytes(Workload(320, 1024, 2, "bf16", "forward+backward"), Setting(E=4), arch).ratios
    assert ratios["saved"] <= 0.6
    assert ratios["peak"] <= 0.95
    assert ratios["recomputed_peak"] <= 0.6


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("place", TRITON_PLACES)
def test_warmup_changes_nothing(place, backward):
    problem = place.move(make_problem(0, Sizes(K=2)))
    before = [t.clone() for t in problem.tensors]
    warmup(*problem.arguments, backend="triton", backward=backward)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(problem.tensors, before, strict=True))
    with pytest.raises(ValueError, match="There is no backend"):
        warmup(*problem.arguments, backend="fast")


# -------------------------------------------------------------------------------------------------------- refusals


def message_of(problem):
    with pytest.raises(RuntimeError) as caught:
        moe_ffn(*problem.arguments, backend="triton")
    return str(caught.value)


@interpreted
def test_what_it_does_not_serve():
    start = "The backend 'triton' cannot serve this call: "
    words = "it computes in float32, bfloat16 and float16, not in float64."
    assert message_of(make_problem(0, dtype=torch.float64)) == start + words
    words = "Triton's interpreter computes products of bfloat16 wrongly."
    assert message_of(make_problem(0, dtype=torch.bfloat16)) == start + words


def output_of(code, **environment):
    before = "import sys, types, torch, mtu_kernels as mk; from tests.mtu_kernels.moe_ffn_cases import make_problem\n"
    result = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


CALL = """
try: mk.moe_ffn(*make_problem(0).arguments, backend='triton')
except RuntimeError as error: print(error)
print('triton' in mk.available_backends())
print(mk.moe_ffn(*make_problem(0).arguments).shape)
"""


@pytest.mark.slow
@interpreted
def test_a_cpu_without_the_interpreter():
    assert output_of(CALL, TRITON_INTERPRET="0").splitlines() == [
        "The backend 'triton' cannot serve this call: it runs on CUDA devices, and on CPU tensors under "
        "TRITON_INTERPRET=1 only.",
        "True",
        "torch.Size([3, 13, 16])",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("None", "it needs the package triton 3.6 or newer, which is not installed"),
        (
            "types.SimpleNamespace(__version__='3.2.0')",
            "it needs the package triton 3.6 or newer, and 3.2.0 is installed",
        ),
    ],
    ids=["missing", "old"],
)
def test_no_triton(module, words):
    others = ", ".join(name for name in available_backends() if name != "triton")
    assert output_of(f"sys.modules['triton'] = {module}\n" + CALL).splitlines() == [
        f"The backend 'triton' cannot run here: {words}; available are {others}.",
        "False",
        "torch.Size([3, 13, 16])",
    ]


def test_auto_falls_back_and_says_so_once(caplog):
    """Asked of a tensor that only says where it is: there need not be a GPU."""
    x = SimpleNamespace(device=torch.device("cuda", 7))
    experts = ExpertWeights(*[torch.zeros(1, dtype=torch.float64)] * 4, num_experts=1)
    with caplog.at_level(logging.WARNING, logger="mtu_kernels"):
        assert _fastest(x, experts) is _fastest(x, experts)
    assert [record.message for record in caplog.records] == [
        "backend='auto' takes 'eager' on cuda:7 instead of 'triton': it computes in float32, bfloat16 and float16, "
        "not in float64."
    ]
