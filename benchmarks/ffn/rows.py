"""The rows of `results/moe_ffn_*.csv` and `results/scaling_*.csv`."""

from benchmarks.harness.rows import TIMES, CsvTable

TABLE = CsvTable(
    "benchmarks.ffn.moe_ffn",
    (
        *("group", "contender", "device", "D", "L", "B", "E", "K", "tasks", "dtype", "pass", "graph"),
        *(*TIMES, "rounds", "host_us", "peak_bytes", "saved_bytes"),
    ),
    field_of_column={"pass": "direction"},
)
SCALING_TABLE = TABLE._replace(module="benchmarks.ffn.scaling")
