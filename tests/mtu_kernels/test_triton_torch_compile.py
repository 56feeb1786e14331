"""Dense inference under `torch.compile` on the backend "triton": what runs, and that it is right."""

import functools
import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtu_kernels import moe_ffn
from mtu_kernels.arguments import Options
from mtu_kernels.triton import operators, torch_compile
from mtu_kernels.triton.launch import LaunchDevice

from .moe_ffn_cases import SMALL, Sizes, assert_as_exact_as_eager, make_problem
from .places import PLACES
from .test_moe_ffn import EDGE_SIZES, EDGES

TRITON_PLACES = [param for param in PLACES if param.values[0].backend == "triton"]
OP = torch.ops.mtu_kernels.expert_hidden_triton.default
triton_ffn = functools.partial(moe_ffn, backend="triton")


@pytest.fixture(params=TRITON_PLACES)
def place(request):
    return request.param


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("x_is_float32", [False, True], ids=("low_x", "float32_x"))
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edge_values(place, edge, x_is_float32):
    options = {"affine_dtype": torch.float32, "x_dtype": torch.float32 if x_is_float32 else place.low}
    problems = [edge(p) for p in place.problems(dtype=place.low, **options)]
    assert_as_exact_as_eager(compiled(place.op), problems, residual=not x_is_float32, inference=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "low"])
@pytest.mark.parametrize("sizes", [sizes for sizes in EDGE_SIZES.values() if sizes.K is None], ids=str)
def test_edge_sizes(place, dtype, sizes):
    problems = place.problems(sizes, dtype=torch.float32 if dtype == "float32" else place.low)
    assert_as_exact_as_eager(compiled(place.op), problems, residual=True, inference=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own import
def test_inductor_compiles_it(place):
    problems = place.problems(dtype=place.low, affine_dtype=torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_as_exact_as_eager(compiled(place.op, "inductor"), problems, residual=True, inference=True)


def operators_of(function, problem):
    with torch.profiler.profile() as profile:
        function(*problem.arguments)
    return [e.name.removeprefix("mtu_kernels::") for e in profile.events() if e.name.startswith("mtu_kernels::")]


@pytest.mark.slow
def test_which_operator_runs(place):
    dense = place.move(make_problem(0, dtype=place.low, affine_dtype=torch.float32))
    assert operators_of(triton_ffn, dense) == ["moe_ffn_triton"]

    def runs(problem):
        torch.compiler.reset()
        function = compiled(triton_ffn)
        function(*problem.arguments)  # tracing runs operators, too
        return operators_of(function, problem)

    assert runs(dense) == ["expert_hidden_triton"]
    # Parameters whose gradients nobody records.
    for recording_off in (torch.no_grad, torch.inference_mode):
        with recording_off():
            assert runs(dense.requires_grad()) == ["expert_hidden_triton"]
    assert runs(dense.requires_grad()) == ["moe_ffn_triton_train"]
    assert runs(place.move(make_problem(0))) == []  # float32: the library's products
    for sizes, options in ((Sizes(K=2), {}), (Sizes(), {"expert_norm": True}), (Sizes(), {"expert_bias": True})):
        assert runs(place.move(make_problem(0, sizes, dtype=place.low, **options))) == ["moe_ffn_triton"]


@pytest.mark.slow
def test_the_log_says_once_which_path_runs(place, caplog):
    torch_compile._log_once.cache_clear()
    dense = place.move(make_problem(0, dtype=place.low))
    top_2 = place.move(make_problem(0, Sizes(K=2), dtype=place.low))
    with caplog.at_level(logging.INFO, logger="mtu_kernels"):
        for problem in (dense, top_2) * 2:
            torch.compiler.reset()
            compiled(triton_ffn)(*problem.arguments)
    assert [record.message for record in caplog.records] == [
        "Under torch.compile, backend 'triton' runs dense inference as PyTorch's operators around one for the experts' "
        "hidden units.",
        "Under torch.compile, backend 'triton' runs LayerNorm, experts and their sum as one operator.",
    ]


def op_arguments(problem):
    x, _, experts, routing = problem.arguments
    return x, experts.w_in, experts.b_in, routing.weights, experts.num_experts


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SMALL, SMALL._replace(B=0), SMALL._replace(L=0)], ids=str)
def test_registration(place, sizes):
    problem = place.move(make_problem(0, sizes, dtype=place.low, affine_dtype=torch.float32))
    torch.library.opcheck(OP, op_arguments(problem))
    strided = problem.map(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t)
    torch.library.opcheck(OP, op_arguments(strided))
    assert torch.equal(OP(*op_arguments(strided)), OP(*op_arguments(problem)))


def test_a_derivative_is_refused_not_zero(place):
    problem = place.move(make_problem(0)).requires_grad()
    with pytest.raises(NotImplementedError, match=r"expert_hidden_triton\.default has no derivative"):
        OP(*op_arguments(problem)).sum().backward()


def test_flops_are_those_without_a_compiler(place):
    problem = place.move(make_problem(0, dtype=place.low))
    counts = []
    for function in (triton_ffn, functools.partial(torch_compile.moe_ffn, options=Options())):
        with FlopCounterMode(display=False) as counter:
            function(*problem.arguments)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("width", [320, 640, 1280])
def test_the_operator_is_one_kernel(arch, width):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    launches = []
    experts = empty(8 * width, width), empty(8 * width), empty(2, 4, dtype=torch.float32)
    operators.run_first_product_alone(LaunchDevice(arch, launches.append), empty(2, 1024, width), *experts, 4)
    assert [launch.product_name for launch in launches] == ["expert_in"]
    # What runs before it is not known, and may write what it reads before it would wait.
    assert not any(launch.may_overlap_previous for launch in launches)
