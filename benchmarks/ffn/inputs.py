"""Random inputs of one feed-forward: several sets for a group, so that no contender finds its data in the cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.workloads import Setting, Workload
from mtu_kernels import ExpertWeights, NormAffine, Routing

EPS = 1e-5
# Assumed for a CPU, whose cache sizes torch does not tell.
_CPU_CACHE_BYTES = 32 * 2**20
_MAX_SETS = 32
# A backward pass keeps the saved tensors of its forward pass, once for each set.
_MAX_SETS_OF_CPU_BACKWARD = 2


class Inputs(NamedTuple):
    """One call, and the gradient that comes back to it.

    Attributes:
        x: (B, L, D) compute dtype.
        norm: (B, D) float32; (D,) in the compute dtype for the stock feed-forward.
        experts: H = 4·D, compute dtype.
        routing: weights (B, K) float32, indices (B, K) int32 or None.
        grad_y: (B, L, D) compute dtype.
    """

    x: Tensor
    norm: NormAffine
    experts: ExpertWeights
    routing: Routing
    grad_y: Tensor

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """Everything that the call reads."""
        names = ["x", "norm.weight", "norm.bias", *ExpertWeights._fields[:4], "routing.weights", "routing.indices"]
        tensors = (self.x, *self.norm, *self.experts[:4], *self.routing)
        return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}

    @property
    def names_of_leaves(self) -> list[str]:
        """Names of the tensors that a gradient is asked for."""
        return [name for name, tensor in self.named_tensors.items() if tensor.requires_grad]

    @property
    def leaf_tensors(self) -> list[Tensor]:
        return [self.named_tensors[name] for name in self.names_of_leaves]

    @property
    def moe_ffn_arguments(self) -> tuple[Tensor, NormAffine, ExpertWeights, Routing]:
        return self.x, self.norm, self.experts, self.routing


class SharedInputs(NamedTuple):
    """The part of the inputs that all entries of a group share."""

    x: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    grad_y: Tensor


def draw_shared_inputs(workload: Workload, device: torch.device, seed: int) -> SharedInputs:
    """Inputs of variance 1, weights over sqrt(fan-in). Never zeros: products of zeros run faster than those of data."""
    D, L, B, dtype = workload.D, workload.L, workload.B, DTYPES[workload.dtype]
    H = 4 * D
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        unit = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return (unit * fan_in**-0.5).requires_grad_(workload.needs_grad)

    weights = normal(2 * H, D, fan_in=D), normal(2 * H), normal(D, H, fan_in=H), normal(D)
    return SharedInputs(normal(B, L, D), *weights, normal(B, L, D).detach())


def draw_routed_inputs(shared: SharedInputs, setting: Setting, seed: int) -> Inputs:
    """The inputs of one setting: norm affines and routing are drawn for each task and gathered for each sample."""
    x, *weights, grad_y = shared
    B, _, D = x.shape
    E, K, T = setting
    generator = torch.Generator(x.device).manual_seed(seed)

    def uniform(columns: int) -> Tensor:
        return torch.rand(T, columns, generator=generator, device=x.device)

    tasks_B = torch.arange(B, device=x.device)
    # More tasks than samples: those present are spread over the table.
    tasks_B = tasks_B % T if T <= B else tasks_B * T // B
    gamma, beta, weighing = 0.5 + uniform(D), uniform(D) - 0.5, 0.5 + uniform(K or E)
    indices = uniform(E).argsort(dim=1)[:, :K].to(torch.int32)[tasks_B] if K else None
    gamma, beta, weighing = (t[tasks_B].requires_grad_(x.requires_grad) for t in (gamma, beta, weighing))
    experts = ExpertWeights(*weights, num_experts=E)
    return Inputs(x, NormAffine(gamma, beta), experts, Routing(weighing, indices), grad_y)


def number_of_input_sets(shared: SharedInputs, workload: Workload) -> int:
    """The number of sets of inputs that together exceed the last-level cache three times."""
    device = shared.x.device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
    set_bytes = sum(tensor.nbytes for tensor in shared[:5])
    limit = _MAX_SETS_OF_CPU_BACKWARD if device.type == "cpu" and workload.direction == "backward" else _MAX_SETS
    return min(limit, -(-3 * cache // set_bytes))
