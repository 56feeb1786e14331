"""One gather a step for all layers: the same values, few operators, and only where tensors may be read early."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import mtu
from mtu.models.gathering import gather_task_values
from mtu.models.norm import TaskAffineTable
from mtu.models.router import TaskContext
from mtu_kernels import NormAffine

from ..outputs import assert_close, assert_differ, predict
from ..tiny import SD, SDXL, inputs, randomise_, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
MIXES = (NAMES, ("edit",) * 5, ("text-to-image", "remove", "remove", "edit", "super-resolution"))
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"num_experts": 1}, id="one_expert"),
    pytest.param({"num_experts": 4, "top_k": 2, "norm": "task_expert"}, id="top2-expert_norms"),
]
# More blocks of the same width in each transformer.
DEEP = {**SDXL, "transformer_layers_per_block": (1, 4)}
aten = torch.ops.aten
GATHERS = {aten.index.Tensor, aten.index_select.default, aten.embedding.default, aten.gather.default}
COPIES = {aten._to_copy.default, aten.clone.default, aten.cat.default, aten.stack.default, aten.copy_.default}


class Count(TorchDispatchMode):
    """Counts operators; those inside an operator of ours are its own."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def blocks_of(unet):
    return list(unet.routed_blocks_by_name().values())


def gathered_by(unet, task_ids):
    with torch.no_grad():
        return gather_task_values(unet._consecutive_blocks, task_ids, unet.task_embedding_weight(task_ids.device))


