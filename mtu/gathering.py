"""Norm affines and routing weights of all layers, gathered for the samples of a call in one step.

Layer by layer, this is some five kernels of a few microseconds each: more than most layers' sums take on a fast GPU.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtu.norm import TaskLayerNorm
from mtu.plain_linear import is_plain_linear, is_replaced
from mtu.router import Gathered, Router, RoutingTable
from mtu_kernels import NormAffine, Routing

__all__ = ["Layer", "gather"]

# Compilers of kernels make another variant for a tensor that does not start at a multiple of 16 bytes.
_ALIGNMENT = 4  # elements of float32


class Layer(NamedTuple):
    """A routed feed-forward network, and the way to it.

    Args:
        block: the transformer block, with `norm3` and `ff.router`.
        outer: the modules around it, without the UNet.
    """

    block: nn.Module
    outer: tuple[nn.Module, ...]


def gather(layers: Sequence[Layer], task_ids: Tensor, embedding: Tensor | None) -> Gathered | None:
    """The affines and the routing of each sample, of all layers whose tensors may be read before their turn.

    Each value is what the layer itself would gather, bit for bit. Layers are left out where a call of a module means
    more than its own forward (offloading, casting, hooks, wrappers, compiled blocks), or where what they hold is not
    at hand (on another device, sharded). While a whole UNet is traced, affines are left to the layers: there the
    gather becomes part of the LayerNorm's kernel.

    Args:
        layers: of the UNet.
        task_ids: (B,) int64.
        embedding: (T, W) task embeddings; None once the routers are dropped.

    Returns:
        What was gathered; None with gradients, and where no layer allows it.
    """
    if torch.is_grad_enabled():
        return None
    blocks = [layer.block for layer in layers if _is_open(layer, task_ids.device)]
    if not blocks:
        return None
    is_traced = torch.compiler.is_compiling()
    norms = [] if is_traced else [block.norm3 for block in blocks]
    rows = _rows([table for norm in norms for table in (norm.weight, norm.bias)], task_ids)
    affines = {norm: NormAffine(*rows[2 * i : 2 * i + 2]) for i, norm in enumerate(norms)}
    routers = [block.ff.router for block in blocks]
    tables = [router(embedding) for router in routers]
    weights = _rows([table.weights for table in tables], task_ids)
    # All layers of a UNet are dense, or none is.
    is_dense = tables[0].indices is None
    indices = [None] * len(tables) if is_dense else _rows([table.indices for table in tables], task_ids)
    return Gathered(affines, dict(zip(routers, map(Routing, weights, indices), strict=True)), is_traced)


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
        beyond = -task_ids.shape[0] % unit
        ids = F.pad(task_ids, (0, beyond)) if beyond else task_ids
        gathered = stacked.index_select(1, ids)
        gathered = gathered.float() if gathered.is_floating_point() else gathered
        for i, row in zip(places, gathered.unbind(), strict=True):
            rows[i] = row[: task_ids.shape[0]]
    return rows


def _is_open(layer: Layer, device: torch.device) -> bool:
    block = layer.block
    norm, feed_forward = block.norm3, block.ff
    router = feed_forward.router
    return (
        all(map(_is_called_as_it_is, (*layer.outer, block, norm, feed_forward, router)))
        and type(norm) is TaskLayerNorm
        and all(_is_at_hand(norm._parameters.get(name), device) for name in ("weight", "bias"))
        and _can_route(router, device)
    )


def _is_called_as_it_is(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class, here, and nothing before or after it."""
    return not (
        is_replaced(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl is not None
    )


def _is_at_hand(table: Tensor | None, device: torch.device) -> bool:
    # Sharding leaves tensors of another type, or flat ones.
    return type(table) is nn.Parameter and table.device == device and table.dim() > 1


def _can_route(router: nn.Module, device: torch.device) -> bool:
    if type(router) is RoutingTable:
        return router.weights.device == device
    return type(router) is Router and all(
        is_plain_linear(linear) and _is_at_hand(linear.weight, device) for linear in (router.linear_1, router.linear_2)
    )
