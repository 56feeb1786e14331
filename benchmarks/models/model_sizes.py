"""`python -m benchmarks.models.model_sizes`: parameters and FLOPs of the built-in models, stock and upcycled."""

import argparse
from collections.abc import Sequence

from benchmarks.harness.provenance import RESULTS, collect_provenance
from benchmarks.harness.rows import write_cells
from mtu.inspection import BUILT_IN_UNET_CONFIGS, compare_with_original

_COLUMNS = ("original", "upcycled", "ratio", "routers_dropped", "ratio_routers_dropped")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: write `results/model_sizes.csv`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.model_sizes", description=__doc__)
    parser.parse_args(argv)
    rows = []
    for name in BUILT_IN_UNET_CONFIGS:
        comparison = compare_with_original(name)
        place = {"model": name, "num_experts": comparison.expert_config.num_experts, "size": comparison.image_size}
        for row in comparison.quantities:
            values = {column: row.to_dict()[column] for column in _COLUMNS}
            values |= {column: f"{value:.5f}" for column, value in values.items() if isinstance(value, float)}
            rows.append(place | {"quantity": row.key} | values)
    write_cells(RESULTS / "model_sizes.csv", rows, collect_provenance("python -m benchmarks.models.model_sizes"))


if __name__ == "__main__":
    main()
