"""Routers: the weight of each expert for each task, and the selection of a sample's rows from per-task tables.

The initial values live in `mtu.models.initial_routing`, the kernels' own routing in `mtu_kernels`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtu.compat.plain_linear import RouterLinear, has_replaced_forward, is_plain_linear, wrap_to_skip_8bit_casts
from mtu.experts import ExpertConfig
from mtu.models.task_rows import PerTaskModule
from mtu_kernels import NormAffine, Routing, top_k_routing
from mtu_kernels.tracing import is_exporting_or_tracing, supports_autocast

__all__ = [
    "GatheredTaskValues",
    "Router",
    "RoutingTable",
    "TaskContext",
    "TaskEmbeddings",
    "precomputed_tables_context",
    "routing_table_parameter_ids",
    "select_rows",
]

# The check of a cached table reads so many elements per tensor. They are few enough to take microseconds, and spread so
# that steps of an optimizer or of averaging, which change all elements, are noticed.
_FINGERPRINT_ELEMENTS = 16


class GatheredTaskValues(NamedTuple):
    """The norm affines and routings of the samples of one UNet call, gathered before its blocks run.

    `mtu.models.gathering` makes them.

    Args:
        affines_by_norm: the affine of each sample, by task norm.
        routings_by_router: the routing of each sample, by router.
        gathered_while_tracing: whether they were gathered while the whole UNet was traced.
    """

    affines_by_norm: dict[nn.Module, NormAffine]
    routings_by_router: dict[nn.Module, Routing]
    gathered_while_tracing: bool


class TaskContext(NamedTuple):
    """The tasks of the samples of one UNet call, as its blocks need them.

    Args:
        task_ids: (B,) int64, the task of each sample.
        embeddings_of_all_tasks: (T, W) the task embedding shared by all routers; None once the routers are dropped.
        gathered: the values that were gathered before the blocks run; None: each layer gathers its own.
    """

    task_ids: Tensor
    embeddings_of_all_tasks: Tensor | None
    gathered: GatheredTaskValues | None = None

    def affine_per_sample(self, norm: nn.Module) -> NormAffine:
        """The affine of each sample: γ and β, (B, D) or (B, E, D) float32."""
        gathered = self._gathered_here()
        affine = None if gathered is None else gathered.affines_by_norm.get(norm)
        return norm(self.task_ids) if affine is None else affine

    def routing_per_sample(self, router: nn.Module) -> Routing:
        """The routing of each sample: weights (B, K) float32 and indices (B, K) int32, or None for dense routing."""
        gathered = self._gathered_here()
        routing = None if gathered is None else gathered.routings_by_router.get(router)
        if routing is not None:
            return routing
        table = router(self.embeddings_of_all_tasks)
        indices = None if table.indices is None else select_rows(table.indices, self.task_ids)
        return Routing(select_rows(table.weights, self.task_ids), indices)

    def _gathered_here(self) -> GatheredTaskValues | None:
        # A block that is compiled by itself must not look up its own values, as its code serves all equal blocks.
        gathered = self.gathered
        if gathered is None or gathered.gathered_while_tracing != torch.compiler.is_compiling():
            return None
        return gathered


def select_rows(table: Tensor, task_ids: Tensor) -> Tensor:
    """The row of each sample, `table[task_ids]`.

    With gradients it is a product with one-hot rows, because the backward of plain indexing adds with atomics on GPUs,
    in an order that differs from run to run. Both ways give the same bits for finite tables. Tables of integers, which
    have no gradients, are always indexed.

    Args:
        table: (T, …) of any dtype.
        task_ids: (B,) int64.

    Returns:
        (B, …) in the dtype of the table.
    """
    if not (torch.is_grad_enabled() and table.requires_grad) or is_exporting_or_tracing():
        return table.index_select(0, task_ids)
    one_hot = F.one_hot(task_ids, table.shape[0]).to(table.dtype)
    one_hot = one_hot.view(*one_hot.shape, *(1,) * (table.dim() - 1))
    return (one_hot * table).sum(1)


class TaskEmbeddings(PerTaskModule):
    """The learnable embeddings e_t of all tasks, which the routers read.

    It is no `nn.Embedding`, because layerwise casting would round that.

    Args:
        num_tasks: T.
        width: W.

    Parameters: weight (T, W).
    """

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, width))
        nn.init.normal_(self.weight)

    def forward(self) -> Tensor:
        """All embeddings, (T, W)."""
        # A view keeps its values after the call, when offloading takes the memory away from the parameter.
        return self.weight.view_as(self.weight)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(wrap_to_skip_8bit_casts(fn), recurse)


class Router(nn.Module):
    """The router of one feed-forward network: `w = routing_scale · softmax(MLP(e_t))`, float32.

    A two-layer perceptron with ReLU. With top-k, the softmax is over the k largest logits of each task (ties to the
    lower index) and the other experts do no work.

    Args:
        config: the expert layout, with the router's width, the number of experts, top_k and routing_scale.

    Source: MTU (arXiv 2503.11905) eq. 1.
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.top_k = None if config.has_dense_routing else config.top_k
        self.routing_scale = config.routing_scale
        self.linear_1 = RouterLinear(config.router_width, config.router_width)
        self.linear_2 = RouterLinear(config.router_width, config.num_experts)
        self._cache: tuple[object, Routing] | None = None
        # The table of `precompute`, whose memory stays in one place.
        self._table: Routing | None = None
        self.is_precomputed = False

    def forward(self, embedding: Tensor) -> Routing:
        """The routing of every task.

        Args:
            embedding: (T, W) task embeddings.

        Returns:
            Weights (T, K) float32 and indices (T, K) int32, or None for dense routing.
        """
        if torch.is_grad_enabled() or self.training:
            return self._route(embedding)
        if self._table is not None and self.is_precomputed_on(embedding.device):
            return self._table
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._route(embedding)
        key = self._cache_key(embedding)
        if key is None:
            return self._route(embedding)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self._route(embedding))
        return self._cache[1]

    def precompute(self, embedding: Tensor) -> None:
        """Run the router now; `forward` returns the result until `discard_precomputed`.

        Tables of the same shape are written to the same memory, so a CUDA graph that reads it gets the new values.

        Args:
            embedding: (T, W) task embeddings.
        """
        key = self._cache_key(embedding)
        # A tensor that is made in inference mode cannot be written to outside it, where gradients are on by default.
        with torch.inference_mode(False), torch.no_grad():
            if key is None or self._cache is None or self._cache[0] != key:
                self._cache = (key, self._route(embedding))
            if self._cache[1] is not self._table:
                self._table = Routing(*map(_written, self._table or (None, None), self._cache[1]))
                self._cache = (key, self._table)
        self.is_precomputed = True

    def is_precomputed_on(self, device: torch.device) -> bool:
        """Whether `forward` returns a precomputed table for embeddings on a device.

        Offloading may have moved the model since the table was computed.
        """
        return self.is_precomputed and self._table is not None and self._table.weights.device == device

    def discard_precomputed(self) -> None:
        """Let `forward` run the router again, or return its cache."""
        self.is_precomputed = False

    def __getstate__(self) -> dict:
        # A copy is independent of the context that the original is used in.
        return {**super().__getstate__(), "is_precomputed": False}

    def clear_cache(self) -> None:
        """Clear the cached table."""
        self._cache = None

    def _route(self, embedding: Tensor) -> Routing:
        # Autocast would round the routing weights, which must be float32. Some devices (meta) have no autocast.
        device_type = embedding.device.type
        no_autocast = (
            torch.autocast(device_type, enabled=False) if supports_autocast(device_type) else contextlib.nullcontext()
        )
        with no_autocast:
            hidden = F.relu(self.linear_1(embedding))
            logits = self.linear_2(hidden).float()
        if self.top_k is None:
            return Routing(self.routing_scale * torch.softmax(logits, dim=-1), None)
        routing = top_k_routing(logits, self.top_k)
        return Routing(self.routing_scale * routing.weights, routing.indices)

    def _cache_key(self, embedding: Tensor) -> object | None:
        # Writes through `.data` and fused optimizers change neither the version nor the address, so the key includes
        # some values. On other devices than the CPU, reading them would take longer than running the router.
        if not (is_plain_linear(self.linear_1) and is_plain_linear(self.linear_2)):
            return None  # The scale of an adapter is no tensor, and may change at any time.
        tensors = [embedding, *self.parameters()]
        if any(tensor.device.type != "cpu" or tensor.is_inference() for tensor in tensors):
            return None
        # Tensor subclasses (FakeTensor, for example) have no values to read.
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return None
        return tuple((t.data_ptr(), t._version, t.dtype, t.shape, _fingerprint(t)) for t in tensors)


