"""Every public method of a model in every state: the plain model's result, or one sentence before anything changes."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_flatten

import mtu
from mtu.inspection import compare_with_original
from mtu.training import Trainer, TrainerConfig

from .outputs import TOLERANCE, predict
from .states import (
    NAMES,
    PRECOMPUTED,
    SMALL,
    State,
    adapted,
    adapted_in_plain_weights,
    cast,
    compiled,
    compiled_blocks,
    cpu_offloaded,
    disabled,
    disk_offloaded,
    dispatched,
    given_for,
    group_offloaded,
    outputs,
    plain,
    quantized,
    rounded_as_cast,
    small_upcycled,
    with_precomputed_routing,
    without_values,
    wrapped_by_compiler,
)
from .tiny import randomise_, stock_unet, upcycled_unet
from .training.small_objectives import FunctionObjective

# Gradients go forward and backward, and the small ones of a deep network are sums of large ones that cancel.
CLOSE = 10 * TOLERANCE

# ---------------------------------------------------------------------- methods: how to call them, and what to compare


def after_adding(unet, folder):
    index = unet.add_task(mtu.TaskSpec("depth"), "edit")
    return index, [spec.name for spec in unet.tasks], outputs(unet, *["depth"] * 5), outputs(unet)


def after_removing(unet, folder):
    unet.remove_task("super-resolution")
    return outputs(unet, "edit", "remove", "edit", "text-to-image", "edit"), unet.router_weights()


def after_loading(unet, folder, task="depth", replace=False):
    return unet.load_task(SAVED[task], replace), outputs(unet, *[task] * 5), outputs(unet)


def load_again(unet, folder):
    return after_loading(unet, folder, "edit", replace=True)


def saved_task(unet, folder):
    unet.save_task(folder / "task", "edit")
    return dict(sorted(load_file(next((folder / "task").glob("*.safetensors"))).items()))


def saved_trained(unet, folder):
    unet.save_trained(folder / "trained")
    return outputs(mtu.load_trained(stock_unet(SMALL), folder / "trained"))


def saved_whole(unet, folder):
    unet.save_pretrained(folder / "whole")
    return outputs(type(small_upcycled()).from_pretrained(folder / "whole"))


def exported(unet, folder, prune=False):
    return predict(unet.export_task("edit", prune=prune), given_for(unet))


def through_bfloat16(unet, folder):
    # Computed with in float32, as kernels and layers round to bfloat16 at different places.
    return outputs(unet.to(torch.bfloat16).to(torch.float32))


def gradients(unet, folder):
    unet.requires_grad_(False)
    trained = [unet.conv_out.weight, unet.conv_norm_out.weight, unet.down_blocks[0].resnets[0].conv1.weight]
    for parameter in trained:
        parameter.requires_grad_(True)
    unet.train()
    unet(**given_for(unet)).sample.square().mean().backward()
    return [parameter.grad for parameter in trained]


def in_chunks(unet, folder):
    for block in unet.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(7, dim=1)
    return outputs(unet)


def checkpointed(unet, folder):
    unet.enable_gradient_checkpointing()
    unet.disable_gradient_checkpointing()
    return outputs(unet)


def trained(unet, folder):
    def loss(step):
        return unet(**given_for(unet), task_ids=unet.task_ids(NAMES)).sample.square().mean()

    unet.freeze_stock_parameters_()
    log = Trainer(FunctionObjective(loss, unet=unet), TrainerConfig(steps=2, learning_rate=1e-3, log_every=1)).train()
    return [entry.loss for entry in log]


def loaded(unet, folder):
    """`load_state_dict` of another model's values."""
    other = upcycled_unet(SMALL)
    randomise_([other.conv_out.weight, other.conv_in.weight], seed=5)
    names = ("conv_out.weight", "conv_in.weight")
    state = {name: other.state_dict()[name].to(torch.float8_e4m3fn).float() for name in names}
    unet.load_state_dict(state, strict=False)
    return outputs(unet)


def compared(unet, folder):
    comparison = compare_with_original(unet, size=64)
    return [(row.key, row.original, row.upcycled, row.upcycled_without_routers) for row in comparison.quantities]


