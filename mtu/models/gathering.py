"""Norm affines and routing weights of all layers, gathered for the samples of a call in one step.

Layer by layer, this is some five kernels of a few microseconds each: more than most layers' sums take on a fast GPU.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mtu.compat.plain_linear import RouterLinear, has_replaced_forward, has_unmodified_call, is_plain_linear
from mtu.compat.private_interfaces import has_accelerate_hook
from mtu.models.norm import TaskLayerNorm
from mtu.models.router import GatheredTaskValues, Router, RoutingTable
from mtu_kernels import NormAffine, Routing
from mtu_kernels.tracing import is_exporting_or_tracing

__all__ = ["ConsecutiveBlocks", "can_precompute_routing", "find_consecutive_blocks", "gather_task_values"]

# Compilers of kernels make another variant for a tensor that does not start at a multiple of 16 bytes.
_ALIGNMENT = 4  # elements of float32


class ConsecutiveBlocks(NamedTuple):
    """Transformer blocks that run one after the other, and the way to them.

    Args:
        enclosing_modules: the modules around them, without the UNet.
        blocks: each with `norm3` and `ff.router`.
    """

    enclosing_modules: tuple[nn.Module, ...]
    blocks: tuple[nn.Module, ...]


class _Layer(NamedTuple):
    norm: TaskLayerNorm
    router: Router | RoutingTable


def find_consecutive_blocks(unet: nn.Module, block_names: Iterable[str]) -> tuple[ConsecutiveBlocks, ...]:
    """The blocks of these names, by the list that they are in."""
    groups: dict[str, list[nn.Module]] = defaultdict(list)
    for name in block_names:
        groups[name.rpartition(".")[0]].append(unet.get_submodule(name))
    return tuple(
        ConsecutiveBlocks(tuple(unet.get_submodule(outer) for outer in _prefixes(name)), tuple(blocks))
        for name, blocks in groups.items()
    )


def gather_task_values(
    groups: Sequence[ConsecutiveBlocks], task_ids: Tensor, embedding: Tensor | None
) -> GatheredTaskValues | None:
    """The affines and the routing of each sample, of all layers whose tensors may be read before their turn.

    Each value is what the layer itself would gather, bit for bit. Layers are left out where a call of a module means
    more than its own forward (offloading, casting, hooks, wrappers, compiled blocks), or where what they hold is not
    at hand (on another device, sharded). While a whole UNet is traced, affines are left to the layers: there the
    gather becomes part of the LayerNorm's kernel.

    Args:
        groups: the blocks of the UNet.
        task_ids: (B,) int64.
        embedding: (T, W) task embeddings; None once the routers are dropped.

    Returns:
        What was gathered; None with gradients, in exported and traced programs, and where no layer allows it.
    """
    # Of a program that is traced for any batch, the strides of one would become part. Hooks of all modules, which
    # profilers and counters set, are shown each module in its turn.
    if torch.is_grad_enabled() or is_exporting_or_tracing() or _has_any_global_hook():
        return None
    layers = [layer for group in groups for layer in _open_layers(group, task_ids.device)]
    if not layers:
        return None
    is_traced = torch.compiler.is_compiling()
    norms = [] if is_traced else [layer.norm for layer in layers]
    rows = iter(_rows([table for norm in norms for table in (norm.weight, norm.bias)], task_ids))
    affines = {norm: NormAffine(next(rows), next(rows)) for norm in norms}
    tables = [layer.router(embedding) for layer in layers]
    # All layers of a UNet are dense, or none is.
    is_dense = tables[0].indices is None
    weights = _rows([table.weights for table in tables], task_ids)
    indices = [None] * len(tables) if is_dense else _rows([table.indices for table in tables], task_ids)
    routings = {layer.router: Routing(*row) for layer, *row in zip(layers, weights, indices, strict=True)}
    return GatheredTaskValues(affines, routings, is_traced)


def can_precompute_routing(unet: nn.Module, block_names: Iterable[str]) -> bool:
    """Whether the routers of these blocks may run outside a call of the UNet, with the weights of the call.

    Not where a module around them brings in or casts what is within it for the time of its call: group offloading, and
    layerwise casting of whole models. Offloading by accelerate does so for each layer by itself, or keeps the weights.
    """
    names = {outer for name in block_names for outer in ("", *_prefixes(f"{name}.ff.router"))}
    for module in map(unet.get_submodule, names):
        if has_replaced_forward(module) and not has_accelerate_hook(module):
            return False
        if isinstance(module, Router) and not all(map(_has_its_weights, module.children())):
            return False
    return True


def _has_its_weights(linear: nn.Module) -> bool:
    """Whether a layer of a router may be called, whatever is not being called around it."""
    if type(linear) is not RouterLinear or has_replaced_forward(linear):
        return True
    return is_plain_linear(linear) and not linear.weight.is_meta


def _rows(tables: Sequence[Tensor], task_ids: Tensor) -> list[Tensor]:
    """`table[task_ids]` of each table (T, …), as (B, …) contiguous; floating-point ones in float32."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, table in enumerate(tables):
        alike[table.dtype, *table.shape].append(i)
    rows: list[Tensor] = [task_ids] * len(tables)
    for places in alike.values():
        stacked = torch.stack([tables[i] for i in places])
        # With so many rows that each layer's start at a multiple of 16 bytes.
        unit = _ALIGNMENT // math.gcd(math.prod(stacked.shape[2:]), _ALIGNMENT)
        ids = task_ids
        if unit > 1:
            # Without a branch on the batch, for each remainder of which a compiler would make a program.
            numbers = torch.arange(-(-task_ids.shape[0] // unit) * unit, device=task_ids.device)
            ids = task_ids[numbers.clamp(max=task_ids.shape[0] - 1)]
        gathered = stacked.index_select(1, ids)
        gathered = gathered.float() if gathered.is_floating_point() else gathered
        # A compiler would gather again for each layer. What is read by strides it must have in memory.
        gathered = gathered.as_strided(gathered.shape, gathered.stride())
        for i, row in zip(places, gathered[:, : task_ids.shape[0]].unbind(), strict=True):
            rows[i] = row
    return rows


def _open_layers(group: ConsecutiveBlocks, device: torch.device) -> Iterator[_Layer]:
    """The layers of some blocks whose tensors may be read before their turn."""
    if not all(map(has_unmodified_call, group.enclosing_modules)):
        return
    for block in group.blocks:
        # Not by attribute: that takes five times as long, and there are seventy of these in every step.
        norm, feed_forward = block._modules["norm3"], block._modules["ff"]
        router = feed_forward._modules.get("router")
        if (
            type(norm) is TaskLayerNorm
            # What wraps the network (a compiler, an adapter) has no router of its own.
            and router is not None
            and all(map(has_unmodified_call, (block, norm, feed_forward, router)))
            and _is_at_hand(norm._parameters.get("weight"), device)
            and _is_at_hand(norm._parameters.get("bias"), device)
            and _can_route(router, device)
        ):
            yield _Layer(norm, router)


def _is_at_hand(table: Tensor | None, device: torch.device) -> bool:
    # Sharding leaves tensors of another type, or flat ones.
    return (
        isinstance(table, nn.Parameter)
        and not is_traceable_wrapper_subclass(table)
        and table.device == device
        and table.dim() > 1
    )


def _can_route(router: nn.Module, device: torch.device) -> bool:
    if type(router) is RoutingTable:
        return router.weights.device == device
    if type(router) is not Router:
        return False
    return router.is_precomputed_on(device) or all(
        is_plain_linear(linear) and _is_at_hand(linear.weight, device) for linear in (router.linear_1, router.linear_2)
    )


def _prefixes(name: str) -> list[str]:
    """The names of the modules around a module, from the outside in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
