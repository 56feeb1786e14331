"""The contenders that make whole images, the columns of `results/pipeline_*.csv`, and comparisons for people."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.contenders import ALL, Contender, RunMode
from benchmarks.harness.rows import TIMES, CsvTable, Row

TABLE = CsvTable(
    "benchmarks.pipelines.pipeline",
    (
        *("group", "contender", "device", "model", "size", "images", "steps", "dtype", "E", "K", "tasks", "graph"),
        *(*TIMES, "rounds", "warmup_s", "peak_bytes", "weight_bytes", "images_per_s"),
    ),
    time_format=".0f",
    field_of_column={"images": "B"},
)


class ImageCalls(NamedTuple):
    """The calls that make images of several tasks.

    Attributes:
        uses_stock_pipelines: whether a stock pipeline makes those of each task, and not the upcycled model.
        one_task_per_call: whether one task follows another.
    """

    uses_stock_pipelines: bool
    one_task_per_call: bool


_RUNS = (
    None,
    RunMode("compile", "compiled", "default"),
    RunMode("graphs", "compiled and in CUDA graphs", "reduce-overhead", uses_cuda_graphs=True),
)
_FAMILIES = {
    "stock-each": Contender("a stock pipeline for each task, all resident, one after another", ImageCalls(True, True)),
    "mtu": Contender("the upcycled model, one call for all tasks", ImageCalls(False, False), ALL),
    "mtu-each": Contender("the upcycled model, a call for each task", ImageCalls(False, True), ALL),
}
CONTENDERS: dict[str, Contender] = {
    family + (f"+{run.name}" if run else ""): contender._replace(
        description=contender.description + (f", {run.description}" if run else ""), run_mode=run, family=family
    )
    for run in _RUNS
    for family, contender in _FAMILIES.items()
}
EAGER = tuple(name for name, contender in CONTENDERS.items() if contender.run_mode is None)
STOCK = "stock-each"


def comparison_lines(rows: Sequence[Row]) -> list[str]:
    """The time of each contender over that of the stock pipelines, run in the same way and run eagerly."""
    medians, lines = {row.contender: row.median_us for row in rows}, []
    for row in rows:
        runs = (CONTENDERS[row.contender].run_mode, None)
        stock = [name for run in runs for name, c in CONTENDERS.items() if (c.family, c.run_mode) == (STOCK, run)]
        ratios = [
            f"{row.median_us / medians[name]:.3f} of {name}"
            for name in dict.fromkeys(stock)
            if name in medians and name != row.contender
        ]
        if ratios:
            lines.append(f"{row.contender}: {', '.join(ratios)}")
    return lines
