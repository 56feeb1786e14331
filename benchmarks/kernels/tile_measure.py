"""Measures tiles of one product on the device that is here: compiled ahead on all cores, checked, then timed."""

import concurrent.futures
import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness.timing import capture_stream, time_each, warm_up
from benchmarks.kernels.ahead_of_time import CHIPS, CompiledLaunch, compile_launch, compiler_input_of
from benchmarks.kernels.products import Operands, ProductShape, draw_operands, prepare_product
from benchmarks.kernels.sass import count_waits
from mtu_kernels.triton.launch import execute_launch
from mtu_kernels.triton.tiles import LibraryProduct, TileConfig

Tile = TileConfig | LibraryProduct

# Screening is short; the fastest tiles are then timed again, together.
_SCREENING_SECONDS = 0.005
_FINAL_SECONDS = 0.04
_FINALISTS = 5
_MAX_SETS = 6


class ProductTask(NamedTuple):
    """A product at a shape."""

    product: str
    shape: ProductShape
    dtype: str

    def __str__(self) -> str:
        return f"{self.product} {self.shape} {self.dtype}"


class TileTimer:
    """Times tiles on a device (a GPU, or the interpreter's CPU), inside a `with` block.

    `refused` has the reason for each tile without a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.refused: dict[tuple[ProductTask, Tile], str] = {}
        self._stream = capture_stream(device)

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def time_tiles(self, task: ProductTask, tiles: Sequence[Tile], keep: Sequence[Tile] = ()) -> dict[Tile, float]:
        """Median time in µs of each tile that computes the product rightly; tiles to keep are timed with the fastest.

        Tiles that do not fit, or compute something else, are missing, and `refused` has the reason.
        """
        sets = [draw_operands(task.shape, task.dtype, self.device, seed) for seed in range(self._number_of_sets(task))]
        exact = reference_outputs(task.product, sets[0])
        calls = {}
        for tile in tiles:
            try:
                assert_matches_reference(_run(task.product, sets[0], tile), exact, sets[0].x_hat.dtype)
                calls[tile] = [functools.partial(_run, task.product, operands, tile) for operands in sets]
                warm_up(calls[tile], self.device)
            except (AssertionError, RuntimeError, triton.TritonError, triton.OutOfResources) as error:
                calls.pop(tile, None)
                self.refused[task, tile] = " ".join(str(error).split())[:200]
        del exact
        times = self._time(calls, _SCREENING_SECONDS)
        best = sorted(times, key=times.__getitem__)[:_FINALISTS]
        finalists = dict.fromkeys([*best, *(tile for tile in keep if tile in times)])
        return times | self._time({tile: calls[tile] for tile in finalists}, _FINAL_SECONDS)

    def _time(self, calls: dict[Tile, list], seconds: float) -> dict[Tile, float]:
        if not calls:
            return {}
        return {tile: timing.median_us for tile, timing in time_each(calls, self.device, seconds).items()}

    def _number_of_sets(self, task: ProductTask) -> int:
        """The number of sets of operands that exceed the last-level cache twice, so that weights come from memory."""
        B, L, D = task.shape.B, task.shape.L, task.shape.D
        hidden = task.shape.E * task.shape.F
        set_bytes = 2 * (B * L * (D + 3 * task.shape.active_hidden) + 3 * hidden * D)
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(_MAX_SETS, max(1, math.ceil(2 * cache / set_bytes)))


def compile_ahead(candidates: Mapping[ProductTask, Sequence[Tile]], arch: str) -> dict[tuple[ProductTask, Tile], str]:
    """Compiles candidates on all cores, into Triton's cache. Returns those that need not be measured, with the reasons.

    These are kernels that spill, need more shared memory than there is, or wait for Hopper's tensor cores after each
    product. A kernel that serves many shapes is compiled once.
    """
    alike: dict[tuple, list[tuple[ProductTask, Tile]]] = {}
    for task, tiles in candidates.items():
        operands = draw_operands(task.shape, task.dtype, "meta")
        for tile in tiles:
            if isinstance(tile, TileConfig):
                steps = prepare_product(task.product, operands, tile).steps
                alike.setdefault(tuple(compiler_input_of(step, arch).key for step in steps), []).append((task, tile))
    firsts = [(*same[0], arch) for same in alike.values()]
    if not firsts:
        return {}
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(firsts)), mp_context=context) as pool:
        reasons = list(tqdm(pool.map(_why_not, firsts), total=len(firsts), unit="kernel", file=sys.stderr))
    pairs = zip(alike.values(), reasons, strict=True)
    return {candidate: reason for same, reason in pairs if reason for candidate in same}


def why_refused(compiled: CompiledLaunch, arch: str) -> str | None:
    """The reason not to measure a compiled candidate, as a clause; None if it is measured."""
    if compiled.machine_code is not None and compiled.machine_code.stack_bytes:
        return f"it spills {compiled.machine_code.stack_bytes} bytes"
    if arch in CHIPS and compiled.shared_bytes > CHIPS[arch].max_shared_bytes_per_program:
        return f"it needs {compiled.shared_bytes} bytes of shared memory"
    waits = 0 if compiled.machine_code is None else count_waits(compiled.machine_code.main_loop)
    return f"it waits {waits} times for its products in a step of its main loop" if waits > 1 else None


def _why_not(job: tuple[ProductTask, TileConfig, str]) -> str | None:
    task, tile, arch = job
    # Listing the code takes half as long as compiling it; the tuner needs it for Hopper's waits alone.
    listed = arch == "sm_90"
    try:
        steps = prepare_product(task.product, draw_operands(task.shape, task.dtype, "meta"), tile).steps
        reasons = [why_refused(compile_launch(step, arch, listed=listed), arch) for step in steps]
    except Exception as error:  # Compilers fail in many ways, and a candidate that does not compile is none.
        return f"it does not compile: {' '.join(str(error).split())[:200]}"
    return next(filter(None, reasons), None)


def _run(product: str, operands: Operands, tile: Tile) -> dict[str, Tensor]:
    """One call, which allocates its results, so that captured calls share their memory."""
    work = prepare_product(product, operands, tile)
    work.run(execute_launch)
    return work.outputs


def assert_matches_reference(outputs: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Asserts that results are those of the reference but for rounding.

    With the library's product there are three roundings, each by half an ulp at most: u, g and h, or ∂(w a) and the
    result. A fourth half is for sums of float32 in other orders and for the polynomial of the activation.
    """
    allowed = 2 * torch.finfo(dtype).eps
    for name, expected in exact.items():
        actual = outputs[name].float()
        if actual.dim() == expected.dim() + 1:
            actual = actual.sum(dim=1)
        error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
        # Not "error > …", which NaN would pass.
        if not error <= allowed * scale:
            raise AssertionError(f"{name} must be within {allowed * scale:.3g} of the reference, got {error:.3g} off")