METHODS = {
    "load_state_dict": loaded,
    "inspection": compared,
    "forward": lambda unet, folder: (outputs(unet), predict(unet, given_for(unet))),
    "task_ids": lambda unet, folder: (unet.task_index("edit"), unet.task_ids(NAMES, "cpu"), unet.task_ids_device.type),
    "add_task": after_adding,
    "remove_task": after_removing,
    "load_task": after_loading,
    "load_task_again": load_again,
    "router_weights": lambda unet, folder: unet.router_weights(),
    "drop_routers_": lambda unet, folder: (unet.drop_routers_(), outputs(unet), unet.router_weights()),
    "precomputed_routing_context": lambda unet, folder: outputs(with_precomputed_routing(unet, folder)),
    "clear_routing_cache": lambda unet, folder: (unet.clear_routing_cache(), outputs(unet)),
    "set_backend": lambda unet, folder: (unet.set_backend("eager"), outputs(unet)),
    "named_trainable_parameters": lambda unet, folder: [
        (name.replace(".base_layer", ""), parameter.shape) for name, parameter in unet.named_trainable_parameters()
    ],
    "freeze_stock_parameters_": lambda unet, folder: (
        unet.freeze_stock_parameters_(),
        sum(parameter.requires_grad for parameter in unet.parameters()),
    ),
    "save_task": saved_task,
    "save_trained": saved_trained,
    "save_pretrained": saved_whole,
    "export_task": exported,
    "export_pruned": functools.partial(exported, prune=True),
    "to_bfloat16": through_bfloat16,
    "channels_last": lambda unet, folder: outputs(unet.to(memory_format=torch.channels_last)),
    "deepcopy": lambda unet, folder: outputs(copy.deepcopy(unet)),
    "pickle": lambda unet, folder: outputs(pickle.loads(pickle.dumps(unet))),
    "training": gradients,
    "gradient_checkpointing": checkpointed,
    "set_chunk_feed_forward": in_chunks,
    "compile": lambda unet, folder: (mtu.compile(unet, "default"), True)[1:],
    "compile_eager": lambda unet, folder: outputs(mtu.compile(unet, "eager")),
    "warmup": lambda unet, folder: (list(mtu.warmup(unet, ["edit"], height=8, width=8)), outputs(unet)),
    "train": trained,
}

# ----------------------------------------------------------------------------------------------------------- the table


SURGERY = ("add_task", "remove_task", "load_task", "load_task_again")
FILES = ("save_task", "save_trained", "save_pretrained")
OFFLOADED = dict.fromkeys((*SURGERY, "train"), "needs a model that is wholly in memory, but accelerate offloads")
OFFLOADED |= {"compile": "this UNet is offloaded", "load_state_dict": "wholly in memory, but .* are offloaded"}
GROUPED = dict.fromkeys((*SURGERY, "drop_routers_", "train"), "wholly in memory, but .* are under group offloading")
GROUPED |= {"compile": "this UNet is offloaded"}
GROUPED_ON_DISK = {**GROUPED, "load_state_dict": OFFLOADED["load_state_dict"]}
CAST = {"train": "this model is under layerwise casting", "compile": "this UNet is offloaded"}
QUANTIZED = dict.fromkeys(
    ("save_trained", "save_pretrained", "export_task", "export_pruned"), "needs plain tensors, but .* Rounded"
)
ADAPTED = dict.fromkeys(
    ("save_trained", "save_pretrained", "export_task", "export_pruned"), "Unload adapters, .* of peft"
)
ON_META = dict.fromkeys(
    (*FILES, "load_task", "load_task_again", "load_state_dict", "train"),
    "needs parameters with values, .* on the meta device",
)
NOT_COPIED = ("deepcopy", "pickle")
SLOW = pytest.mark.slow
# Of states that differ from others in where values are kept alone.
SOME = (
    "forward",
    *SURGERY,
    "drop_routers_",
    "router_weights",
    "precomputed_routing_context",
    *FILES,
    "export_task",
    "warmup",
    "train",
)
# A sum of weights and an adapter's product rounds to other values than its parts.
UNROUNDED = tuple(name for name in METHODS if name != "to_bfloat16")

