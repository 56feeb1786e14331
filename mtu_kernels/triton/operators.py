"""The three operators as sequences of launches: LayerNorm, first product, second product, and their gradients.

Each product runs as a kernel of this package, or by torch's library (cuBLAS) if routing is dense, so that it is a plain
matrix product. `tile_choice.find_tile` chooses. Kernels write sums over rows as partial sums, which are added here in a
fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtu_kernels.arguments import ExpertWeights, NormAffine
from mtu_kernels.routing import Routing
from mtu_kernels.triton.kernels.activation import GegluBackwardOutputs, launch_geglu, launch_geglu_backward
from mtu_kernels.triton.kernels.expert_in import FirstProductOutputs, launch_expert_in
from mtu_kernels.triton.kernels.expert_out_backward import launch_expert_out_backward, rows_per_tile
from mtu_kernels.triton.kernels.expert_sum import ExpertSumOperands, launch_expert_sum
from mtu_kernels.triton.kernels.expert_weights import launch_expert_weight_gradients
from mtu_kernels.triton.kernels.layer_norm import (
    NormBackwardOutputs,
    TokenStatistics,
    launch_layer_norm,
    launch_layer_norm_backward,
    num_norm_tiles,
)
from mtu_kernels.triton.launch import LaunchDevice, ceil_div, supports_launch_overlap
from mtu_kernels.triton.tile_choice import find_tile, token_count_class
from mtu_kernels.triton.tiles import ELEMENTWISE_TILE, LibraryProduct, TileConfig, TileKey


class OperatorCall(NamedTuple):
    """The tensors of one call, all contiguous, and the machine that runs its launches."""

    machine: LaunchDevice
    x: Tensor
    norm: NormAffine
    experts: ExpertWeights
    routing: Routing

    @property
    def slots_shape(self) -> tuple[int, ...]:
        """(K,) if each active expert has its own affine and so its own x̂, else ()."""
        return (self.routing.weights.shape[1],) if self.norm.weight.dim() == 3 else ()

    @property
    def expert_size(self) -> int:
        """F, the hidden units of one expert."""
        return self.experts.w_out.shape[1] // self.experts.num_experts

    @property
    def active_hidden_size(self) -> int:
        """K·F, the hidden units of all active experts of a sample."""
        return self.expert_size * self.routing.weights.shape[1]

    @property
    def precision(self) -> str:
        """The precision of float32 products, "ieee" or "tf32". It does not matter for 16-bit storage."""
        if self.experts.w_in.dtype != torch.float32 or not _tf32_allowed(self.x.device, self.machine.arch):
            return "ieee"
        return "tf32"

    def find_tile(self, product: str, *, grouped: bool) -> TileConfig | LibraryProduct:
        B, L, D = self.x.shape
        bits = 8 * self.experts.w_in.element_size()
        return find_tile(TileKey(product, self.machine.arch, bits, grouped, D, token_count_class(B * L)))

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.experts.w_in.dtype)


def build_call(machine: LaunchDevice, tensors: tuple[Tensor | None, ...], num_experts: int) -> OperatorCall:
    """The call of an operator with flattened arguments. Tensors that are not contiguous are copied."""
    x, gamma, beta, w_in, b_in, w_out, b_out, weights, indices = (
        None if t is None else t.contiguous() for t in tensors
    )
    experts = ExpertWeights(w_in, b_in, w_out, b_out, num_experts)
    return OperatorCall(machine, x, NormAffine(gamma, beta), experts, Routing(weights, indices))


def run_inference(call: OperatorCall, eps: float) -> Tensor:
    """y (B, L, D)."""
    x_hat = run_layer_norm(call, None, eps)
    h = call.new_empty(*call.x.shape[:2], call.active_hidden_size)
    run_first_product(call, x_hat, FirstProductOutputs(h, None))
    del x_hat
    return run_second_product(call, h)


def run_training_forward(call: OperatorCall, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, L, D), z (B, L, 2KF), mean and rstd (B, L)."""
    B, L, _ = call.x.shape
    statistics = _empty_statistics(call)
    x_hat = run_layer_norm(call, statistics, eps)
    h, z = call.new_empty(B, L, call.active_hidden_size), call.new_empty(B, L, 2 * call.active_hidden_size)
    run_first_product(call, x_hat, FirstProductOutputs(h, z))
    del x_hat
    return run_second_product(call, h), z, statistics.mean, statistics.rstd


