"""The routed feed-forward network: formula, fused against module path, and what may be upcycled."""

import functools

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mtu.experts import ExpertConfig
from mtu.models.ffn import TASK_CONTEXT_KEY, RoutedTransformerBlock, why_not_upcyclable
from mtu.models.router import TaskContext
from mtu_kernels import available_backends, dense_weights

from ..outputs import TOLERANCE, assert_close, assert_differ
from ..tiny import randomise_

DIM, TASKS, EXPERTS, WIDTH = 16, 3, 4, 12
IDS = torch.tensor([2, 0, 1, 2])
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"top_k": 2}, id="top2"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"norm": "task_expert", "top_k": 1}, id="expert_norms_top1"),
    pytest.param({"expert_ratio": 0.5}, id="wide"),
]


def stock_block(**changes):
    torch.manual_seed(0)
    return BasicTransformerBlock(**{**dict(dim=DIM, num_attention_heads=2, attention_head_dim=8), **changes}).eval()


def routed_block(top_k=None, norm="task", expert_ratio=0.25, **changes):
    config = ExpertConfig(EXPERTS, top_k, expert_ratio, norm, 1 / expert_ratio, WIDTH)
    block = RoutedTransformerBlock(stock_block(**changes), config, TASKS, routers_dropped=False).eval()
    randomise_(list(block.parameters()), 1)
    return block


def call(block, x, **kwargs):
    embedding = torch.randn(TASKS, WIDTH, generator=torch.Generator().manual_seed(2))
    context = TaskContext(IDS[: len(x)], embedding)
    return block(x, cross_attention_kwargs={TASK_CONTEXT_KEY: context, **kwargs})


def tokens(dtype=torch.float32):
    return torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(3)).to(dtype)


