"""Launches of representative calls for any architecture, without a device: tensors have shapes only."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.harness.arguments import SHAPE_SETS
from benchmarks.harness.dtypes import DTYPES
from benchmarks.kernels.products import ProductShape, draw_operands, prepare_product
from mtu_kernels.triton import operators
from mtu_kernels.triton.kernels.index_check import launch_index_check
from mtu_kernels.triton.launch import Launch, LaunchDevice
from mtu_kernels.triton.tiles import LIBRARY, PLAIN_PRODUCTS, PRODUCTS, TableRow, TileConfig

# Width and tokens of the blocks of SD 1.5 and SDXL.
SD_SHAPES = SHAPE_SETS["sd15"] + SHAPE_SETS["sdxl"]
WIDTH_SHAPES = SD_SHAPES[:3]
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


class FFNCall(NamedTuple):
    """A call of the feed-forward.

    Attributes:
        shape: as `benchmarks.kernels.products` has it.
        dtype: of everything but routing weights and norm affines, which are float32.
        norm_per_expert: whether norm affines are (B, E, D) and b_out is (E, D).
    """

    shape: ProductShape
    dtype: str = "bf16"
    norm_per_expert: bool = False

    def __str__(self) -> str:
        return f"{self.shape}{', affine and bias per expert' if self.norm_per_expert else ''}"


class NamedLaunch(NamedTuple):
    """A launch, and the call or the product that it is part of.

    Attributes:
        name: of the call or the product, for people.
        table_row: of the table, if the launch has its tile.
        phase: of the call: "inference", "training", "backward", or "backward, recomputing".
    """

    name: str
    dtype: str
    table_row: TableRow | None
    launch: Launch
    shape: ProductShape
    phase: str = ""


class TileBlock(NamedTuple):
    """Rows, columns and depth of a step of a product's tile; columns with a value-gate pair each count once."""

    rows: int
    columns: int
    step: int


def tile_block_of(launch: Launch) -> TileBlock:
    """The tile of a product's launch."""
    return TileBlock(*(launch.constant_arguments[f"BLOCK_{name}"] for name in "MNK"))


def uses_descriptors(launch: Launch) -> bool:
    """Whether tensor descriptors say where operands lie."""
    return any(isinstance(argument, TensorDescriptor) for argument in launch.arguments)


def dense_shape(D: int, L: int, E: int = 4) -> ProductShape:
    """Two samples, all experts active, the hidden units of the stock feed-forward."""
    return ProductShape(D, L, 2, E, None, 4 * D // E)


def top_2_shape(D: int, L: int, E: int = 8) -> ProductShape:
    """Two samples, two experts active."""
    return ProductShape(D, L, 2, E, 2, 4 * D // E)


ODD = ProductShape(24, 13, 3, 3, 2, 10)


def few_calls() -> tuple[FFNCall, ...]:
    """One call of each kind of routing, which a quick check compiles beside the rows of the table."""
    return FFNCall(dense_shape(640, 1024)), FFNCall(top_2_shape(640, 1024), norm_per_expert=True)


def all_calls() -> tuple[FFNCall, ...]:
    """Every width, dtype and kind of routing, and a shape where nothing is a multiple of anything."""
    shapes = [shape for D, L in WIDTH_SHAPES for shape in (dense_shape(D, L), top_2_shape(D, L))]
    calls = [FFNCall(shape) for shape in shapes]
    calls += [FFNCall(shape, norm_per_expert=True) for shape in (dense_shape(640, 1024), top_2_shape(640, 1024))]
    calls += [
        FFNCall(shape, dtype)
        for dtype in ("fp16", "fp32")
        for shape in (dense_shape(640, 1024), top_2_shape(640, 1024))
    ]
    calls += [FFNCall(ODD, dtype, per_expert) for dtype in ("bf16", "fp32") for per_expert in (False, True)]
    return tuple(calls)


def record_launches(call: FFNCall, arch: str, *, recompute: bool = True) -> Iterator[NamedLaunch]:
    """The launches of a call: for inference, for training, and in the backward pass, also with recomputation."""
    launches: list[Launch] = []
    machine = LaunchDevice(arch, launches.append)
    tensors, grad_y = _tensors(call)
    made = operators.build_call(machine, tensors, call.shape.E)
    saved = None
    passes = {
        "inference": lambda: operators.run_inference(made, 1e-5),
        "training": lambda: operators.run_training_forward(made, 1e-5),
    }
    passes["backward"] = lambda: operators.compute_gradients(made, grad_y, saved, 1e-5, True)
    if recompute:
        passes["backward, recomputing"] = lambda: operators.compute_gradients(made, grad_y, None, 1e-5, True)
    for name, run in passes.items():
        launches.clear()
        results = run()
        if name == "training":
            saved = results[1:]
        for launch in launches:
            yield NamedLaunch(f"{name} {call}", call.dtype, None, launch, call.shape, name)


def record_launches_of_rows(rows: Iterable[TableRow]) -> Iterator[NamedLaunch]:
    """A launch for each row of the table, in each dtype that it is for; of hidden widths that any tile divides."""
    for row in rows:
        if not isinstance(row.tile, TileConfig):
            continue
        key = row.key
        E, K = (8, 2) if key.grouped else (4, None)
        shape = ProductShape(key.width or 640, 1024, 2, E, K, 640)
        for dtype in (name for name, bits in BITS.items() if bits == key.bits):
            for step in prepare_product(key.product, draw_operands(shape, dtype, "meta"), row.tile).steps:
                yield NamedLaunch(f"{key.product} {shape}", dtype, row, step, shape)


def record_other_launches(dtype: str) -> Iterator[NamedLaunch]:
    """Kernels around the library's products, which run wherever the table or its default says LIBRARY; index checks."""
    shape = dense_shape(640, 1024)
    for product in (product for product in PRODUCTS if product not in PLAIN_PRODUCTS):
        for step in prepare_product(product, draw_operands(shape, dtype, "meta"), LIBRARY).steps:
            if isinstance(step, Launch):
                yield NamedLaunch(f"{product} by the library, {shape}", dtype, None, step, shape)
    routed = top_2_shape(640, 1024)
    indices = draw_operands(routed, dtype, "meta").routing.indices
    valid = torch.empty(1, dtype=torch.int8, device="meta")
    yield NamedLaunch(f"index check, {routed}", dtype, None, launch_index_check(indices, valid, routed.E), routed)


def _tensors(call: FFNCall) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    D, L, B, E, K, F = call.shape
    dtype = DTYPES[call.dtype]

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    affine = (B, E, D) if call.norm_per_expert else (B, D)
    norm = [empty(*affine, dtype=torch.float32) for _ in range(2)]
    experts = empty(2 * E * F, D), empty(2 * E * F), empty(D, E * F), empty(*(E, D) if call.norm_per_expert else (D,))
    indices = None if K is None else empty(B, K, dtype=torch.int32)
    weights = empty(B, K or E, dtype=torch.float32)
    return (empty(B, L, D), *norm, *experts, weights, indices), empty(B, L, D)