def reference_outputs(product: str, operands: Operands) -> dict[str, Tensor]:
    """The results of a product, by float32 products of PyTorch; sums over row tiles are summed."""
    samples = [_Sample(operands, b) for b in range(operands.x_hat.shape[0])]
    if product == "expert_weights":
        return _weights_reference(operands, samples)
    per_sample = [_REFERENCES[product](sample) for sample in samples]
    return {name: torch.stack([outputs[name] for outputs in per_sample]) for name in per_sample[0]}


class _Sample:
    """One sample with the weights of its active experts, float32."""

    def __init__(self, operands: Operands, b: int) -> None:
        experts, (weights, indices), F = operands.experts, operands.routing, operands.expert_size
        E = experts.num_experts
        self.active = torch.arange(E, device=weights.device) if indices is None else indices[b].long()
        self.w_in = experts.w_in.float().unflatten(0, (2, E, F))[:, self.active].flatten(0, 2)
        self.b_in = experts.b_in.float().unflatten(0, (2, E, F))[:, self.active].flatten()
        self.w_out = experts.w_out.float().unflatten(1, (E, F))[:, self.active].flatten(1)
        self.b_out = experts.b_out.float()
        self.weights = weights[b].float().repeat_interleave(F)
        self.x_hat, self.h, self.z = (t[b].float() for t in operands[:3])


def _expert_in(sample: _Sample) -> dict[str, Tensor]:
    u, g = (sample.x_hat @ sample.w_in.T + sample.b_in).chunk(2, dim=-1)
    return {"h": u * torch.nn.functional.gelu(g) * sample.weights}


def _expert_in_train(sample: _Sample) -> dict[str, Tensor]:
    return _expert_in(sample) | {"z": sample.x_hat @ sample.w_in.T + sample.b_in}


def _expert_sum(sample: _Sample) -> dict[str, Tensor]:
    return {"y": sample.h @ sample.w_out.T + sample.b_out}


def _expert_in_backward(sample: _Sample) -> dict[str, Tensor]:
    return {"d_x_hat": sample.z @ sample.w_in}


def _expert_out_backward(sample: _Sample) -> dict[str, Tensor]:
    u, g = sample.z.chunk(2, dim=-1)
    cdf = 0.5 + 0.5 * torch.erf(g * 0.5**0.5)
    slope = cdf + g * torch.exp(-0.5 * g * g) / (2 * torch.pi) ** 0.5
    da, a = sample.x_hat @ sample.w_out, u * g * cdf
    dz = torch.cat([da * sample.weights * g * cdf, da * sample.weights * u * slope], dim=-1)
    return {"h": a * sample.weights, "d_z": dz, "d_weights": (da * a).sum(dim=0), "d_bias": dz.sum(dim=0)}


def _weights_reference(operands: Operands, samples: list[_Sample]) -> dict[str, Tensor]:
    experts, F = operands.experts, operands.expert_size
    E = experts.num_experts
    d_w_in, d_w_out = (torch.zeros_like(t, dtype=torch.float32) for t in (experts.w_in, experts.w_out))
    for sample in samples:
        by_expert = (sample.z.T @ sample.x_hat).unflatten(0, (2, -1, F))
        d_w_in.unflatten(0, (2, E, F)).index_add_(1, sample.active, by_expert)
        d_w_out.unflatten(1, (E, F)).index_add_(1, sample.active, (sample.x_hat.T @ sample.h).unflatten(1, (-1, F)))
    return {"d_w_in": d_w_in, "d_w_out": d_w_out}


_REFERENCES = {
    "expert_in": _expert_in,
    "expert_in_train": _expert_in_train,
    "expert_sum": _expert_sum,
    "expert_in_backward": _expert_in_backward,
    "expert_out_backward": _expert_out_backward,
}
