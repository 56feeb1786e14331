"""The columns of `results/unet_*.csv`, and the ratios that whole UNets must reach, each a function of measured rows."""

from collections.abc import Callable, Sequence

from benchmarks.harness.report import Ratio, Ratios, Target, make_ratios, pair_rows
from benchmarks.harness.rows import TIMES, CsvTable, Row
from benchmarks.harness.workloads import DENSE, Workload
from benchmarks.models.unet_catalogue import ONE_BY_ONE, ORIGINAL, find_contender, sibling_name

TABLE = CsvTable(
    "benchmarks.models.unet",
    (
        *("group", "contender", "device", "model", "size", "B", "branches", "dtype", "E", "K", "tasks", "graph"),
        *(*TIMES, "rounds", "peak_bytes", "weight_bytes", "warmup_s", "switch_us", "images_per_s"),
    ),
    time_format=".0f",
)
# The contender under test, unless another one is named.
TESTED = {"cuda": "mtu-triton", "cpu": "mtu-cpp"}
# Name of the contender under test → name of the contender whose rows are meant.
_Name = Callable[[str], str]
_Where = Callable[[Workload], bool]


def _sd15(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sd15", 512)


def _sdxl(workload: Workload) -> bool:
    return (workload.model, workload.size) == ("sdxl", 1024)


def _original(run: str | None) -> _Name:
    return lambda tested: sibling_name(ORIGINAL, run=run)


def _tested(run: str | None, variant: str = "") -> _Name:
    return lambda tested: sibling_name(tested, run=run, variant=variant)


def _over(
    own: _Name, other: _Name, where: _Where, *, tasks: int = 4, E: int | None = None, figures: Sequence[str] = ()
) -> Ratios:
    """Figures, by default the medians, with dense routing of so many tasks over those of another contender."""

    def found(rows: Sequence[Row], tested: str) -> list[Ratio]:
        to = other(tested)
        pairs = [
            (row, divisor)
            for row, divisor in pair_rows(rows, own(tested), to, find_contender(to).relevant_setting)
            if row.setting.K is DENSE and row.setting.tasks == tasks and E in (None, row.setting.E)
        ]
        return make_ratios((pair for pair in pairs if where(pair[0].workload)), *figures)

    return found


def _switching(run: str | None) -> Ratios:
    return _over(_tested(run), _tested(run), lambda w: True, figures=("switch_us", "median_us"))


def _weights(run: str | None) -> Ratios:
    return _over(_tested(run), _original(run), lambda w: _sd15(w) or _sdxl(w), figures=("weight_bytes",))


def _at_once(run: str | None) -> Ratios:
    return _over(_tested(run), _tested(run, ONE_BY_ONE), lambda w: w.B == 4)


# On a GPU contenders are compiled code in a CUDA graph.
_GRAPHS = "graphs"
_SD15_ON_GPUS = _over(_tested(_GRAPHS), _original(_GRAPHS), _sd15, E=4)
_SDXL_ON_GPUS = _over(_tested(_GRAPHS), _original(_GRAPHS), _sdxl, E=1)
_GRAPHS_TO_EAGER = _over(_tested(_GRAPHS), _original(None), lambda w: _sd15(w) and w.rows == 2, E=4, tasks=2)
_SD15_ON_CPUS = _over(_tested(None), _original(None), _sd15, E=4)
TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        Target("SD 1.5 at 512x512, four mixed tasks, graphs / the original, graphs", 1.00, _SD15_ON_GPUS, "bf16"),
        Target("SDXL at 1024x1024, four mixed tasks, graphs / the original, graphs", 0.97, _SDXL_ON_GPUS, "bf16"),
        Target("SD 1.5 at 512x512, batch of 2, graphs / the original, eager", 0.55, _GRAPHS_TO_EAGER, "bf16"),
        Target("switching tasks / a step", 0.01, _switching(_GRAPHS), "bf16"),
        Target("weights of four tasks / the original's", 1.02, _weights(_GRAPHS), "bf16"),
        Target("four tasks at once / one after another", 0.85, _at_once(_GRAPHS), "bf16"),
    ),
    "cpu": (
        Target("SD 1.5 at 512x512, four mixed tasks / the original, eager", 0.97, _SD15_ON_CPUS, "bf16"),
        Target("switching tasks / a step", 0.01, _switching(None)),
        Target("weights of four tasks / the original's", 1.02, _weights(None)),
        Target("four tasks at once / one after another", None, _at_once(None)),
    ),
}
