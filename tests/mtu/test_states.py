"""Every public method of a model in every state: the plain model's result, or one sentence before anything changes."""

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import mtu
from mtu.compiling import CompiledCalls, Plan
from mtu.training import FitConfig, fit

from .tiny import SD, TOLERANCE, inputs, predict, randomise_, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
SMALL = {
    **SD,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
CPU = torch.device("cpu")
HELD = contextlib.ExitStack()
# Gradients go forward and backward, and the small ones of a deep network are sums of large ones that cancel.
CLOSE = 10 * TOLERANCE

# ------------------------------------------------------------------------------------------- states: how to get there


class Rounded(Tensor):
    """Stands for a quantizer's tensor: a subclass around another that holds its values, rounded."""

    @staticmethod
    def __new__(cls, values):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values):
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Rounded(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda leaf: leaf.values if isinstance(leaf, Rounded) else leaf, (args, kwargs or {}))
        output = func(*args, **kwargs)
        return Rounded(output) if func is torch.ops.aten.detach.default else output


@torch.no_grad()
def quantized(unet, folder, wrapped=True):
    for layer in unet.modules():
        if type(layer) is nn.Linear:
            values = layer.weight.detach().half().float()
            layer.weight = nn.Parameter(Rounded(values) if wrapped else values, requires_grad=False)
    return unet


def cpu_offloaded(unet, folder):
    accelerate.cpu_offload(unet, CPU)
    return unet


def disk_offloaded(unet, folder):
    accelerate.disk_offload(unet, folder / "offloaded", CPU)
    return unet


def dispatched(unet, folder):
    parts = {name: "disk" if name in ("up_blocks", "conv_in") else "cpu" for name, _ in unet.named_children()}
    return accelerate.dispatch_model(unet, parts, CPU, offload_dir=folder / "offloaded", force_hooks=True)


def group_offloaded(unet, folder, kind, on_disk=False):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    path = {"offload_to_disk_path": str(folder / "offloaded")} if on_disk else {}
    unet.enable_group_offload(CPU, offload_type=kind, **blocks, **path)
    return unet


def cast(unet, folder, storage):
    unet.enable_layerwise_casting(storage, torch.float32)
    return unet


def rounded_as_cast(unet, folder, storage):
    """The values that layerwise casting stores, computed with as usual."""
    stored = cast(copy.deepcopy(unet), folder, storage).state_dict()
    unet.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return unet