# --------------------------------------------------------------------------------------------------- what it is worth


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_more_layers_take_no_more_gathers(settings, dropped):
    counts, layers = [], []
    for config in (SDXL, DEEP):
        unet = upcycled_unet(config, **settings).to(torch.bfloat16)
        unet.set_backend("reference")
        if dropped:
            unet.drop_routers_()
        given = inputs(unet)
        with unet.precomputed_routing_context() if dropped else torch.no_grad():
            predict(unet, given, *NAMES)
            with Count() as count:
                predict(unet, given, *NAMES)
        counts.append(count.calls)
        layers.append(len(blocks_of(unet)))
    grown = counts[1] - counts[0]
    operator = torch.ops.mtu_kernels.moe_ffn_reference.default
    assert grown[operator] == layers[1] - layers[0] > 0
    assert not grown.keys() & (GATHERS | COPIES)
    # Kernels and biases of the input convolution; affines of the one width; routing weights; with top-k, indices.
    assert counts[0][aten.index_select.default] == (5 if "top_k" in settings else 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_compiled_layers_read_what_was_gathered_once():
    """Inductor would gather again for each layer, were it not told to have the result in memory."""
    from torch._inductor.utils import run_and_get_code

    unet = upcycled_unet()
    unet.set_backend("reference")
    blocks, task_ids = blocks_of(unet), unet.task_ids(NAMES)
    embedding = unet.task_embedding_weight(task_ids.device)

    def call(task_ids, samples):
        context = TaskContext(task_ids, embedding, gather_task_values(unet._consecutive_blocks, task_ids, embedding))
        return [b.ff(x, b.norm3(task_ids), context) for b, x in zip(blocks, samples, strict=True)]

    samples = [torch.randn(5, 6, block.dim) for block in blocks]
    with torch.no_grad(), unet.precomputed_routing_context():
        outputs, (code,) = run_and_get_code(torch.compile(call, fullgraph=True), task_ids, samples)
        for actual, expected in zip(outputs, call(task_ids, samples), strict=True):
            assert_close(actual, expected)
    calls = [line for line in code.splitlines() if "= torch.ops.mtu_kernels.moe_ffn_reference" in line]
    weights = [line.partition("reinterpret_tensor(")[2].partition(",")[0] for line in calls]
    assert len(weights) == len(blocks)
    assert len(set(weights)) == 1
    assert weights[0]


def compile_in_place(unet, backend):
    unet.compile_repeated_blocks(backend=backend, fullgraph=True)


def replace_by_compiled(unet, backend):
    for blocks in (module for module in unet.modules() if hasattr(module, "transformer_blocks")):
        for i, block in enumerate(blocks.transformer_blocks):
            blocks.transformer_blocks[i] = torch.compile(block, backend=backend, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("compile_blocks", [compile_in_place, replace_by_compiled])
@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
def test_blocks_that_are_compiled_by_themselves_compile_once_a_shape(dropped, compile_blocks):
    for config in (SDXL, DEEP):
        unet, counter = upcycled_unet(config), CompileCounter()
        if dropped:
            unet.drop_routers_()
        given = inputs(unet)
        expected = [predict(unet, given, *names) for names in MIXES]
        torch.compiler.reset()
        compile_blocks(unet, counter)
        for names, output in zip(MIXES, expected, strict=True):
            assert_close(predict(unet, given, *names), output)
        assert counter.frame_count == 1


@pytest.mark.slow
def test_blocks_beside_a_compiled_one(dynamo):
    unet = upcycled_unet(SDXL)
    given = inputs(unet)
    expected = [predict(unet, given, *names) for names in MIXES]
    first, *others = blocks_of(unet)
    first.compile(backend="eager", fullgraph=True)
    for names, output in zip(MIXES, expected, strict=True):
        assert_close(predict(unet, given, *names), output)
    assert gathered_by(unet, unet.task_ids(NAMES)).affines_by_norm.keys() == {block.norm3 for block in others}


# --------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_each_layer_gets_what_it_would_gather(settings, dtype, batch):
    unet = upcycled_unet(SD, **settings).to(dtype)  # of two widths
    task_ids = unet.task_ids(NAMES[:batch])
    embedding = unet.task_embedding_weight(task_ids.device)
    gathered = gathered_by(unet, task_ids)
    context = TaskContext(task_ids, embedding)
    with torch.no_grad():
        for block in blocks_of(unet):
            own = (*context.affine_per_sample(block.norm3), *context.routing_per_sample(block.ff.router))
            once = (*gathered.affines_by_norm[block.norm3], *gathered.routings_by_router[block.ff.router])
            for actual, expected in zip(once, own, strict=True):
                if expected is None:
                    assert actual is None
                    continue
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected)
                # Kernels take it as it is: no copy, and no variant for other alignments.
                assert actual.is_contiguous()
                assert actual.data_ptr() % 16 == 0


def test_one_id_for_all_samples_and_none():
    unet = upcycled_unet()
    task_ids = unet.task_ids("edit")
    gathered, expected = gathered_by(unet, task_ids.expand(3)), gathered_by(unet, task_ids)
    for norm, affine in gathered.affines_by_norm.items():
        assert torch.equal(affine.weight, expected.affines_by_norm[norm].weight.expand_as(affine.weight))
    empty = gathered_by(unet, task_ids[:0])
    assert {tuple(affine.bias.shape) for affine in empty.affines_by_norm.values()} == {(0, 32), (0, 64)}


def test_nothing_is_gathered_where_gradients_are_wanted():
    unet = upcycled_unet()
    task_ids = unet.task_ids(NAMES)
    assert gather_task_values(unet._consecutive_blocks, task_ids, unet.task_embedding_weight(task_ids.device)) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_nothing_is_gathered_in_a_traced_program():
    """It would hold the strides of the batch that it was traced with."""
    unet = upcycled_unet()
    found = []

    def call(task_ids):
        found.append(gathered_by(unet, task_ids))
        return task_ids + 1

    torch.jit.trace(call, (unet.task_ids(NAMES),), check_trace=False)
    assert found == [None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["copy", "pickle"]
)
def test_a_copy_gathers_from_its_own_layers(twin_of):
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    twin = twin_of(unet)
    assert gathered_by(twin, twin.task_ids(NAMES)).affines_by_norm.keys() == {block.norm3 for block in blocks_of(twin)}
    randomise_([block.norm3.weight for block in blocks_of(twin)], seed=4)
    assert_differ(predict(twin, given, *NAMES), expected)
    assert torch.equal(predict(unet, given, *NAMES), expected)


# ------------------------------------------------------------------------------------- layers that gather themselves


class LouderNorm(TaskAffineTable):
    def forward(self, task_ids):
        return louder(super().forward(task_ids))


def louder(affine):
    return NormAffine(2 * affine.weight, affine.bias)


def hook_the_norm(block):
    block.norm3.register_forward_hook(lambda module, args, affine: louder(affine))


def hook_before_the_norm(block):
    block.norm3.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))


def replace_the_forward_of_the_norm(block):
    forward = block.norm3.forward
    block.norm3.forward = lambda task_ids: louder(forward(task_ids))


def replace_the_norm(block):
    norm = LouderNorm(4, block.dim, None, block.norm3.eps)
    norm.load_state_dict(block.norm3.state_dict())
    block.norm3 = norm


def hook_the_router(block):
    block.ff.router.register_forward_hook(lambda module, args, table: table._replace(weights=2 * table.weights))


def adapt_the_router(block):
    class Wrapped(nn.Linear):
        def forward(self, hidden):
            return 3 * super().forward(hidden).flip(-1)

    wrapped = Wrapped(16, 4)
    wrapped.load_state_dict(block.ff.router.linear_2.state_dict())
    block.ff.router.linear_2 = wrapped


