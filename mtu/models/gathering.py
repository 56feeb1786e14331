"""Norm affines and routing weights of all layers, gathered for the samples of a call in one step.

If each layer gathers its own, it launches some five kernels of a few microseconds each. On a fast GPU that takes longer
than the arithmetic of most layers. Layers that cannot take part gather for themselves (`TaskContext`).
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
from mtu.models.norm import TaskAffineTable
from mtu.models.router import GatheredTaskValues, Router, RoutingTable
from mtu_kernels import NormAffine, Routing
from mtu_kernels.tracing import is_exporting_or_tracing

__all__ = ["ConsecutiveBlocks", "can_precompute_routing", "find_consecutive_blocks", "gather_task_values"]

# Triton compiles another variant of a kernel for a tensor that does not start at a multiple of 16 bytes.
_ALIGNMENT = 4  # elements of float32


class ConsecutiveBlocks(NamedTuple):
    """Transformer blocks of one list, which run one after the other, and the modules around them.

    Args:
        enclosing_modules: the modules that contain the blocks, from the outermost in, without the UNet.
        blocks: the transformer blocks; each has `norm3` and `ff.router`.
    """

    enclosing_modules: tuple[nn.Module, ...]
    blocks: tuple[nn.Module, ...]


class _Layer(NamedTuple):
    norm: TaskAffineTable
    router: Router | RoutingTable


def find_consecutive_blocks(unet: nn.Module, block_names: Iterable[str]) -> tuple[ConsecutiveBlocks, ...]:
    """Group the blocks of these names by the list that contains them.

    Args:
        unet: the UNet.
        block_names: the names of transformer blocks in it.
    """
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
    """Gather norm affines and routing of each sample, for all layers whose tensors may be read before the layer runs.

    The values are those that the layer itself would gather, bit for bit. A layer is left out if a call of one of its
    modules does more than run its forward (offloading, casting, hooks, wrappers, compiled blocks), or if its tensors
    cannot be read here (on another device, sharded). While a whole UNet is traced, the layers gather their own affines,
    because the compiler then makes that part of the LayerNorm's kernel.

    Args:
        groups: the blocks of the UNet.
        task_ids: (B,) int64.
        embedding: (T, W) task embeddings; None once the routers are dropped.

    Returns:
        The gathered values; None with gradients, in exported and traced programs, and if every layer is left out.
    """
    # An exported program serves any batch, but would take over the strides of the example's. Global hooks of modules,
    # which profilers and counters set, expect a call of each module.
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
    # Either all layers of a UNet are dense, or none is.
    is_dense = tables[0].indices is None
    weights = _rows([table.weights for table in tables], task_ids)
    indices = [None] * len(tables) if is_dense else _rows([table.indices for table in tables], task_ids)
    routings = {layer.router: Routing(*row) for layer, *row in zip(layers, weights, indices, strict=True)}
    return GatheredTaskValues(affines, routings, is_traced)


def can_precompute_routing(unet: nn.Module, block_names: Iterable[str]) -> bool:
    """Whether the routers of these blocks may run outside a call of the UNet, with the same weights as within it.

    They may not if a module around them loads or casts its contents only during its own call, as group offloading and
    layerwise casting of whole models do. accelerate's offloading does this for each layer by itself.

    Args:
        unet: the UNet.
        block_names: the names of its transformer blocks.
    """
    names = {outer for name in block_names for outer in ("", *_prefixes(f"{name}.ff.router"))}
    for module in map(unet.get_submodule, names):
        if has_replaced_forward(module) and not has_accelerate_hook(module):
            return False
        if isinstance(module, Router) and not all(map(_has_its_weights, module.children())):
            return False
    return True


def _has_its_weights(linear: nn.Module) -> bool:
    """Whether a layer of a router may be called while the modules around it are not."""
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
        # Rows are added until each layer's start at a multiple of 16 bytes.
        unit = _ALIGNMENT // math.gcd(math.prod(stacked.shape[2:]), _ALIGNMENT)
        ids = task_ids
        if unit > 1:
            # A branch on the batch size would make a compiler build one program for each remainder.
            numbers = torch.arange(-(-task_ids.shape[0] // unit) * unit, device=task_ids.device)
            ids = task_ids[numbers.clamp(max=task_ids.shape[0] - 1)]
        gathered = stacked.index_select(1, ids)
        gathered = gathered.float() if gathered.is_floating_point() else gathered
        # A compiler would gather again for each layer, but a tensor that is read by strides must be in memory.
        gathered = gathered.as_strided(gathered.shape, gathered.stride())
        for i, row in zip(places, gathered[:, : task_ids.shape[0]].unbind(), strict=True):
            rows[i] = row
    return rows


def _open_layers(group: ConsecutiveBlocks, device: torch.device) -> Iterator[_Layer]:
    """The layers of these blocks whose tensors may be read before the layer runs."""
    if not all(map(has_unmodified_call, group.enclosing_modules)):
        return
    for block in group.blocks:
        # Access by attribute takes five times as long, and every step looks at up to seventy blocks.
        norm, feed_forward = block._modules["norm3"], block._modules["ff"]
        router = None if feed_forward is None else feed_forward._modules.get("router")
        if (
            type(norm) is TaskAffineTable
            # A wrapper of the network (a compiler's or an adapter's) has no router of its own.
            and router is not None
            and all(map(has_unmodified_call, (block, norm, feed_forward, router)))
            and _is_at_hand(norm._parameters.get("weight"), device)
            and _is_at_hand(norm._parameters.get("bias"), device)
            and _can_route(router, device)
        ):
            yield _Layer(norm, router)


def _is_at_hand(table: Tensor | None, device: torch.device) -> bool:
    # Sharding replaces parameters by tensors of another type, or by flat ones.
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
    """The names of the modules around a module and its own, from the outermost in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
