"""States that a model can be brought into, and how it is called in each: what `test_states.py` goes through.

Each takes a model in memory and a folder of its own, and returns the model in its state.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import accelerate
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mtu.runtime.compiling import CompiledUNetCalls, ExecutionPlan

from .outputs import predict
from .tiny import SD, inputs, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
SMALL = {
    **SD,
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
CPU = torch.device("cpu")
PRECOMPUTED = contextlib.ExitStack()


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
    unet._compiled_call_impl = CompiledUNetCalls(unet, ExecutionPlan({"backend": "eager"}, uses_cuda_graphs=False), 8)
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


def with_precomputed_routing(unet, folder):
    """Within `precomputed_routing_context`, for as long as the test runs."""
    PRECOMPUTED.enter_context(torch.no_grad())
    PRECOMPUTED.enter_context(unet.precomputed_routing_context())
    outputs(unet)
    return unet


def plain(unet, folder):
    return unet


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


def given_for(unet):
    given = inputs(small_upcycled(), batch=5, channels=8 if hasattr(unet, "tasks") else 4)
    on_meta = unet.conv_out.weight.is_meta and not hasattr(unet, "_hf_hook")
    return {name: tensor.to("meta") for name, tensor in given.items()} if on_meta else given


@functools.cache
def small_upcycled():
    return upcycled_unet(SMALL)


def outputs(unet, *names):
    return predict(unet, given_for(unet), *((names or NAMES) if hasattr(unet, "tasks") else ()))
