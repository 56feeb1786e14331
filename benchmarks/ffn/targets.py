"""The ratios that one feed-forward must reach, each a function of measured rows."""

from collections.abc import Callable, Iterator, Sequence

from benchmarks.ffn.peers import CONTENDERS
from benchmarks.harness.arguments import SHAPE_SETS
from benchmarks.harness.report import Ratio, Ratios, Target, make_ratios, pair_rows
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import DENSE

# The contender under test, unless another one is named.
TESTED = {"cuda": "mtu-triton", "cpu": "mtu-cpp"}
_Wanted = Callable[[Row], bool]


def paired_rows(rows: Sequence[Row], of: str, to: str, **changed: int | None) -> Iterator[tuple[Row, Row]]:
    """Rows of a contender, each with that of another one in its group, whose setting has the changed fields."""
    return pair_rows(rows, of, to, lambda setting: CONTENDERS[to].relevant_setting(setting._replace(**changed)))


def make_ratios_function(
    to: str | None, wanted: _Wanted, figure: str = "median_us", *, of: Callable[[str], str] = str, **changed: int | None
) -> Ratios:
    """Figures of the wanted rows over those of another contender, or of the same one with a changed setting."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        pairs = paired_rows(rows, of(tested), to or tested, **changed)
        return make_ratios((pair for pair in pairs if wanted(pair[0])), figure)

    return found


def _recomputing(tested: str) -> str:
    """The contender on the same backend that computes hidden units again; "" where there is none."""
    wanted = (CONTENDERS[tested].implementation.backend, True)
    same = (name for name, c in CONTENDERS.items() if (c.implementation.backend, c.implementation.recompute) == wanted)
    return next(same, "")


def _plain(direction: str) -> _Wanted:
    """Rows of a pass with dense routing of one task."""
    return lambda row: row.workload.direction == direction and row.setting.K is DENSE and row.setting.tasks == 1


_dense, _training = _plain("forward"), _plain("forward+backward")


def _dense_batch(row: Row) -> bool:
    return _dense(row) and row.workload.B >= 2


def _top_2_of_8(row: Row) -> bool:
    return row.workload.direction == "forward" and row.setting[:2] == (8, 2)


def _top_2_of_8_large(row: Row) -> bool:
    return _top_2_of_8(row) and row.workload.D <= 640 and row.workload.L >= 1024


def _top_2_of_8_small(row: Row) -> bool:
    return _top_2_of_8(row) and not _top_2_of_8_large(row)


def _of_tasks(tasks: int) -> _Wanted:
    return lambda row: row.workload.direction == "forward" and row.setting.tasks == tasks


def _shape(D: int, L: int) -> _Wanted:
    return lambda row: _dense(row) and row.workload[:2] == (D, L)


def _by_shape(name: str, to: str, at_most: Sequence[float]) -> tuple[Target, ...]:
    """A target for each of the CPU's shapes, in their order."""
    return tuple(
        Target(f"forward / {name} at {D}x{L}", limit, make_ratios_function(to, _shape(D, L)), "bf16")
        for (D, L), limit in zip(SHAPE_SETS["cpu"], at_most, strict=True)
    )


TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target(
            "forward / two bare products, B >= 2", 1.10, make_ratios_function("products", _dense_batch), uses_mean=True
        ),
        Target("forward / two bare products, any shape", 1.15, make_ratios_function("products", _dense)),
        Target("forward / eager", 0.82, make_ratios_function("eager", _dense), uses_mean=True),
        Target("forward / eager at 320x4096", 0.65, make_ratios_function("eager", _shape(320, 4096))),
        Target("forward / compile-folded", 0.92, make_ratios_function("compile-folded", _dense), uses_mean=True),
        Target(
            "forward / compile-folded-max", 0.92, make_ratios_function("compile-folded-max", _dense), uses_mean=True
        ),
        Target("forward / compile-folded-max, any shape", 1.02, make_ratios_function("compile-folded-max", _dense)),
        Target(
            "top-2 of 8 / dense of 8, D <= 640 and L >= 1024",
            0.30,
            make_ratios_function(None, _top_2_of_8_large, K=DENSE),
        ),
        Target("top-2 of 8 / dense of 8, other shapes", 0.45, make_ratios_function(None, _top_2_of_8_small, K=DENSE)),
        Target("four mixed tasks / one task", 1.03, make_ratios_function(None, _of_tasks(4), tasks=1)),
        Target("64 tasks / 4 tasks", 1.03, make_ratios_function(None, _of_tasks(64), tasks=4)),
        Target("forward + backward / eager", 0.75, make_ratios_function("eager", _training), uses_mean=True),
        Target("bytes saved for backward / eager", 0.60, make_ratios_function("eager", _training, "saved_bytes")),
        Target(
            "peak memory of forward + backward / eager", 0.95, make_ratios_function("eager", _training, "peak_bytes")
        ),
        Target(
            "the same with recompute", 0.60, make_ratios_function("eager", _training, "peak_bytes", of=_recomputing)
        ),
    ),
    "cpu": (
        *_by_shape("eager", "eager", (0.42, 0.70, 0.88, 0.92)),
        *_by_shape("two bare products", "products", (1.10, 1.05, 1.00, 1.05)),
        Target("forward / eager", 0.90, make_ratios_function("eager", _dense), "fp32", uses_mean=True),
        Target("forward / compile-folded", 0.90, make_ratios_function("compile-folded", _dense), uses_mean=True),
        Target("top-2 of 8 / dense of 8", 0.35, make_ratios_function(None, _top_2_of_8, K=DENSE)),
        Target("peak memory of forward / eager", 0.50, make_ratios_function("eager", _dense, "peak_bytes")),
        Target("forward + backward / eager", 1.00, make_ratios_function("eager", _training), uses_mean=True),
    ),
}
