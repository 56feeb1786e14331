"""`python -m benchmarks.models.conv_in`: the task input convolution of a mixed batch beside a stock `conv_in`.

Both read latents of 64×64 and write 320 channels, as in SD 1.5. The stock one reads 4 channels (text-to-image) or 8 (an
editing model); the task one gets 8, four tasks in turn.
"""

import functools
import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.harness.arguments import parse_counts
from benchmarks.harness.commands import (
    add_common_options,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.recording import Figures, Log, record_groups
from benchmarks.harness.rows import TIMES, CsvTable
from benchmarks.harness.timing import Call, capture_stream, time_each, warm_up
from benchmarks.harness.workloads import Entry, Group, Setting, Workload
from mtu.models.conv_in import TaskConvIn
from mtu.tasks import SD_TASKS

_EDGE, _CHANNELS, _LATENTS = 64, 320, 4
_TASK, _STOCK = "task", ("stock-4", "stock-8")
TABLE = CsvTable("benchmarks.models.conv_in", ("group", "contender", "device", "dtype", "B", *TIMES, "rounds"))


def contender_calls(B: int, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """The calls that are compared, with random weights and inputs."""
    torch.manual_seed(0)
    counts = [spec.condition_channels for spec in SD_TASKS]
    widest = _LATENTS + max(counts)
    sample = torch.randn(B, widest, _EDGE, _EDGE).to(device, dtype)
    task = TaskConvIn(counts, _LATENTS, _CHANNELS, 3)
    for parameter in task.parameters():
        nn.init.normal_(parameter, std=0.1)
    task_ids = (torch.arange(B) % len(counts)).to(device)
    calls: dict[str, Call] = {_TASK: functools.partial(task.to(device, dtype), sample, task_ids)}
    for name, channels in zip(_STOCK, (_LATENTS, widest), strict=True):
        stock = nn.Conv2d(channels, _CHANNELS, 3, padding=1).to(device, dtype)
        calls[name] = functools.partial(stock, sample[:, :channels].contiguous())
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def measure_group(group: Group, log: Log, device: torch.device, seconds: float) -> Figures:
    """Yields the convolutions of one batch with their times, which are interleaved."""
    workload = group.workload
    with capture_stream(device):
        calls = {name: [call] for name, call in contender_calls(workload.B, DTYPES[workload.dtype], device).items()}
        for call in calls.values():
            warm_up(call, device)
        timings = time_each(calls, device, seconds)
    for entry in group.entries:
        log.bar.update()
        yield entry, timings[entry.contender]._asdict()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(TABLE.module, "The task input convolution of a mixed batch beside a stock conv_in.")
    add_common_options(parser, "conv_in_DEVICE.csv", dtype=False)
    parser.add_argument("--batches", type=parse_counts, default=(1, 2, 4, 8), help="(default: 1,2,4,8)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each convolution (default: 1)")
    argv, options = parse_arguments(parser, argv)
    with exit_on_usage_errors(parser):
        context = start_command(TABLE, options, argv, "conv_in_{device}.csv")
    entries = tuple(Entry(name, Setting()) for name in (_TASK, *_STOCK))
    groups = [Group(Workload(B=B, dtype=dtype), entries) for dtype in ("bf16", "fp32") for B in options.batches]
    rows, _ = record_groups(
        context, groups, functools.partial(measure_group, device=context.device, seconds=options.seconds)
    )
    times = {(row.workload, row.contender): row.median_us for row in rows}
    for workload, _ in groups:
        for stock in _STOCK:
            ratio = times[workload, _TASK] / times[workload, stock]
            print(f"{workload.dtype} B={workload.B}: task / {stock} {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