def by_formula(ffn, norm, x, context):
    """DESIGN §2, one sample and one expert at a time, in float64."""
    table = ffn.router(context.embeddings_of_all_tasks)
    weights = dense_weights(table, EXPERTS).double()
    w_in, b_in = ffn.net[0].proj.weight.double(), ffn.net[0].proj.bias.double()
    w_out, b_out = ffn.net[2].weight.double(), ffn.net[2].bias.double()
    hidden = w_out.shape[1]
    size = hidden // EXPERTS
    outputs = []
    for sample, task in zip(x.double(), context.task_ids.tolist(), strict=True):
        y = b_out.expand(len(sample), -1)
        for expert in range(EXPERTS):
            gamma, beta = norm.weight[task].double(), norm.bias[task].double()
            if gamma.dim() == 2:
                gamma, beta = gamma[expert], beta[expert]
            normed = F.layer_norm(sample, (DIM,), gamma, beta, ffn.eps)
            own = slice(expert * size, (expert + 1) * size)
            value = normed @ w_in[:hidden][own].T + b_in[:hidden][own]
            gate = normed @ w_in[hidden:][own].T + b_in[hidden:][own]
            y = y + weights[task, expert] * (value * F.gelu(gate)) @ w_out[:, own].T
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_formula(settings):
    block, x = routed_block(**settings), tokens()
    context = TaskContext(IDS, torch.randn(TASKS, WIDTH, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        actual = block.ff(x, block.norm3(IDS), context)
        expected = by_formula(block.ff, block.norm3, x, context)
    assert_close(actual.double(), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_module_path_computes_the_same_output_and_gradients(settings):
    fused, by_modules = routed_block(**settings), routed_block(**settings)
    called = []
    by_modules.ff.net[2].register_forward_hook(lambda *_: called.append(1))
    results = []
    for block in (fused, by_modules):
        x = tokens().requires_grad_()
        y = call(block, x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, {name: p.grad for name, p in block.named_parameters()}))
    assert called
    assert_close(results[1][0], results[0][0])
    # Two layers deeper than the output (its square, and back again).
    assert_close(results[1][1], results[0][1], 2 * TOLERANCE)
    for name, grad in results[0][2].items():
        if grad is not None and not name.startswith(("attn2", "norm2")):
            error = (results[1][2][name] - grad).abs().max()
            assert error <= 2 * TOLERANCE * max(grad.abs().max(), results[0][1].abs().max()), name


class WrappedLinear(nn.Linear):
    """Stands for what PEFT and quantizers put in the place of a Linear."""


def test_only_plain_linears_take_the_fused_path():
    def plain(change, x=None):
        block = routed_block()
        change(block.ff.net)
        return block.ff._is_plain(tokens() if x is None else x)

    assert plain(lambda net: None)
    assert plain(lambda net: net.to(torch.bfloat16), tokens(torch.bfloat16))
    assert plain(lambda net: net.to(torch.bfloat16), tokens())  # the kernels take float32 tokens
    assert not plain(lambda net: net.double(), tokens(torch.bfloat16))
    assert not plain(lambda net: net.to(torch.float8_e4m3fn), tokens(torch.bfloat16))
    assert not plain(lambda net: net.__setitem__(2, WrappedLinear(4 * DIM, DIM)))
    assert not plain(lambda net: net[0].__setattr__("proj", WrappedLinear(DIM, 8 * DIM)))
    assert not plain(lambda net: net[2].__setattr__("forward", functools.partial(net[2].forward)))
    assert not plain(lambda net: net[0].proj.register_forward_pre_hook(lambda *_: None))
    assert not plain(lambda net: net[2].register_forward_hook(lambda *_: None))
    assert not plain(lambda net: net[2].register_full_backward_hook(lambda *_: None))


def test_routing_weights_are_not_rounded_on_the_module_path_in_bfloat16():
    """1 + 0.9 · 2⁻⁸ rounds to 1 in bfloat16, yet it moves most of the values that it is multiplied with."""
    block = routed_block().to(torch.bfloat16)
    x, context = tokens(torch.bfloat16), TaskContext(IDS, torch.zeros(TASKS, WIDTH))
    nn.init.zeros_(block.ff.router.linear_2.weight)
    nn.init.zeros_(block.ff.router.linear_2.bias)
    block.ff.router.routing_scale = EXPERTS * (1 + 0.9 * 2**-8)
    seen = []
    block.ff.net[2].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        block.ff(x, block.norm3(IDS), context)
        block.ff.router.routing_scale = EXPERTS
        block.ff.router.clear_cache()
        block.ff(x, block.norm3(IDS), context)
    assert not torch.equal(seen[0], seen[1])


def test_dropout_works_in_training_and_is_off_in_evaluation():
    block, without = routed_block(dropout=0.5), routed_block()
    x = tokens()
    with torch.no_grad():
        assert torch.equal(call(block, x), call(without, x))
        block.ff.train()
        torch.manual_seed(0)
        first = call(block, x)
        assert_differ(first, call(block, x))


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_residual_on_both_paths(settings, backend):
    block, x = routed_block(**settings), tokens()
    block.ff.backend = backend
    context = TaskContext(IDS, torch.randn(TASKS, WIDTH, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        expected = x + block.ff(x, block.norm3(IDS), context)
        assert_close(block.ff(x, block.norm3(IDS), context, residual=True), expected)
        block.ff.net[2].register_forward_hook(lambda *_: None)
        assert_close(block.ff(x, block.norm3(IDS), context, residual=True), expected)


# ------------------------------------------------------------------------------------------------------------ block


class Operators(TorchDispatchMode):
    """Collects the calls of operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpp" not in available_backends(), reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_residual_goes_into_the_operator(dtype):
    block, x = routed_block().to(dtype), tokens(dtype)
    block.ff.backend = "cpp"
    with torch.no_grad(), Operators() as operators:
        call(block, x)
    asked = [args[11:] for func, args in operators.calls if func is torch.ops.mtu_kernels.moe_ffn_cpp.default]
    assert asked == [(True,)]


def test_hooks_on_the_network_see_its_own_output():
    block, x = routed_block(), tokens()
    seen = []
    with torch.no_grad():
        expected = call(block, x)
        hook = block.ff.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
        actual = call(block, x)
        ((given, output),) = seen
        assert torch.equal(actual, given + output)
        assert_close(actual, expected)
        hook.remove()
        assert torch.equal(call(block, x), expected)


def test_float32_tokens_of_a_bfloat16_network_stay_float32():
    block = routed_block()
    block.ff.net.to(torch.bfloat16)
    with torch.no_grad():
        assert call(block, tokens()).dtype == torch.float32


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_chunks_of_tokens_change_nothing(settings, size):
    block, x = routed_block(**settings), tokens()
    with torch.no_grad():
        whole = call(block, x)
        block.set_chunk_feed_forward(size, dim=1)
        assert_close(call(block, x), whole)
        block.set_chunk_feed_forward(None)
        assert torch.equal(call(block, x), whole)


@pytest.mark.parametrize("dim", [0, 2])
def test_chunks_of_the_batch_raise(dim):
    block = routed_block()
    with pytest.raises(ValueError, match=rf"over tokens \(dim=1\) only, but got {dim}\."):
        block.set_chunk_feed_forward(2, dim)
    assert block._chunk_size is None


def test_a_block_without_tasks_raises():
    block = routed_block()
    with pytest.raises(ValueError, match=r"needs a task context .* call it through MTUUNet2DConditionModel"):
        block(tokens())
    with pytest.raises(ValueError, match=r"but got \['scale'\]"):
        block(tokens(), cross_attention_kwargs={"scale": 1.0})


def test_the_block_leaves_the_callers_arguments_alone():
    block = routed_block()
    context = TaskContext(IDS, torch.zeros(TASKS, WIDTH))
    kwargs = {TASK_CONTEXT_KEY: context}
    block(tokens(), cross_attention_kwargs=kwargs)
    assert set(kwargs) == {TASK_CONTEXT_KEY}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_fn": "gelu"}, "its activation is GELU, not GEGLU"),
        ({"activation_fn": "geglu-approximate"}, "not GEGLU"),
        ({"norm_type": "ada_norm", "num_embeds_ada_norm": 10}, "its norm_type is 'ada_norm'"),
        ({"norm_elementwise_affine": False}, "no affine"),
        ({"attention_type": "gated", "cross_attention_dim": 8}, "GLIGEN fuser"),
        ({"positional_embeddings": "sinusoidal", "num_positional_embeddings": 8}, "positional embeddings"),
    ],
)
def test_blocks_that_cannot_be_upcycled_say_why(changes, reason):
    assert why_not_upcyclable(stock_block()) is None
    assert reason in why_not_upcyclable(stock_block(**changes))


@pytest.mark.parametrize("which", ["net.0.proj", "net.2"])
def test_a_wrapped_linear_cannot_be_upcycled(which):
    block = stock_block()
    parent, _, name = which.rpartition(".")
    setattr(block.ff.get_submodule(parent), name, WrappedLinear(2, 2))
    assert " WrappedLinear, not a plain nn.Linear (unload or fuse adapters" in why_not_upcyclable(block)
