"""The ratios that one feed-forward must reach, each a function of measured rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.ffn.peers import CONTENDERS
from benchmarks.harness.report import Ratio, Target, comparisons, ratios
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import DENSE

# The contender under test, unless another one is named.
TESTED = {"cuda": "mtu-triton", "cpu": "mtu-cpp"}
_Ratios = Callable[[Sequence[Row], str], list[Ratio]]
_Wanted = Callable[[Row], bool]


def paired_rows(rows: Sequence[Row], of: str, to: str, **changed: int | None) -> Iterator[tuple[Row, Row]]:
    """Rows of a contender, each with that of another one in its group, in its setting but for what is changed."""
    return comparisons(rows, of, to, lambda setting: CONTENDERS[to].relevant(setting._replace(**changed)))


def _over(
    to: str | None, wanted: _Wanted, figure: str = "median_us", *, of: Callable[[str], str] = str, **changed: int | None
) -> _Ratios:
    """Figures of the wanted rows over those of another contender, or of the same one in another setting."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        pairs = paired_rows(rows, of(tested), to or tested, **changed)
        return ratios((pair for pair in pairs if wanted(pair[0])), figure)

    return found


def _recomputing(tested: str) -> str:
    """The contender on the same backend that computes hidden units again; "" where there is none."""
    wanted = (CONTENDERS[tested].implementation.backend, True)
    same = (name for name, c in CONTENDERS.items() if (c.implementation.backend, c.implementation.recompute) == wanted)
    return next(same, "")


def _dense(row: Row) -> bool:
    """Whether it is a forward pass with dense routing of one task."""
    return row.workload.direction == "forward" and row.setting.K is DENSE and row.setting.tasks == 1


def _training(row: Row) -> bool:
    return row.workload.direction == "forward+backward" and row.setting.K is DENSE and row.setting.tasks == 1


def _top_2_of_8(row: Row) -> bool:
    return row.workload.direction == "forward" and row.setting[:2] == (8, 2)


def _of_tasks(tasks: int) -> _Wanted:
    return lambda row: row.workload.direction == "forward" and row.setting.tasks == tasks


def _large(row: Row) -> bool:
    return row.workload.D <= 640 and row.workload.L >= 1024


def _shape(D: int, L: int) -> _Wanted:
    return lambda row: _dense(row) and row.workload[:2] == (D, L)


def _on_a_cpu(name: str, to: str, at_most: dict[tuple[int, int], float]) -> tuple[Target, ...]:
    """A target for each shape."""
    return tuple(
        Target(f"forward / {name} at {D}x{L}", limit, _over(to, _shape(D, L)), "bf16")
        for (D, L), limit in at_most.items()
    )


TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target(
            "forward / two bare products, B >= 2",
            1.10,
            _over("products", lambda row: _dense(row) and row.workload.B >= 2),
            mean=True,
        ),
        Target("forward / two bare products, any shape", 1.15, _over("products", _dense)),
        Target("forward / eager", 0.82, _over("eager", _dense), mean=True),
        Target("forward / eager at 320x4096", 0.65, _over("eager", _shape(320, 4096))),
        Target("forward / compile-folded", 0.92, _over("compile-folded", _dense), mean=True),
        Target("forward / compile-folded-max", 0.92, _over("compile-folded-max", _dense), mean=True),
        Target("forward / compile-folded-max, any shape", 1.02, _over("compile-folded-max", _dense)),
        Target(
            "top-2 of 8 / dense of 8, D <= 640 and L >= 1024",
            0.30,
            _over(None, lambda row: _top_2_of_8(row) and _large(row), K=DENSE),
        ),
        Target(
            "top-2 of 8 / dense of 8, other shapes",
            0.45,
            _over(None, lambda row: _top_2_of_8(row) and not _large(row), K=DENSE),
        ),
        Target("four mixed tasks / one task", 1.03, _over(None, _of_tasks(4), tasks=1)),
        Target("64 tasks / 4 tasks", 1.03, _over(None, _of_tasks(64), tasks=4)),
        Target("forward + backward / eager", 0.75, _over("eager", _training), mean=True),
        Target("bytes saved for backward / eager", 0.60, _over("eager", _training, "saved_bytes")),
        Target("peak memory of forward + backward / eager", 0.95, _over("eager", _training, "peak_bytes")),
        Target("the same with recompute", 0.60, _over("eager", _training, "peak_bytes", of=_recomputing)),
    ),
    "cpu": (
        *_on_a_cpu("eager", "eager", {(320, 8192): 0.42, (640, 2048): 0.70, (1280, 512): 0.88, (1280, 128): 0.92}),
        *_on_a_cpu(
            "two bare products",
            "products",
            {(320, 8192): 1.10, (640, 2048): 1.05, (1280, 512): 1.00, (1280, 128): 1.05},
        ),
        Target("forward / eager", 0.90, _over("eager", _dense), "fp32", mean=True),
        Target("forward / compile-folded", 0.90, _over("compile-folded", _dense), mean=True),
        Target("top-2 of 8 / dense of 8", 0.35, _over(None, _top_2_of_8, K=DENSE)),
        Target("peak memory of forward / eager", 0.50, _over("eager", _dense, "peak_bytes")),
        Target("forward + backward / eager", 1.00, _over("eager", _training), mean=True),
    ),
}