def compute_gradients(
    call: OperatorCall, grad_y: Tensor, saved: tuple[Tensor, Tensor, Tensor] | None, eps: float, expert_grads: bool
) -> tuple[Tensor, ...]:
    """The gradients of x, norm, experts and routing weights, in their dtypes.

    Args:
        call: the arguments of the forward pass.
        grad_y: (B, L, D), with any strides.
        saved: z, mean and rstd. If ``None``, they are computed again, and ∂z overwrites z.
        eps: added to the variance, if statistics are computed again.
        expert_grads: whether experts are trained. If not, their gradients have no elements.
    """
    grad_y = grad_y.contiguous()
    if call.routing.indices is not None:
        # Kernels clamp wrong indices, which are reported elsewhere. PyTorch's operators below must not follow them
        # either.
        indices = call.routing.indices.clamp(0, call.experts.num_experts - 1)
        call = call._replace(routing=Routing(call.routing.weights, indices))
    recomputed = saved is None
    z, statistics = _recompute(call, eps) if saved is None else (saved[0], TokenStatistics(*saved[1:]))
    outputs = _activation_gradients(call, grad_y, z, in_place=recomputed, expert_grads=expert_grads)
    del z
    # The gradients of b_out, and of the weights that multiply it, need one pass over ∂y.
    is_summed = expert_grads or call.experts.b_out.dim() == 2
    grad_y_sum = grad_y.sum(dim=1, dtype=torch.float32) if is_summed else None
    d_weights = _routing_gradient(call, outputs.d_weights, grad_y_sum)
    if outputs.h is None:
        # Experts are not trained.
        d_experts = [call.new_empty(0) for _ in range(4)]
        d_x_hat = _input_gradient(call, outputs.d_z)
        del outputs
    else:
        d_b_in, d_b_out = _bias_gradients(call, outputs.d_bias, grad_y_sum)
        h, dz = outputs.h, outputs.d_z
        del outputs
        # This order has the lowest peak of memory. With many tokens, h is freed before the gradient of W_in is
        # allocated. With few, gradients of weights are larger, and ∂z is freed before the gradient of W_out is
        # allocated.
        out_first = h.numel() >= call.experts.w_out.numel()
        d_w_out = _w_out_gradient(call, grad_y, h) if out_first else None
        if out_first:
            del h
        d_w_in = _w_in_gradient(call, dz, eps)
        d_x_hat = _input_gradient(call, dz)
        del dz
        if d_w_out is None:
            d_w_out = _w_out_gradient(call, grad_y, h)
            del h
        d_experts = [d_w_in, d_b_in, d_w_out, d_b_out]
    d_x, d_gamma, d_beta = _norm_gradients(call, d_x_hat, statistics)
    dtypes = (*(t.dtype for t in call.norm), *(t.dtype for t in call.experts[:4]), call.routing.weights.dtype)
    others = (d_gamma, d_beta, *d_experts, d_weights)
    return d_x, *(grad.to(dtype) for grad, dtype in zip(others, dtypes, strict=True))


def run_first_product_alone(
    machine: LaunchDevice, x_hat: Tensor, w_in: Tensor, b_in: Tensor, weights: Tensor, num_experts: int
) -> Tensor:
    """h (B, L, H): the first product alone, for dense routing and a given x̂."""
    H = w_in.shape[0] // 2
    # The first product does not read these tensors. Their shapes say that routing is dense and what H is.
    w_out, absent = w_in.new_empty(0, H), w_in.new_empty(0)
    call = build_call(machine, (x_hat, absent, absent, w_in, b_in, w_out, absent, weights, None), num_experts)
    h = call.new_empty(*x_hat.shape[:2], H)
    run_first_product(call, call.x, FirstProductOutputs(h, None), follows_norm=False)
    return h


def run_layer_norm(call: OperatorCall, statistics: TokenStatistics | None, eps: float) -> Tensor:
    """x̂ (B, L, D), or (B, K, L, D) for affines (B, E, D). Writes statistics unless they are ``None``."""
    B, L, D = call.x.shape
    x_hat = call.new_empty(B, *call.slots_shape, L, D)
    overlap = supports_launch_overlap(call.machine.arch)
    call.machine.run_launch(
        launch_layer_norm(call.x, call.norm, call.routing.indices, x_hat, statistics, eps, overlap=overlap)
    )
    return x_hat