class RoutingTable(PerTaskModule):
    """The output of a router as a table of constants, which replaces the router when it is dropped.

    The constants are parameters without gradients. They are no buffers, because offloading to disk forgets those.

    Args:
        config: the expert layout.
        num_tasks: T.

    Parameters: weights (T, K) float32, indices (T, K) int32 or None.
    """

    # `mtu.compat.parameter_access` reads this; it takes integers in other modules for those of a quantizer.
    has_integer_parameters = True

    weights: nn.Parameter
    indices: nn.Parameter | None

    def __init__(self, config: ExpertConfig, num_tasks: int) -> None:
        super().__init__()
        shape = (num_tasks, config.num_active_experts)
        self.weights = _constant(torch.zeros(shape, dtype=torch.float32))
        self.register_parameter(
            "indices", None if config.has_dense_routing else _constant(torch.zeros(shape, dtype=torch.int32))
        )

    @classmethod
    @torch.no_grad()
    def from_routing(cls, config: ExpertConfig, routing: Routing) -> "RoutingTable":
        """Make the table from the output of a router."""
        table = cls(config, len(routing.weights)).to(routing.weights.device)
        table.weights.copy_(routing.weights)
        if table.indices is not None:
            table.indices.copy_(routing.indices)
        return table

    def forward(self, embedding: Tensor | None = None) -> Routing:
        """The routing of every task: weights (T, K) float32, indices (T, K) int32 or None."""
        if has_replaced_forward(self):
            # Offloading takes the memory away from the parameters after the call, but not from detached tensors.
            return Routing(self.weights.detach(), None if self.indices is None else self.indices.detach())
        return Routing(self.weights, self.indices)

    def _apply(self, fn, recurse: bool = True):
        # `.to(torch.bfloat16)` and layerwise casting must not round routing weights, so the table keeps its dtype.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


def routing_table_parameter_ids(module: nn.Module) -> set[int]:
    """The ids (`id(parameter)`) of the constants in a module that replace dropped routers, and are never trained."""
    return {id(p) for m in module.modules() if isinstance(m, RoutingTable) for p in m.parameters()}


@contextlib.contextmanager
def precomputed_tables_context(routers: Iterable[Router], embedding: Tensor | None) -> Iterator[None]:
    """Run routers once, now, instead of at each call within this context; see `Router.precompute`.

    Args:
        routers: those to run; routers within another such context keep its tables.
        embedding: (T, W) task embeddings; None if there are no routers.
    """
    routers = [router for router in routers if not router.is_precomputed]
    try:
        for router in routers:
            router.precompute(embedding)
        yield
    finally:
        for router in routers:
            router.discard_precomputed()


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _written(kept: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The values of `new`, in the memory of `kept` if shape and device fit."""
    if kept is None or new is None or (kept.shape, kept.device) != (new.shape, new.device):
        return new.clone() if new is not None and new.is_inference() else new
    return kept.copy_(new)


def _fingerprint(tensor: Tensor) -> tuple[float, ...]:
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // _FINGERPRINT_ELEMENTS)
    return tuple(flat[::step].tolist())
