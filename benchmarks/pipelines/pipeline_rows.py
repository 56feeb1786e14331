"""The rows of `results/pipeline_*.csv`: whole images, from prompts to pixels, and what they say of each other."""

from __future__ import annotations

from collections.abc import Sequence

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


def comparison(rows: Sequence[Row]) -> list[str]:
    """For people: the time of each contender over that of the stock pipelines, run in the same way and eager."""
    medians, lines = {row.contender: row.median_us for row in rows}, []
    for row in rows:
        _, plus, way = row.contender.partition("+")
        stock = dict.fromkeys(("stock-each" + plus + way, "stock-each"))
        ratios = [
            f"{row.median_us / medians[name]:.3f} of {name}"
            for name in stock
            if name in medians and name != row.contender
        ]
        if ratios:
            lines.append(f"{row.contender}: {', '.join(ratios)}")
    return lines