STATES = {
    "plain": State(plain),
    "precomputed": State(with_precomputed_routing, plain, only=(*SURGERY, "drop_routers_", "clear_routing_cache")),
    "cpu_offload": State(cpu_offloaded, plain, OFFLOADED, ("pickle", "training", "to_bfloat16")),
    "disk_offload": State(disk_offloaded, plain, OFFLOADED, only=SOME),
    "dispatched": State(dispatched, plain, OFFLOADED, only=SOME),
    "group_blocks": State(functools.partial(group_offloaded, kind="block_level"), plain, GROUPED, NOT_COPIED),
    "group_leaves": State(functools.partial(group_offloaded, kind="leaf_level"), plain, GROUPED, only=SOME),
    "group_disk": State(
        functools.partial(group_offloaded, kind="block_level", on_disk=True),
        plain,
        GROUPED_ON_DISK,
        (*NOT_COPIED, "to_bfloat16", "training"),
    ),
    "group_leaves_disk": State(
        functools.partial(group_offloaded, kind="leaf_level", on_disk=True), plain, GROUPED, only=SOME
    ),
    **{
        f"cast_{name}": State(
            functools.partial(cast, storage=storage),
            functools.partial(rounded_as_cast, storage=storage),
            CAST,
            (*NOT_COPIED, "training"),
        )
        for name, storage in (("bfloat16", torch.bfloat16), ("float8", torch.float8_e4m3fn))
    },
    "quantized": State(quantized, functools.partial(quantized, wrapped=False), QUANTIZED, ("deepcopy", "to_bfloat16")),
    "adapted": State(adapted, adapted_in_plain_weights, ADAPTED, only=UNROUNDED),
    "adapter_disabled": State(disabled, plain, ADAPTED, only=SOME),
    "adapted_offloaded": State(
        lambda unet, folder: cpu_offloaded(adapted(unet, folder), folder),
        adapted_in_plain_weights,
        {**ADAPTED, **OFFLOADED},
        ("pickle", "training"),
        UNROUNDED,
    ),
    "meta": State(without_values, without_values, ON_META),
    # Compiling takes seconds: what matters is whether code that was made for the model as it was is run again.
    "mtu.compile": State(compiled, only=("add_task", "load_task_again")),
    "compiled_blocks": State(compiled_blocks, only=("add_task",)),
    "torch.compile": State(wrapped_by_compiler, only=("named_trainable_parameters", *FILES, "export_task")),
}

SAVED: dict[str, Path] = {}
EXPECTED: dict[tuple[Callable, str], Any] = {}


@pytest.fixture(scope="module", autouse=True)
def saved_tasks(tmp_path_factory):
    """The tasks of another model of this architecture."""
    other = upcycled_unet(SMALL)
    other.add_task(mtu.TaskSpec("depth"), "remove")
    randomise_(other.trainable_parameters(), seed=7)
    for parameter in other.trainable_parameters():  # values that every state can hold as they are
        parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    for name in ("depth", "edit"):
        SAVED[name] = tmp_path_factory.mktemp(name)
        other.save_task(SAVED[name], name)


@pytest.fixture(autouse=True)
def nothing_left_over():
    torch.compiler.reset()
    with PRECOMPUTED:
        yield


def assert_same(actual, expected):
    (actual, kind), (expected, expected_kind) = tree_flatten(actual), tree_flatten(expected)
    assert kind == expected_kind
    for one, other in zip(actual, expected, strict=True):
        if not isinstance(one, Tensor):
            assert one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other)
            continue
        assert (one.shape, one.is_meta) == (other.shape, other.is_meta)
        if not one.is_meta:
            error, scale = (one.float() - other.float()).abs().max(), other.float().abs().max()
            assert error <= CLOSE * scale, f"error {error:.3g} of {scale:.3g}"


ESSENTIAL = {"forward", "add_task", "train"}
IN_FAST_TIER = {"precomputed", *(name for name, state in STATES.items() if state.only is None)}
CELLS = [
    pytest.param(
        name, method, id=f"{name}-{method}", marks=() if method in ESSENTIAL and name in IN_FAST_TIER else SLOW
    )
    for name, state in STATES.items()
    for method in state.only or METHODS
    if method not in state.stock_fails
]


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_method_in_a_state(name, method, tmp_path):
    state = STATES[name]
    unet = state.put(upcycled_unet(SMALL), tmp_path)
    if method not in state.refuses:
        if (state.like, method) not in EXPECTED:
            reference = state.like(upcycled_unet(SMALL), tmp_path / "like")
            EXPECTED[state.like, method] = METHODS[method](reference, tmp_path / "plain")
        assert_same(METHODS[method](unet, tmp_path), EXPECTED[state.like, method])
        return
    assert_refused(unet, method, state.refuses[method], tmp_path)


def assert_refused(unet, method, message, folder):
    """Raise unless the method says so in one sentence, and has changed nothing."""
    before, config = outputs(unet), dict(unet.config)
    parts = [*unet.parameters(), *unet.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        METHODS[method](unet, folder)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert ". " not in sentence
    assert "\n" not in sentence
    assert dict(unet.config) == config
    assert all(now is then for now, then in zip([*unet.parameters(), *unet.modules()], parts, strict=True))
    assert_same(outputs(unet), before)
    assert not [path for path in folder.iterdir() if path.name in ("task", "trained", "whole")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(name, m) for name, state in STATES.items() for m in state.stock_fails])
def test_what_is_left_out_is_what_stock_models_fail_at(name, method, tmp_path):
    state = STATES[name]
    expected = METHODS[method](state.like(stock_unet(SMALL), tmp_path / "like"), tmp_path)
    stock = state.put(stock_unet(SMALL), tmp_path)
    with pytest.raises(Exception, match=r".+"):  # of any kind, as it is not ours; or the result is another
        assert_same(METHODS[method](stock, tmp_path), expected)
