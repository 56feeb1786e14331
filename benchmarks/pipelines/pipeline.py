"""`python -m benchmarks.pipelines.pipeline`: whole images, one of each task, from prompts to pixels.

Four stock pipelines, one after another, beside one upcycled model. The shipped icons model and stock folders are
upcycled; as they know nothing of their tasks yet, those get small seeded random differences (in the norms, the
routers' last layers and the kernels of the condition images), so that each task computes what no other does. Weights
make no difference to time. Contenders run interleaved in one process, timed by the clock, after their images were
checked against those of float32. Writes a CSV row for each of them.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import mtu
from benchmarks.harness.arguments import parse_choices, parse_count
from benchmarks.harness.commands import add_common_options, make_parser, parse, start
from benchmarks.harness.contenders import Contender
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.recording import Log, record
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import WARM_ROUNDS, synchronize, time_interleaved
from benchmarks.harness.workloads import DENSE, Entry, Setting, Workload
from benchmarks.pipelines.pipeline_contenders import CONTENDERS, EAGER, TABLE, Calls, comparison
from benchmarks.pipelines.pipeline_models import (
    Sample,
    add_model_options,
    cast,
    check_images,
    copy_sharing_weights,
    draw_samples,
    export,
    load_pipeline,
    output_size,
    stock_images,
    stock_rows,
    upcycled_images,
    weight_bytes,
    workload_of,
)

_RUNS, _QUICK_RUNS, _QUICK_STEPS = 5, 2, 2
# Of the images that are checked against those of a wider dtype: every operation runs, and rounding has no time to grow.
_CHECKED_STEPS = 2

# Number of steps → images of all samples, in their order.
Generate = Callable[[int], Tensor]


class PreparedContender(NamedTuple):
    """A contender that was built: what makes its images, and the columns that are known already."""

    generate: Generate
    columns: dict[str, Any]


class PipelineBenchmark:
    """The pipelines of a run: one model in float32, and in the dtype and place where it is measured.

    Args:
        pipe: float32, on the CPU.
        dtype: name of the dtype.
        device: where contenders run.
    """

    def __init__(self, pipe: mtu.MTUPipeline, dtype: str, device: torch.device) -> None:
        self.exact, self.device = pipe, device
        self.samples: list[Sample] = draw_samples(pipe, 1)
        self.size = output_size(pipe)
        self.upcycled = cast(pipe, DTYPES[dtype], device, "auto")

    @functools.cached_property
    def stock(self) -> dict[str, DiffusionPipeline]:
        """The exported pipelines, by task."""
        return {sample.spec.name: export(self.exact, sample.spec.name, self.upcycled) for sample in self.samples}

    @functools.cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Images of a user's code, which are the measure of rounding, and of the same code in a wider dtype."""
        dtype = self.upcycled.unet.dtype
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        pipes = (cast(self.exact, to, self.device, "eager") for to in (dtype, wide))
        user, exact = (upcycled_images(pipe, self.samples, _CHECKED_STEPS) for pipe in pipes)
        return user, exact

    def build(self, contender: Contender) -> PreparedContender:
        """Builds a contender, warms it up, and checks its images against those of a user's code.

        Raises:
            ValueError: a way to compile that this device does not have.
            WrongResult: other images.
        """
        sources = self.stock if contender.implementation.stock else {"": self.upcycled}
        pipes, seconds = {name: copy_sharing_weights(pipe) for name, pipe in sources.items()}, None
        if contender.run is not None:
            for pipe in pipes.values():
                mtu.compile(pipe, contender.run.mode)
            seconds = sum(self._warm_up(contender.implementation, name, pipe) for name, pipe in pipes.items())
        generate = functools.partial(self._generate, contender.implementation, pipes)
        check_images(generate(_CHECKED_STEPS), *self.reference)
        columns = {"warmup_s": seconds, "weight_bytes": weight_bytes(pipes.values())}
        # Steps add nothing to the most that is held at once.
        columns["peak_bytes"] = peak_bytes(functools.partial(generate, _CHECKED_STEPS), self.device)
        return PreparedContender(generate, columns)

    def _warm_up(self, calls: Calls, name: str, pipe: DiffusionPipeline) -> float:
        specs = [sample.spec for sample in self.samples]
        if calls.stock:
            batches = [stock_rows(spec) for spec in specs if spec.name == name]
        else:
            batches = [(spec.name,) for spec in specs] if calls.each else [tuple(spec.name for spec in specs)]
        return sum(mtu.warmup(pipe, batches, height=self.size, width=self.size).values())

    def _generate(self, calls: Calls, pipes: dict[str, DiffusionPipeline], steps: int) -> Tensor:
        if calls.stock:
            images = torch.cat([stock_images(pipes[sample.spec.name], [sample], steps) for sample in self.samples])
        elif calls.each:
            images = torch.cat([upcycled_images(pipes[""], [sample], steps) for sample in self.samples])
        else:
            images = upcycled_images(pipes[""], self.samples, steps)
        synchronize(self.device)
        return images