def run_first_product(
    call: OperatorCall, x_hat: Tensor, outputs: FirstProductOutputs, *, follows_norm: bool = True
) -> None:
    """Computes the first product, which writes h, z or both.

    Args:
        call: the arguments of the operator.
        x_hat: (B, L, D) or (B, K, L, D) compute dtype.
        outputs: the tensors to write.
        follows_norm: whether the previous launch is that of `run_layer_norm`, so that this one may start before it
            ends.
    """
    product = "expert_in" if outputs.z is None else "expert_in_train"
    tile = call.find_tile(product, grouped=call.routing.indices is not None or x_hat.dim() == 4)
    if isinstance(tile, TileConfig):
        overlap = follows_norm and supports_launch_overlap(call.machine.arch)
        experts, routing = call.experts, call.routing
        call.machine.run_launch(
            launch_expert_in(x_hat, experts, routing, outputs, tile, call.precision, overlap=overlap)
        )
        return
    z = call.new_empty(*call.x.shape[:2], 2 * call.active_hidden_size) if outputs.z is None else outputs.z
    torch.addmm(call.experts.b_in, x_hat.flatten(0, 1), call.experts.w_in.T, out=z.flatten(0, 1))
    if outputs.h is not None:
        call.machine.run_launch(launch_geglu(z, call.routing.weights, outputs.h, call.expert_size, ELEMENTWISE_TILE))


def run_second_product(call: OperatorCall, h: Tensor) -> Tensor:
    """The second product, y (B, L, D)."""
    experts = call.experts
    y = call.new_empty(*call.x.shape)
    tile = call.find_tile("expert_sum", grouped=call.routing.indices is not None or experts.b_out.dim() == 2)
    if isinstance(tile, TileConfig):
        summands = ExpertSumOperands(h, experts.w_out, False, experts.b_out, experts.num_experts)
        call.machine.run_launch(launch_expert_sum(summands, call.routing, y, tile, call.precision))
    else:
        torch.addmm(experts.b_out, h.flatten(0, 1), experts.w_out.T, out=y.flatten(0, 1))
    return y


def _recompute(call: OperatorCall, eps: float) -> tuple[Tensor, TokenStatistics]:
    statistics = _empty_statistics(call)
    z = call.new_empty(*call.x.shape[:2], 2 * call.active_hidden_size)
    run_first_product(call, run_layer_norm(call, statistics, eps), FirstProductOutputs(None, z))
    return z, statistics


def _activation_gradients(
    call: OperatorCall, grad_y: Tensor, z: Tensor, *, in_place: bool, expert_grads: bool
) -> GegluBackwardOutputs:
    B, L, _ = grad_y.shape
    width = call.active_hidden_size
    tile = call.find_tile("expert_out_backward", grouped=call.routing.indices is not None)
    if isinstance(tile, LibraryProduct):
        # The library's product has the size of h, which overwrites it.
        da, rows = (grad_y.flatten(0, 1) @ call.experts.w_out).view(B, L, width), ELEMENTWISE_TILE.block_m
    else:
        da, rows = None, rows_per_tile(tile, L)
    h = call.new_empty(B, L, width) if da is None and expert_grads else da
    tiles = ceil_div(L, rows)
    outputs = GegluBackwardOutputs(
        h=h if expert_grads else None,
        d_z=z if in_place else torch.empty_like(z),
        d_weights=call.new_empty(B, tiles, width, dtype=torch.float32),
        d_bias=call.new_empty(B, tiles, 2 * width, dtype=torch.float32) if expert_grads else None,
    )
    if isinstance(tile, LibraryProduct):
        launch = launch_geglu_backward(da, call.routing.weights, z, outputs, call.expert_size, ELEMENTWISE_TILE)
    else:
        precision = call.precision
        launch = launch_expert_out_backward(grad_y, call.experts, call.routing, z, outputs, tile, precision)
    call.machine.run_launch(launch)
    return outputs


def _routing_gradient(call: OperatorCall, sums: Tensor, grad_y_sum: Tensor | None) -> Tensor:
    weights, indices = call.routing
    d_weights_BK = sums.sum(dim=1).unflatten(-1, (weights.shape[1], -1)).sum(dim=-1)
    if grad_y_sum is not None and call.experts.b_out.dim() == 2:
        products_BE = (grad_y_sum[:, None] * call.experts.b_out.float()).sum(dim=-1)
        d_weights_BK += products_BE if indices is None else products_BE.gather(1, indices.long())
    return d_weights_BK


def _bias_gradients(call: OperatorCall, sums: Tensor, grad_y_sum: Tensor) -> tuple[Tensor, Tensor]:
    weights, indices = call.routing
    d_b_in_B2KF = sums.sum(dim=1).unflatten(-1, (2, weights.shape[1], -1))
    d_b_in = _add_samples(d_b_in_B2KF.transpose(1, 2), indices, call.experts.num_experts).transpose(0, 1).flatten()
    if call.experts.b_out.dim() == 1:
        return d_b_in, grad_y_sum.sum(dim=0)
    d_b_out_BKD = weights[:, :, None].float() * grad_y_sum[:, None]
    return d_b_in, _add_samples(d_b_out_BKD, indices, call.experts.num_experts)


