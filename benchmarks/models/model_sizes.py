"""`python -m benchmarks.models.model_sizes`: parameters and FLOPs of the built-in models, stock and upcycled."""

import csv

from benchmarks.harness.provenance import RESULTS, provenance
from mtu.inspection import BUILT_IN, compare


def main() -> None:
    """Write `results/model_sizes.csv`."""
    source = provenance("python -m benchmarks.models.model_sizes")
    with (RESULTS / "model_sizes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ("original", "upcycled", "ratio", "routers_dropped", "ratio_routers_dropped")
        writer.writerow(["model", "num_experts", "size", "quantity", *columns, *source])
        for name in BUILT_IN:
            comparison = compare(name)
            for row in comparison.rows:
                values = [getattr(row, column) for column in columns]
                values = [f"{value:.5f}" if isinstance(value, float) else value for value in values]
                head = [name, comparison.config.num_experts, comparison.size, row.key]
                writer.writerow([*head, *values, *source.values()])


if __name__ == "__main__":
    main()