def onload_in_the_block(block):
    """As offloading does: weights are themselves within the block's forward only."""
    weight, forward = block.norm3.weight, block.forward
    block.norm3.weight = nn.Parameter(torch.full_like(weight, torch.nan))

    def onloaded(*args, **kwargs):
        kept, block.norm3.weight = block.norm3.weight, nn.Parameter(2 * weight)
        try:
            return forward(*args, **kwargs)
        finally:
            block.norm3.weight = kept

    block.forward = onloaded


@pytest.mark.parametrize(
    "change",
    [
        hook_the_norm,
        hook_before_the_norm,
        replace_the_forward_of_the_norm,
        replace_the_norm,
        hook_the_router,
        adapt_the_router,
        onload_in_the_block,
    ],
    ids=lambda function: function.__name__,
)
def test_a_layer_whose_call_means_more_is_called(change):
    unet = upcycled_unet()
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    changed, *others = blocks_of(unet)
    change(changed)
    after = predict(unet, given, *NAMES)
    assert_differ(after, before)
    assert gathered_by(unet, unet.task_ids(NAMES)).routings_by_router.keys() == {block.ff.router for block in others}
    # With gradients, every layer gathers for itself.
    assert torch.equal(unet(**given, task_ids=unet.task_ids(NAMES)).sample, after)


def test_a_wrapped_network_gathers_for_itself():
    """As compilers and adapters wrap it: the wrapper has no router."""

    class Wrapper(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, *args, **kwargs):
            return self.network(*args, **kwargs)

    unet = upcycled_unet()
    given = inputs(unet)
    before = predict(unet, given, *NAMES)
    wrapped, *others = blocks_of(unet)
    wrapped.ff = Wrapper(wrapped.ff)
    assert torch.equal(predict(unet, given, *NAMES), before)
    assert gathered_by(unet, unet.task_ids(NAMES)).routings_by_router.keys() == {block.ff.router for block in others}


def test_hooks_of_all_modules_see_every_layer():
    unet = upcycled_unet()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        predict(unet, inputs(unet), *NAMES)
    finally:
        handle.remove()
    assert {block.norm3 for block in blocks_of(unet)} <= set(seen)


@pytest.mark.parametrize(
    "hide",
    [
        lambda block: block.norm3.to("meta"),
        lambda block: block.ff.router.to("meta"),
        lambda block: setattr(block.norm3, "weight", nn.Parameter(block.norm3.weight.flatten())),
        lambda block: setattr(block.norm3, "weight", nn.Parameter(TwoTensor(*[block.norm3.weight.detach()] * 2))),
        lambda block: block.norm3.register_parameter("bias", None),
    ],
    ids=["norm elsewhere", "router elsewhere", "sharded", "wrapped", "taken out"],
)
def test_a_layer_whose_tensors_are_not_at_hand_is_left_out(hide):
    unet = upcycled_unet()
    hidden, *others = blocks_of(unet)
    hide(hidden)
    assert gathered_by(unet, unet.task_ids(NAMES)).affines_by_norm.keys() == {block.norm3 for block in others}


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(offload_type):
    unet = upcycled_unet()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    assert_close(predict(unet, given, *NAMES), expected)


def test_a_block_that_was_put_in_later_gathers_for_itself():
    unet, other = upcycled_unet(), upcycled_unet()
    given = inputs(unet)
    transformer = unet.down_blocks[0].attentions[0]
    transformer.transformer_blocks[0] = other.down_blocks[0].attentions[0].transformer_blocks[0]
    randomise_([transformer.transformer_blocks[0].norm3.weight], seed=5)
    expected = unet(**given, task_ids=unet.task_ids(NAMES)).sample
    assert torch.equal(predict(unet, given, *NAMES), expected)
    assert_differ(expected, predict(upcycled_unet(), given, *NAMES))


def test_tasks_that_come_and_go_are_gathered():
    unet = upcycled_unet()
    given = inputs(unet)
    unet.add_task(mtu.TaskSpec("colorize"), "edit")
    randomise_([block.norm3.weight for block in blocks_of(unet)], seed=6)
    for names in (("colorize", *NAMES[1:]), NAMES):
        expected = unet(**given, task_ids=unet.task_ids(names)).sample
        assert torch.equal(predict(unet, given, *names), expected)
    unet.remove_task("text-to-image")
    names = ("colorize", "remove", "edit", "super-resolution", "edit")
    assert torch.equal(predict(unet, given, *names), unet(**given, task_ids=unet.task_ids(names)).sample)
