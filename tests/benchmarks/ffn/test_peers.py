"""The contenders have the results of the reference, and wrong ones fail the check."""

import pytest
import torch
from diffusers.models.attention import FeedForward

from benchmarks.ffn.correctness import assert_matches_reference
from benchmarks.ffn.inputs import EPS, draw_routed_inputs, draw_shared_inputs
from benchmarks.ffn.peers import (
    CONTENDERS,
    loop_ffn,
    make_calls,
    stock_ffn,
    to_folded_inputs,
    to_stock_inputs,
    user_ffn,
)
from benchmarks.ffn.sweeps import PASSES
from benchmarks.harness.correctness import WrongResult
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels import ExpertWeights, available_backends, moe_ffn, reference

CPU = torch.device("cpu")
SETTINGS = {
    "dense": Setting(4, None, 3),
    "top1": Setting(4, 1, 3),
    "top2": Setting(4, 2, 3),
    "one": Setting(1, None, 1),
}


def make(setting=SETTINGS["dense"], dtype="fp32", direction="forward+backward", B=3):
    return draw_routed_inputs(draw_shared_inputs(Workload(16, 9, B, dtype, direction), CPU, 0), setting, 0)


def doubled(inputs):
    experts = ExpertWeights(*(t.double() for t in inputs.experts[:4]), inputs.experts.num_experts)
    norm = type(inputs.norm)(*(t.double() for t in inputs.norm))
    routing = inputs.routing._replace(weights=inputs.routing.weights.double())
    return inputs._replace(x=inputs.x.double(), norm=norm, experts=experts, routing=routing)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_eager_is_the_layer_norm_and_feed_forward_of_diffusers_bit_for_bit(dtype):
    inputs = to_stock_inputs(make(dtype=dtype, direction="forward"))
    norm = torch.nn.LayerNorm(16, eps=EPS)
    ffn = FeedForward(16, activation_fn="geglu")
    tensors = dict(zip(("weight", "bias"), inputs.norm, strict=True))
    norm.load_state_dict(tensors)
    names = ("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias")
    ffn.load_state_dict(dict(zip(names, inputs.experts[:4], strict=True)))
    expected = ffn.to(DTYPES[dtype])(norm.to(DTYPES[dtype])(inputs.x))
    assert torch.equal(stock_ffn(*inputs.moe_ffn_arguments), expected)


@pytest.mark.parametrize("function", [user_ffn, loop_ffn], ids=["user", "loop"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_routed_peers_are_the_reference(setting, function):
    inputs = doubled(make(setting, direction="forward"))
    torch.testing.assert_close(function(*inputs.moe_ffn_arguments), reference.moe_ffn(*inputs.moe_ffn_arguments))


def test_folded_is_routed_for_one_task():
    routed = doubled(make(Setting(4, None, 1), direction="forward"))
    torch.testing.assert_close(
        stock_ffn(*to_folded_inputs(routed).moe_ffn_arguments), reference.moe_ffn(*routed.moe_ffn_arguments)
    )


def test_stock_inputs_forget_the_routing():
    inputs = make(SETTINGS["top2"])
    stock = to_stock_inputs(inputs)
    assert stock.names_of_leaves == [name for name in inputs.names_of_leaves if name != "routing.weights"]
    assert stock.experts.num_experts == 1
    assert stock.norm.weight.shape == (16,)
    assert torch.equal(stock.routing.weights, torch.ones(3, 1))


def test_samples_of_one_task_share_its_rows_and_tasks_differ():
    for setting in (Setting(4, 2, 2), Setting(4, 2, 64)):
        inputs = make(setting, B=6)
        rows = torch.cat([*inputs.norm, inputs.routing.weights, inputs.routing.indices], dim=1)
        assert len(rows.unique(dim=0)) == min(6, setting.tasks)
    assert torch.equal(make(Setting(4, 2, 2), B=6).norm.weight[0], make(Setting(4, 2, 2), B=6).norm.weight[2])


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("K", [None, 1], ids=["dense", "top1"])
def test_products_do_the_share_of_the_active_experts(K, direction):
    inputs = make(Setting(4, K, 1), direction=direction)
    (call,) = make_calls(None, [inputs], direction)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        call()
    forward = 2 * 3 * 9 * 16 * (3 * 4 * 16) // (4 if K else 1)
    assert counter.get_total_flops() == forward * {"forward": 1, "backward": 2, "forward+backward": 3}[direction]


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("name", ["eager", "loop", "mtu-eager", "mtu-eager-recompute"])
def test_bound_calls_return_outputs_or_gradients(name, direction):
    implementation = CONTENDERS[name].implementation
    inputs = implementation.prepare_inputs(make(direction=direction))
    (call,) = make_calls(implementation.function, [inputs], direction)
    results = [call(), call()][1]
    if direction == "forward":
        assert results.shape == inputs.x.shape
        assert not results.requires_grad
    else:
        assert [grad.shape for grad in results] == [leaf.shape for leaf in inputs.leaf_tensors]


CHECKED = [
    name
    for name, c in CONTENDERS.items()
    if c.implementation.function and c.run_mode is None and c.implementation.backend in (None, "eager")
]
CHECKED += [f"mtu-cpp-{way}" for way in ("add", "residual") if "cpp" in available_backends()]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CHECKED)
def test_right_contenders_pass_the_check(name, dtype, direction):
    implementation = CONTENDERS[name].implementation
    inputs = implementation.prepare_inputs(make(SETTINGS["top2"], dtype, direction))
    assert_matches_reference(implementation.function, inputs, implementation.adds_residual)
    with pytest.raises(WrongResult):
        assert_matches_reference(implementation.function, inputs, not implementation.adds_residual)


def without_bias(x, norm, experts, routing):
    return moe_ffn(x, norm, experts._replace(b_out=experts.b_out * 0), routing, backend="eager")


def other_samples_routing(x, norm, experts, routing):
    return moe_ffn(x, norm, experts, routing._replace(weights=routing.weights.roll(1, 0)), backend="eager")


def nothing(x, norm, experts, routing):
    return moe_ffn(x, norm, experts, routing, backend="eager") * float("nan")


def other_dtype(x, norm, experts, routing):
    return moe_ffn(x, norm, experts, routing, backend="eager").double()


def detached_weights(x, norm, experts, routing):
    weights = routing.weights
    constant = routing._replace(weights=weights.detach() + 0 * weights)
    return moe_ffn(x, norm, experts, constant, backend="eager")


def one_sample_too_few(x, norm, experts, routing):
    return moe_ffn(x, norm, experts, routing, backend="eager")[:1]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (without_bias, "^y must be torch.float32 within"),
        (other_samples_routing, "^y must be"),
        (nothing, "off by nan"),
        (other_dtype, "got torch.float64"),
        (detached_weights, "^the gradient of routing.weights must be"),
        (one_sample_too_few, r"^y must be \(3, 9, 16\) as x, got \(1, 9, 16\)"),
    ],
    ids=lambda value: getattr(value, "__name__", "words"),
)
def test_wrong_contenders_fail_the_check(function, words):
    with pytest.raises(WrongResult, match=words):
        assert_matches_reference(function, make())
