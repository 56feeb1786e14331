"""Rows that nobody measured, for the report and the plot."""

from benchmarks.ffn.peers import CONTENDERS
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Setting, Workload

SOURCE = {"command": "none", "commit": "abc1234", "torch": "2.0", "triton": "3.0", "processor": "Some GPU"}
SOURCE |= {"threads": "1"}
FOUR = Setting(4)


def make_row(contender, median, shape=(320, 4096), B=8, setting=FOUR, group="g", direction="forward", **columns):
    """A row of a made-up GPU: a median in µs, everything else plain."""
    defaults = {"host_us": 9.5, "peak_bytes": 1000, "saved_bytes": None if direction == "forward" else 100}
    times = {"median_us": median, "p20_us": median * 0.9, "p80_us": median * 1.2, "rounds": 20, "graph": True}
    return Row(
        group=group,
        contender=contender,
        device="cuda",
        workload=Workload(*shape, B, "bf16", direction),
        setting=CONTENDERS[contender].relevant_setting(setting),
        **(times | defaults | columns),
        source=SOURCE,
    )