def adapted(unet, folder):
    torch.manual_seed(3)
    targets = ["ff.net.2", "ff.net.0.proj", "to_q"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return unet


def adapted_in_plain_weights(unet, folder):
    adapted(unet, folder).fuse_lora()
    unet.unload_lora()
    return unet


def disabled(unet, folder):
    adapted(unet, folder).disable_adapters()
    return unet


def compiled(unet, folder):
    unet._compiled_call_impl = CompiledCalls(unet, Plan({"backend": "eager"}, graphs=False), 8)
    outputs(unet)
    return unet


def compiled_blocks(unet, folder):
    unet.compile_repeated_blocks(backend="eager")
    outputs(unet)
    return unet


def wrapped_by_compiler(unet, folder):
    return torch.compile(unet, backend="eager")


def without_values(unet, folder):
    return unet.to("meta")


def held(unet, folder):
    """Within `hold_routing`, for as long as the test runs."""
    HELD.enter_context(torch.no_grad())
    HELD.enter_context(unet.hold_routing())
    outputs(unet)
    return unet


def plain(unet, folder):
    return unet


# ---------------------------------------------------------------------- methods: how to call them, and what to compare


def given_for(unet):
    given = inputs(mtu_or_stock(unet), batch=5, channels=8 if hasattr(unet, "tasks") else 4)
    on_meta = unet.conv_out.weight.is_meta and not hasattr(unet, "_hf_hook")
    return {name: tensor.to("meta") for name, tensor in given.items()} if on_meta else given


@functools.cache
def small_upcycled():
    return upcycled_unet(SMALL)


def mtu_or_stock(unet):
    return small_upcycled()


def outputs(unet, *names):
    return predict(unet, given_for(unet), *((names or NAMES) if hasattr(unet, "tasks") else ()))


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


def fitted(unet, folder):
    def loss(step):
        return unet(**given_for(unet), task_ids=unet.task_ids(NAMES)).sample.square().mean()

    unet.freeze_stock_parameters_()
    log = fit(loss, {"unet": unet}, unet.trainable_parameters(), FitConfig(steps=2, log_every=1))
    return [entry.loss for entry in log]


METHODS = {
    "forward": lambda unet, folder: (outputs(unet), predict(unet, given_for(unet))),
    "task_ids": lambda unet, folder: (unet.task_index("edit"), unet.task_ids(NAMES, "cpu"), unet.task_device.type),
    "add_task": after_adding,
    "remove_task": after_removing,
    "load_task": after_loading,
    "load_task_again": load_again,
    "router_weights": lambda unet, folder: unet.router_weights(),
    "drop_routers_": lambda unet, folder: (unet.drop_routers_(), outputs(unet), unet.router_weights()),
    "hold_routing": lambda unet, folder: outputs(held(unet, folder)),
    "invalidate_routing_cache": lambda unet, folder: (unet.invalidate_routing_cache(), outputs(unet)),
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
    "fit": fitted,
}

# ----------------------------------------------------------------------------------------------------------- the table


class State(NamedTuple):
    """A state of a model.

    Args:
        put: brings a plain model into it.
        like: a plain model that computes the same.
        refuses: what a method says in it that cannot be right.
        stock_fails: methods that stock models fail at, too.
        only: the methods to look at; None: all.
    """

    put: Callable[[Any, Path], Any]
    like: Callable[[Any, Path], Any] = plain
    refuses: Mapping[str, str] = MappingProxyType({})
    stock_fails: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None


SURGERY = ("add_task", "remove_task", "load_task", "load_task_again")
FILES = ("save_task", "save_trained", "save_pretrained")
OFFLOADED = dict.fromkeys((*SURGERY, "fit"), "needs a model that is wholly in memory, but .* offloaded by accelerate")
OFFLOADED |= {"compile": "this UNet is offloaded"}
GROUPED = dict.fromkeys((*SURGERY, "drop_routers_", "fit"), "wholly in memory, but .* are under group offloading")
GROUPED |= {"compile": "this UNet is offloaded"}
CAST = {"fit": "this model is under layerwise casting", "compile": "this UNet is offloaded"}
QUANTIZED = dict.fromkeys(
    ("save_trained", "save_pretrained", "export_task", "export_pruned"), "needs plain tensors, but .* Rounded"
)
ADAPTED = dict.fromkeys(
    ("save_trained", "save_pretrained", "export_task", "export_pruned"), "Unload adapters, .* of peft"
)
ON_META = dict.fromkeys(
    (*FILES, "load_task", "load_task_again", "fit"), "needs parameters with values, .* on the meta device"
)
NOT_COPIED = ("deepcopy", "pickle")
# Of states that differ from others in where values are kept alone.
SOME = ("forward", *SURGERY, "drop_routers_", "router_weights", "hold_routing", *FILES, "export_task", "warmup", "fit")
# A sum of weights and an adapter's product rounds to other values than its parts.
UNROUNDED = tuple(name for name in METHODS if name != "to_bfloat16")

STATES = {
    "plain": State(plain),
    "held": State(held, plain, only=(*SURGERY, "drop_routers_", "invalidate_routing_cache")),
    "cpu_offload": State(cpu_offloaded, plain, OFFLOADED, ("pickle", "training", "to_bfloat16")),
    "disk_offload": State(disk_offloaded, plain, OFFLOADED, only=SOME),
    "dispatched": State(dispatched, plain, OFFLOADED, ("pickle", "training", "to_bfloat16", "channels_last")),
    "group_blocks": State(functools.partial(group_offloaded, kind="block_level"), plain, GROUPED, NOT_COPIED),
    "group_leaves": State(functools.partial(group_offloaded, kind="leaf_level"), plain, GROUPED, NOT_COPIED),
    "group_disk": State(
        functools.partial(group_offloaded, kind="block_level", on_disk=True),
        plain,
        GROUPED,
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
    with HELD:
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


CELLS = [
    (name, method)
    for name, state in STATES.items()
    for method in state.only or METHODS
    if method not in state.stock_fails
]


@pytest.mark.parametrize(("name", "method"), CELLS, ids=["-".join(cell) for cell in CELLS])
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


@pytest.mark.parametrize(("name", "method"), [(name, m) for name, state in STATES.items() for m in state.stock_fails])
def test_what_is_left_out_is_what_stock_models_fail_at(name, method, tmp_path):
    state = STATES[name]
    expected = METHODS[method](state.like(stock_unet(SMALL), tmp_path / "like"), tmp_path)
    stock = state.put(stock_unet(SMALL), tmp_path)
    with pytest.raises(Exception, match=r".+"):  # of any kind, as it is not ours; or the result is another
        assert_same(METHODS[method](stock, tmp_path), expected)