def _add_samples(parts: Tensor, indices: Tensor | None, num_experts: int) -> Tensor:
    """Sums (E, …) over samples of the parts (B, K, …) of their active experts. Unused experts get exact zeros."""
    return _spread(parts, indices, num_experts).sum(dim=0)


def _spread(parts: Tensor, indices: Tensor | None, num_experts: int) -> Tensor:
    """Parts (B, K, …) of the active experts as (B, E, …), with exact zeros for inactive experts."""
    if indices is None:
        return parts
    # With deterministic algorithms, a scatter would sort or wait for the device. This sum has one term that is not
    # zero, so it is exact.
    owns_BKE = indices[:, :, None] == torch.arange(num_experts, device=indices.device)
    owns = owns_BKE.view(*owns_BKE.shape, *[1] * (parts.dim() - 2))
    return torch.where(owns, parts[:, :, None], 0).sum(dim=1)


def _w_out_gradient(call: OperatorCall, grad_y: Tensor, h: Tensor) -> Tensor:
    tile = call.find_tile("expert_weights", grouped=call.routing.indices is not None)
    if isinstance(tile, LibraryProduct):
        return grad_y.flatten(0, 1).T @ h.flatten(0, 1)
    gradient = torch.empty_like(call.experts.w_out)
    call.machine.run_launch(
        launch_expert_weight_gradients(h, grad_y, call.routing, gradient.T, call.expert_size, tile, call.precision)
    )
    return gradient


def _w_in_gradient(call: OperatorCall, dz: Tensor, eps: float) -> Tensor:
    # Computing x̂ again costs one pass over x, which is cheaper than keeping it.
    x_hat = run_layer_norm(call, None, eps)
    tile = call.find_tile("expert_weights", grouped=call.routing.indices is not None or x_hat.dim() == 4)
    if isinstance(tile, LibraryProduct):
        return dz.flatten(0, 1).T @ x_hat.flatten(0, 1)
    gradient = torch.empty_like(call.experts.w_in)
    call.machine.run_launch(
        launch_expert_weight_gradients(dz, x_hat, call.routing, gradient, call.expert_size, tile, call.precision)
    )
    return gradient


def _input_gradient(call: OperatorCall, dz: Tensor) -> Tensor:
    """∂x̂ (B, L, D), or (B, K, L, D) for affines (B, E, D)."""
    B, L, D = call.x.shape
    tile = call.find_tile("expert_in_backward", grouped=call.routing.indices is not None or bool(call.slots_shape))
    if isinstance(tile, LibraryProduct):
        return (dz.flatten(0, 1) @ call.experts.w_in).view(B, L, D)
    d_x_hat = call.new_empty(B, *call.slots_shape, L, D)
    summands = ExpertSumOperands(dz, call.experts.w_in, True, None, call.experts.num_experts)
    call.machine.run_launch(launch_expert_sum(summands, call.routing, d_x_hat, tile, call.precision))
    return d_x_hat


def _norm_gradients(call: OperatorCall, d_x_hat: Tensor, statistics: TokenStatistics) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = call.x.shape
    slots = call.slots_shape[0] if call.slots_shape else 1
    tiles = num_norm_tiles(L, D, slots)
    sums = [call.new_empty(B, tiles, slots, D, dtype=torch.float32) for _ in range(2)]
    outputs = NormBackwardOutputs(torch.empty_like(call.x), *sums)
    indices = call.routing.indices
    call.machine.run_launch(launch_layer_norm_backward(d_x_hat, call.x, statistics, call.norm, indices, outputs))
    d_gamma_BKD, d_beta_BKD = (t.sum(dim=1) for t in sums)
    if not call.slots_shape:
        return outputs.d_x, d_gamma_BKD[:, 0], d_beta_BKD[:, 0]
    num_experts = call.experts.num_experts
    return outputs.d_x, _spread(d_gamma_BKD, indices, num_experts), _spread(d_beta_BKD, indices, num_experts)


def _empty_statistics(call: OperatorCall) -> TokenStatistics:
    shape = call.x.shape[:2]
    return TokenStatistics(call.new_empty(*shape, dtype=torch.float32), call.new_empty(*shape, dtype=torch.float32))


def _tf32_allowed(device: torch.device, arch: str) -> bool:
    # Of AMD's architectures, Triton supports TF32 on one only.
    if device.type != "cuda" or (arch.startswith("gfx") and arch != "gfx942"):
        return False
    settings = torch.backends.cuda.matmul
    # If torch has the newer setting and a user has set it, reading the older one raises.
    precision = getattr(settings, "fp32_precision", None)
    return bool(settings.allow_tf32) if precision is None else precision == "tf32"
