"""The ratios that one feed-forward must reach, each a function of measured rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.ffn.peers import CONTENDERS
from benchmarks.harness.report import Ratio, Target, comparisons, ratios
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import DENSE, Workload

# The contender under test, unless another one is named.
TESTED = {"cuda": "mtu-triton", "cpu": "mtu-cpp"}
_Ratios = Callable[[Sequence[Row], str], list[Ratio]]


def paired_rows(rows: Sequence[Row], of: str, to: str, **changed: int | None) -> Iterator[tuple[Row, Row]]:
    """Rows of a contender, each with that of another one in its group, in its setting but for what is changed."""
    return comparisons(rows, of, to, lambda setting: CONTENDERS[to].relevant(setting._replace(**changed)))


def _with_dense_routing(row: Row, direction: str) -> bool:
    return row.workload.direction == direction and row.setting.K is DENSE and row.setting.tasks == 1


def _forward(to: str, where: Callable[[Workload], bool] = lambda workload: True, figure: str = "median_us") -> _Ratios:
    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        pairs = paired_rows(rows, tested, to)
        return ratios((p for p in pairs if _with_dense_routing(p[0], "forward") and where(p[0].workload)), figure)

    return found


def _training(figure: str = "median_us", recompute: bool = False) -> _Ratios:
    """Beside the stock feed-forward."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        of = _recomputing(tested) if recompute else tested
        pairs = paired_rows(rows, of, "eager")
        return ratios((p for p in pairs if _with_dense_routing(p[0], "forward+backward")), figure)

    return found


def _recomputing(tested: str) -> str:
    """The contender on the same backend that computes hidden units again; "" where there is none."""
    wanted = (CONTENDERS[tested].implementation.backend, True)
    same = (name for name, c in CONTENDERS.items() if (c.implementation.backend, c.implementation.recompute) == wanted)
    return next(same, "")


def _top_2_of_8(where: Callable[[Workload], bool] = lambda workload: True) -> _Ratios:
    """Over all experts."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        pairs = paired_rows(rows, tested, tested, K=DENSE)
        return ratios(p for p in pairs if _is_top_2_of_8(p[0]) and where(p[0].workload))

    return found


def _is_top_2_of_8(row: Row) -> bool:
    return row.workload.direction == "forward" and row.setting[:2] == (8, 2)


def _tasks(many: int, few: int) -> _Ratios:
    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        pairs = paired_rows(rows, tested, tested, tasks=few)
        return ratios(p for p in pairs if p[0].workload.direction == "forward" and p[0].setting.tasks == many)

    return found


def _large(workload: Workload) -> bool:
    return workload.D <= 640 and workload.L >= 1024


def _shape(D: int, L: int) -> Callable[[Workload], bool]:
    return lambda workload: (workload.D, workload.L) == (D, L)


def _on_a_cpu(name: str, to: str, at_most: dict[tuple[int, int], float]) -> tuple[Target, ...]:
    """A target for each shape."""
    return tuple(
        Target(f"forward / {name} at {D}x{L}", limit, _forward(to, _shape(D, L)), "bf16")
        for (D, L), limit in at_most.items()
    )


TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target("forward / two bare products, B >= 2", 1.10, _forward("products", lambda w: w.B >= 2), mean=True),
        Target("forward / two bare products, any shape", 1.15, _forward("products")),
        Target("forward / eager", 0.82, _forward("eager"), mean=True),
        Target("forward / eager at 320x4096", 0.65, _forward("eager", _shape(320, 4096))),
        Target("forward / compile-folded", 0.92, _forward("compile-folded"), mean=True),
        Target("forward / compile-folded-max", 0.92, _forward("compile-folded-max"), mean=True),
        Target("forward / compile-folded-max, any shape", 1.02, _forward("compile-folded-max")),
        Target("top-2 of 8 / dense of 8, D <= 640 and L >= 1024", 0.30, _top_2_of_8(_large)),
        Target("top-2 of 8 / dense of 8, other shapes", 0.45, _top_2_of_8(lambda w: not _large(w))),
        Target("four mixed tasks / one task", 1.03, _tasks(4, 1)),
        Target("64 tasks / 4 tasks", 1.03, _tasks(64, 4)),
        Target("forward + backward / eager", 0.75, _training(), mean=True),
        Target("bytes saved for backward / eager", 0.60, _training("saved_bytes")),
        Target("peak memory of forward + backward / eager", 0.95, _training("peak_bytes")),
        Target("the same with recompute", 0.60, _training("peak_bytes", recompute=True)),
    ),
    "cpu": (
        *_on_a_cpu("eager", "eager", {(320, 8192): 0.42, (640, 2048): 0.70, (1280, 512): 0.88, (1280, 128): 0.92}),
        *_on_a_cpu(
            "two bare products",
            "products",
            {(320, 8192): 1.10, (640, 2048): 1.05, (1280, 512): 1.00, (1280, 128): 1.05},
        ),
        Target("forward / eager", 0.90, _forward("eager"), "fp32", mean=True),
        Target("forward / compile-folded", 0.90, _forward("compile-folded"), mean=True),
        Target("top-2 of 8 / dense of 8", 0.35, _top_2_of_8()),
        Target("peak memory of forward / eager", 0.50, _forward("eager", figure="peak_bytes")),
        Target("forward + backward / eager", 1.00, _training(), mean=True),
    ),
}
