"""The rows of `results/moe_ffn_*.csv` and `results/scaling_*.csv`."""

from benchmarks.harness.rows import TIMES, Table

TABLE = Table(
    "benchmarks.ffn.moe_ffn",
    (
        *("group", "contender", "device", "D", "L", "B", "E", "K", "tasks", "dtype", "pass", "graph"),
        *(*TIMES, "rounds", "host_us", "peak_bytes", "saved_bytes"),
    ),
    fields={"pass": "direction"},
)
SCALING_TABLE = TABLE._replace(module="benchmarks.ffn.scaling")
