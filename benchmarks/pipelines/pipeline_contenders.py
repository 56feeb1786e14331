"""The contenders that make whole images, the columns of `results/pipeline_*.csv`, and comparisons for people."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.contenders import ALL, Contender, Run
from benchmarks.harness.rows import TIMES, Row, Table

TABLE = Table(
    "benchmarks.pipelines.pipeline",
    (
        *("group", "contender", "device", "model", "size", "images", "steps", "dtype", "E", "K", "tasks", "graph"),
        *(*TIMES, "rounds", "warmup_s", "peak_bytes", "weight_bytes", "images_per_s"),
    ),
    times=".0f",
    fields={"images": "B"},
)


class Calls(NamedTuple):
    """The calls that make images of several tasks.

    Attributes:
        stock: whether a stock pipeline makes those of each task, and not the upcycled model.
        each: whether one task follows another.
    """

    stock: bool
    each: bool


_RUNS = (
    None,
    Run("compile", "compiled", "default"),
    Run("graphs", "compiled and in CUDA graphs", "reduce-overhead", graphs=True),
)
_FAMILIES = {
    "stock-each": Contender("a stock pipeline for each task, all resident, one after another", Calls(True, True)),
    "mtu": Contender("the upcycled model, one call for all tasks", Calls(False, False), ALL),
    "mtu-each": Contender("the upcycled model, a call for each task", Calls(False, True), ALL),
}
CONTENDERS: dict[str, Contender] = {
    family + (f"+{run.name}" if run else ""): contender._replace(
        about=contender.about + (f", {run.about}" if run else ""), run=run, family=family
    )
    for run in _RUNS
    for family, contender in _FAMILIES.items()
}
EAGER = tuple(name for name, contender in CONTENDERS.items() if contender.run is None)
STOCK = "stock-each"


def comparison(rows: Sequence[Row]) -> list[str]:
    """The time of each contender over that of the stock pipelines, run in the same way and run eagerly."""
    medians, lines = {row.contender: row.median_us for row in rows}, []
    for row in rows:
        runs = (CONTENDERS[row.contender].run, None)
        stock = [name for run in runs for name, c in CONTENDERS.items() if (c.family, c.run) == (STOCK, run)]
        ratios = [
            f"{row.median_us / medians[name]:.3f} of {name}"
            for name in dict.fromkeys(stock)
            if name in medians and name != row.contender
        ]
        if ratios:
            lines.append(f"{row.contender}: {', '.join(ratios)}")
    return lines