def measure(
    bench: PipelineBenchmark, names: Sequence[str], workload: Workload, runs: int, log: Log
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the contenders that run here with their columns, all of them timed interleaved."""
    ready = {}
    for name in names:
        log.bar.set_description(f"warm-up and check of {name}")
        with log.attempt(Entry(name, _setting(bench, name)), workload):
            ready[name] = bench.build(CONTENDERS[name])
    if not ready:
        return
    log.bar.set_description(f"rounds of {workload}")
    calls = [[functools.partial(one.generate, workload.steps)] for one in ready.values()]
    # The clock of a CPU on GPUs, too: what the host does between steps is part of an image's time, and every call ends
    # in a synchronisation.
    clock = torch.device("cpu")
    timings = time_interleaved(calls, [False] * len(calls), clock, 0, runs, log.bar.update)
    for (name, one), timing in zip(ready.items(), timings, strict=True):
        columns = timing._asdict() | {"graph": CONTENDERS[name].graphs, **one.columns}
        yield name, columns | {"images_per_s": workload.B / timing.median_us * 1e6}


def run(
    bench: PipelineBenchmark, names: Sequence[str], workload: Workload, runs: int, output: Path, source: dict[str, str]
) -> tuple[list[Row], int]:
    """Measures contenders, and appends their rows to the file.

    Args:
        bench: the pipelines.
        names: of contenders.
        workload: what they all make.
        runs: rounds that are timed.
        output: the CSV file.
        source: provenance of the rows.

    Returns:
        The rows, and how many contenders are missing because they were wrong or broke.
    """
    log = Log(len(names) + WARM_ROUNDS + runs, unit="step")

    def rows_of(group: str, workload: Workload) -> Iterator[Row]:
        place = {"group": group, "device": bench.device.type, "workload": workload, "source": source}
        for name, columns in measure(bench, names, workload, runs, log):
            yield Row(contender=name, setting=_setting(bench, name), **place, **columns)

    return record([workload], rows_of, log, TABLE, output), log.failures


def _setting(bench: PipelineBenchmark, name: str) -> Setting:
    config, calls = bench.upcycled.unet.expert_config, CONTENDERS[name].implementation
    K = DENSE if config.is_dense else config.top_k
    return CONTENDERS[name].relevant(Setting(config.num_experts, K, 1 if calls.each else len(bench.samples)))


def _contenders(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(CONTENDERS), "contender")


def _parser() -> argparse.ArgumentParser:
    description = "Whole images, one of each task: stock pipelines beside one upcycled model."
    parser = make_parser(TABLE.module, description, CONTENDERS)
    add_common_options(parser, "pipeline_DEVICE.csv")
    add_model_options(parser)
    # A percentile needs two times.
    at_least_two = functools.partial(parse_count, least=2)
    parser.add_argument("--runs", type=at_least_two, help=f"timed runs of each contender (default: {_RUNS})")
    parser.add_argument("--contenders", type=_contenders, help="names, separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two steps, two runs, nothing compiled")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    parser = _parser()
    argv, options = parse(parser, argv)
    runs = options.runs or (_QUICK_RUNS if options.quick else _RUNS)
    names = options.contenders or (EAGER if options.quick else tuple(CONTENDERS))
    try:
        device, output, source = start(TABLE, options, argv, "pipeline_{device}.csv")
        pipe = load_pipeline(options.folder)
        workload = workload_of(pipe, options, _QUICK_STEPS)._replace(B=len(pipe.unet.tasks), dtype=options.dtype)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    rows, failures = run(PipelineBenchmark(pipe, options.dtype, device), names, workload, runs, output, source)
    print(f"{len(rows)} rows added to {output}")
    print("\n".join(comparison(rows)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
