"""Each product of the feed-forward alone, with any tile, for the tuner and for the checks of compiled code."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.dtypes import DTYPES
from mtu_kernels import ExpertWeights, Routing
from mtu_kernels.triton.kernels.activation import GegluBackwardOutputs, launch_geglu, launch_geglu_backward
from mtu_kernels.triton.kernels.expert_in import FirstProductOutputs, launch_expert_in
from mtu_kernels.triton.kernels.expert_out_backward import launch_expert_out_backward, rows_per_tile
from mtu_kernels.triton.kernels.expert_sum import ExpertSumOperands, launch_expert_sum
from mtu_kernels.triton.kernels.expert_weights import launch_expert_weight_gradients
from mtu_kernels.triton.launch import Launch
from mtu_kernels.triton.tile_choice import token_count_class
from mtu_kernels.triton.tiles import ELEMENTWISE_TILE, LibraryProduct, TileConfig, TileKey

Step = Launch | Callable[[], Any]


class ProductShape(NamedTuple):
    """The sizes of a product: width, tokens, samples, experts, active experts (None: dense), hidden units of each."""

    D: int
    L: int
    B: int
    E: int
    K: int | None
    F: int

    @property
    def active_hidden(self) -> int:
        return (self.K or self.E) * self.F

    def tile_key(self, product: str, arch: str, bits: int) -> TileKey:
        """The key by which the package finds the tile of this shape."""
        return TileKey(product, arch, bits, self.K is not None, self.D, token_count_class(self.B * self.L))

    def __str__(self) -> str:
        routing = f"dense E={self.E}" if self.K is None else f"top-{self.K} of {self.E}"
        return f"{self.D}x{self.L} B={self.B} {routing} F={self.F}"


class Operands(NamedTuple):
    """The operands of all products.

    Attributes:
        x_hat: (B, L, D); also stands for the gradient of y.
        h: (B, L, KF).
        z: (B, L, 2KF); also stands for its own gradient.
        experts: in the compute dtype, as all of the above.
        routing: weights (B, K) float32, indices (B, K) int32 or None.
    """

    x_hat: Tensor
    h: Tensor
    z: Tensor
    experts: ExpertWeights
    routing: Routing

    @property
    def expert_size(self) -> int:
        """F."""
        return self.experts.w_out.shape[1] // self.experts.num_experts


class PreparedProduct(NamedTuple):
    """A product, ready to run: its steps in order, and the tensors that they write."""

    steps: tuple[Step, ...]
    outputs: dict[str, Tensor]

    def run(self, execute: Callable[[Launch], None]) -> None:
        for step in self.steps:
            if isinstance(step, Launch):
                execute(step)
            else:
                step()


def draw_operands(shape: ProductShape, dtype: str, device: torch.device | str, seed: int = 0) -> Operands:
    """Operands of variance 1, weights over sqrt(fan-in); on the meta device without values."""
    D, L, B, E, K, F = shape
    meta = torch.device(device).type == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(*size: int, fan_in: int = 1) -> Tensor:
        unit = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return (unit * fan_in**-0.5).to(DTYPES[dtype])

    hidden = shape.active_hidden
    weights = normal(2 * E * F, D, fan_in=D), normal(2 * E * F), normal(D, E * F, fan_in=E * F), normal(D)
    mixture = torch.rand(B, K or E, generator=generator, device=device) + 0.5
    order = torch.rand(B, E, generator=generator, device=device).argsort(dim=1)
    routing = Routing(mixture, None if K is None else order[:, :K].to(torch.int32).contiguous())
    tokens = normal(B, L, D), normal(B, L, hidden), normal(B, L, 2 * hidden)
    return Operands(*tokens, ExpertWeights(*weights, E), routing)


def prepare_product(product: str, operands: Operands, tile: TileConfig | LibraryProduct) -> PreparedProduct:
    """The product by the package's kernel with this tile, or by the library's product and the kernels around it.

    Raises:
        ValueError: routing is by expert, and the library has no such product.
    """
    if isinstance(tile, LibraryProduct) and operands.routing.indices is not None:
        raise ValueError(f"{product} must have a tile where routing is top-k, got LIBRARY.")
    return _PREPARE[product](operands, tile)


def _first_product(operands: Operands, tile: TileConfig | LibraryProduct, *, keeps_z: bool) -> PreparedProduct:
    written = FirstProductOutputs(torch.empty_like(operands.h), torch.empty_like(operands.z) if keeps_z else None)
    x_hat, experts, routing = operands.x_hat, operands.experts, operands.routing
    outputs = {name: tensor for name, tensor in written._asdict().items() if tensor is not None}
    if isinstance(tile, TileConfig):
        return PreparedProduct((launch_expert_in(x_hat, experts, routing, written, tile, "ieee"),), outputs)
    z = torch.empty_like(operands.z) if written.z is None else written.z
    product = _addmm(experts.b_in, x_hat, experts.w_in.T, z)
    return PreparedProduct(
        (product, launch_geglu(z, routing.weights, written.h, operands.expert_size, ELEMENTWISE_TILE)), outputs
    )


def _expert_sum(operands: Operands, tile: TileConfig | LibraryProduct) -> PreparedProduct:
    experts, y = operands.experts, torch.empty_like(operands.x_hat)
    if isinstance(tile, LibraryProduct):
        return PreparedProduct((_addmm(experts.b_out, operands.h, experts.w_out.T, y),), {"y": y})
    summands = ExpertSumOperands(operands.h, experts.w_out, False, experts.b_out, experts.num_experts)
    return PreparedProduct((launch_expert_sum(summands, operands.routing, y, tile, "ieee"),), {"y": y})


def _expert_in_backward(operands: Operands, tile: TileConfig | LibraryProduct) -> PreparedProduct:
    experts, d_x_hat = operands.experts, torch.empty_like(operands.x_hat)
    if isinstance(tile, LibraryProduct):
        return PreparedProduct((_mm(operands.z, experts.w_in, d_x_hat),), {"d_x_hat": d_x_hat})
    summands = ExpertSumOperands(operands.z, experts.w_in, True, None, experts.num_experts)
    return PreparedProduct(
        (launch_expert_sum(summands, operands.routing, d_x_hat, tile, "ieee"),), {"d_x_hat": d_x_hat}
    )


def _expert_out_backward(operands: Operands, tile: TileConfig | LibraryProduct) -> PreparedProduct:
    grad_y, z, experts, routing = operands.x_hat, operands.z, operands.experts, operands.routing
    B, L, hidden = operands.h.shape
    rows = rows_per_tile(tile, L) if isinstance(tile, TileConfig) else ELEMENTWISE_TILE.block_m
    sums = [grad_y.new_empty(B, -(-L // rows), width, dtype=torch.float32) for width in (hidden, 2 * hidden)]
    written = GegluBackwardOutputs(torch.empty_like(operands.h), torch.empty_like(z), *sums)
    if isinstance(tile, TileConfig):
        launch = launch_expert_out_backward(grad_y, experts, routing, z, written, tile, "ieee")
        return PreparedProduct((launch,), written._asdict())
    da = torch.empty_like(operands.h)
    launch = launch_geglu_backward(da, routing.weights, z, written, operands.expert_size, ELEMENTWISE_TILE)
    return PreparedProduct((_mm(grad_y, experts.w_out, da), launch), written._asdict())


def _expert_weights(operands: Operands, tile: TileConfig | LibraryProduct) -> PreparedProduct:
    x_hat, h, z, experts, routing = operands
    d_w_in, d_w_out = torch.empty_like(experts.w_in), torch.empty_like(experts.w_out)
    outputs = {"d_w_in": d_w_in, "d_w_out": d_w_out}
    if isinstance(tile, LibraryProduct):
        steps = (
            lambda: torch.mm(z.flatten(0, 1).T, x_hat.flatten(0, 1), out=d_w_in),
            lambda: torch.mm(x_hat.flatten(0, 1).T, h.flatten(0, 1), out=d_w_out),
        )
        return PreparedProduct(steps, outputs)
    size = operands.expert_size
    return PreparedProduct(
        (
            launch_expert_weight_gradients(z, x_hat, routing, d_w_in, size, tile, "ieee"),
            launch_expert_weight_gradients(h, x_hat, routing, d_w_out.T, size, tile, "ieee"),
        ),
        outputs,
    )


def _addmm(bias: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.addmm(bias, a.flatten(0, 1), b, out=out.flatten(0, 1))


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.mm(a.flatten(0, 1), b, out=out.flatten(0, 1))


_PREPARE: dict[str, Callable[[Operands, TileConfig | LibraryProduct], PreparedProduct]] = {
    "expert_in": lambda operands, tile: _first_product(operands, tile, keeps_z=False),
    "expert_in_train": lambda operands, tile: _first_product(operands, tile, keeps_z=True),
    "expert_sum": _expert_sum,
    "expert_out_backward": _expert_out_backward,
    "expert_in_backward": _expert_in_backward,
    "expert_weights": _expert_weights,
}
