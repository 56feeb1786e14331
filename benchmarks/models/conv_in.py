"""`python -m benchmarks.models.conv_in`: the task input convolution of a mixed batch beside a stock `conv_in`.

Both read latents of 64×64 and write 320 channels, as in SD 1.5. The stock one reads 4 channels (text-to-image) or 8 (an
editing model); the task one gets 8, four tasks in turn.
"""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from benchmarks.harness.arguments import parse_counts
from benchmarks.harness.commands import add_common_options, make_parser, parse, start
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.rows import TIMES, Row, Table
from benchmarks.harness.timing import Call, time_interleaved, warm_up
from benchmarks.harness.workloads import Workload
from mtu.models.conv_in import TaskConvIn
from mtu.tasks import SD_TASKS

_EDGE, _CHANNELS, _LATENTS = 64, 320, 4


TABLE = Table(
    "benchmarks.models.conv_in",
    ("group", "contender", "device", "dtype", "B", *TIMES, "rounds"),
)


def contenders(B: int, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """The calls that are compared, with random weights and inputs."""
    torch.manual_seed(0)
    counts = [spec.condition_channels for spec in SD_TASKS]
    widest = _LATENTS + max(counts)
    sample = torch.randn(B, widest, _EDGE, _EDGE).to(device, dtype)
    task = TaskConvIn(counts, _LATENTS, _CHANNELS, 3)
    for parameter in task.parameters():
        nn.init.normal_(parameter, std=0.1)
    task_ids = (torch.arange(B) % len(counts)).to(device)
    calls: dict[str, Call] = {"task": functools.partial(task.to(device, dtype), sample, task_ids)}
    for channels in (_LATENTS, widest):
        stock = nn.Conv2d(channels, _CHANNELS, 3, padding=1).to(device, dtype)
        calls[f"stock-{channels}"] = functools.partial(stock, sample[:, :channels].contiguous())
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def measure(
    batches: Sequence[int], dtypes: Sequence[str], device: torch.device, seconds: float, source: dict[str, str]
) -> Iterator[Row]:
    """Rows of one batch after the other, its convolutions interleaved."""
    start = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    for dtype in dtypes:
        for B in batches:
            calls = contenders(B, DTYPES[dtype], device)
            for call in calls.values():
                warm_up([call], device)
            timings = time_interleaved([[call] for call in calls.values()], [True] * len(calls), device, seconds)
            for name, timing in zip(calls, timings, strict=True):
                place = {"group": f"{start}-{dtype}-{B}", "device": device.type, "workload": Workload(B=B, dtype=dtype)}
                yield Row(contender=name, **place, **timing._asdict(), source=source)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(TABLE.module, __doc__.partition(": ")[2])
    add_common_options(parser, "conv_in_DEVICE.csv", dtype=False)
    parser.add_argument("--batches", type=parse_counts, default=(1, 2, 4, 8), help="(default: 1,2,4,8)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each convolution (default: 1)")
    argv, options = parse(parser, argv)
    try:
        device, output, source = start(TABLE, options, argv, "conv_in_{device}.csv")
    except ValueError as error:
        parser.error(str(error))
    # Graphs are captured on a stream of their own.
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else torch.no_grad()
    times: dict[tuple[Workload, str], float] = {}
    with stream:
        for row in measure(options.batches, ("bf16", "fp32"), device, options.seconds, source):
            TABLE.append(output, row)
            times[row.workload, row.contender] = row.median_us
            if row.contender != "task":
                ratio = times[row.workload, "task"] / row.median_us
                print(f"{row.workload.dtype} B={row.workload.B}: task / {row.contender} {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
