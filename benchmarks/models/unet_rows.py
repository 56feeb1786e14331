"""The rows of `results/unet_*.csv`, and the ratios that whole UNets are held to."""

from __future__ import annotations

from benchmarks.harness.report import Target
from benchmarks.harness.rows import TIMES, Table
from benchmarks.harness.workloads import DENSE, Workload

TABLE = Table(
    "benchmarks.models.unet",
    (
        *("group", "contender", "device", "model", "size", "B", "branches", "dtype", "E", "K", "tasks", "graph"),
        *(*TIMES, "rounds", "peak_bytes", "weight_bytes", "warmup_s", "switch_us", "images_per_s"),
    ),
    times=".0f",
)


def _sd15(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sd15", 512)


def _sdxl(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sdxl", 1024)


_MIXED = {"K": DENSE, "tasks": 4}
_SWITCH = {"setting": _MIXED, "quantity": "switch_us", "to_quantity": "median_us"}
_WEIGHTS = {"setting": _MIXED, "quantity": "weight_bytes", "where": lambda w: _sd15(w) or _sdxl(w)}
_BATCHED = {"setting": _MIXED, "where": lambda w: w.B == 4}
# Of the contenders, "graphs" stands for compiled code in a CUDA graph.
_GRAPHS = {"of": "{tested}+graphs", "dtype": "bf16"}
_EACH = "{tested}+graphs@each"
TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target(
            "SD 1.5 at 512x512, four mixed tasks, graphs / the original, graphs",
            **_GRAPHS,
            at_most=1.00,
            to="stock+graphs",
            setting={"E": 4, **_MIXED},
            where=_sd15,
        ),
        Target(
            "SDXL at 1024x1024, four mixed tasks, graphs / the original, graphs",
            **_GRAPHS,
            at_most=0.97,
            to="stock+graphs",
            setting={"E": 1, **_MIXED},
            where=_sdxl,
        ),
        Target(
            "SD 1.5 at 512x512, batch of 2, graphs / the original, eager",
            **_GRAPHS,
            at_most=0.55,
            to="stock",
            setting={"E": 4, "K": DENSE, "tasks": 2},
            where=lambda w: _sd15(w) and w.rows == 2,
        ),
        Target("switching tasks / a step", **_GRAPHS, at_most=0.01, to="{tested}+graphs", **_SWITCH),
        Target("weights of four tasks / the original's", **_GRAPHS, at_most=1.02, to="stock+graphs", **_WEIGHTS),
        Target("four tasks at once / one after another", **_GRAPHS, at_most=0.85, to=_EACH, **_BATCHED),
    ),
    "cpu": (
        Target(
            "SD 1.5 at 512x512, four mixed tasks / the original, eager",
            0.97,
            to="stock",
            setting={"E": 4, **_MIXED},
            where=_sd15,
            dtype="bf16",
        ),
        Target("switching tasks / a step", 0.01, **_SWITCH),
        Target("weights of four tasks / the original's", 1.02, to="stock", **_WEIGHTS),
        Target("four tasks at once / one after another", None, to="{tested}@each", **_BATCHED),
    ),
}
