"""The rows of `results/unet_*.csv`, and the ratios that whole UNets must reach, each a function of measured rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.harness.report import Ratio, Target, comparisons, ratios
from benchmarks.harness.rows import TIMES, Row, Table
from benchmarks.harness.workloads import DENSE, Workload
from benchmarks.models.unet_catalogue import ONE_BY_ONE, ORIGINAL, find, sibling

TABLE = Table(
    "benchmarks.models.unet",
    (
        *("group", "contender", "device", "model", "size", "B", "branches", "dtype", "E", "K", "tasks", "graph"),
        *(*TIMES, "rounds", "peak_bytes", "weight_bytes", "warmup_s", "switch_us", "images_per_s"),
    ),
    times=".0f",
)
# The contender under test, unless another one is named.
TESTED = {"cuda": "mtu-triton", "cpu": "mtu-cpp"}
_Ratios = Callable[[Sequence[Row], str], list[Ratio]]
_Where = Callable[[Workload], bool]


def _sd15(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sd15", 512)


def _sdxl(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sdxl", 1024)


def _dense(rows: Sequence[Row], of: str, to: str, tasks: int, where: _Where) -> list[tuple[Row, Row]]:
    """Rows with dense routing of so many tasks, each with that of another contender in the same setting."""
    return [
        (row, other)
        for row, other in comparisons(rows, of, to, find(to).relevant)
        if row.setting.K is DENSE and row.setting.tasks == tasks and where(row.workload)
    ]


def _to_original(run: str | None, where: _Where, E: int, *, tasks: int = 4, eagerly: bool = False) -> _Ratios:
    """Time over that of the original, run in the same way or eagerly."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        to = ORIGINAL if eagerly else sibling(ORIGINAL, run=run)
        return ratios(p for p in _dense(rows, sibling(tested, run=run), to, tasks, where) if p[0].setting.E == E)

    return found


def _switching(run: str | None) -> _Ratios:
    """Time between two steps whose tasks differ, over that of a step."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        name = sibling(tested, run=run)
        return ratios(_dense(rows, name, name, 4, lambda workload: True), "switch_us", "median_us")

    return found


def _weights(run: str | None) -> _Ratios:
    """Bytes of four tasks' weights over those of the original."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        names = sibling(tested, run=run), sibling(ORIGINAL, run=run)
        return ratios(_dense(rows, *names, 4, lambda w: _sd15(w) or _sdxl(w)), "weight_bytes")

    return found


def _at_once(run: str | None) -> _Ratios:
    """Time of four pictures of four tasks in one call over that of four calls."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        names = sibling(tested, run=run), sibling(tested, run=run, variant=ONE_BY_ONE)
        return ratios(_dense(rows, *names, 4, lambda w: w.B == 4))

    return found


# On a GPU contenders are compiled code in a CUDA graph.
_GRAPHS = "graphs"
TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target(
            "SD 1.5 at 512x512, four mixed tasks, graphs / the original, graphs",
            1.00,
            _to_original(_GRAPHS, _sd15, E=4),
            "bf16",
        ),
        Target(
            "SDXL at 1024x1024, four mixed tasks, graphs / the original, graphs",
            0.97,
            _to_original(_GRAPHS, _sdxl, E=1),
            "bf16",
        ),
        Target(
            "SD 1.5 at 512x512, batch of 2, graphs / the original, eager",
            0.55,
            _to_original(_GRAPHS, lambda w: _sd15(w) and w.rows == 2, E=4, tasks=2, eagerly=True),
            "bf16",
        ),
        Target("switching tasks / a step", 0.01, _switching(_GRAPHS), "bf16"),
        Target("weights of four tasks / the original's", 1.02, _weights(_GRAPHS), "bf16"),
        Target("four tasks at once / one after another", 0.85, _at_once(_GRAPHS), "bf16"),
    ),
    "cpu": (
        Target(
            "SD 1.5 at 512x512, four mixed tasks / the original, eager",
            0.97,
            _to_original(None, _sd15, E=4),
            "bf16",
        ),
        Target("switching tasks / a step", 0.01, _switching(None)),
        Target("weights of four tasks / the original's", 1.02, _weights(None)),
        Target("four tasks at once / one after another", None, _at_once(None)),
    ),
}
