"""`python -m benchmarks.pipelines.pipeline`: whole images, one of each task, from prompts to pixels.

Four stock pipelines, one after another, run beside one upcycled model. The shipped icons model and stock folders are
upcycled; their tasks are all the same then, so they get small seeded random differences (in the norms, the routers'
last layers and the kernels of the condition images). Weights make no difference to time. Contenders run interleaved in
one process, timed by the clock, after their images were checked against those of float32. Writes a CSV row for each.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import mtu
from benchmarks.harness.arguments import names_parser, parse_rounds
from benchmarks.harness.commands import (
    add_common_options,
    exit_on_usage_errors,
    make_parser,
    parse_arguments,
    start_command,
)
from benchmarks.harness.contenders import Contender
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.memory import measure_peak_bytes
from benchmarks.harness.recording import Figures, Log, record_groups
from benchmarks.harness.timing import WARM_ROUNDS, Call, synchronize, time_interleaved
from benchmarks.harness.workloads import DENSE, Entry, Group, Setting, Workload
from benchmarks.pipelines.pipeline_contenders import CONTENDERS, EAGER, TABLE, ImageCalls, comparison_lines
from benchmarks.pipelines.pipeline_models import (
    Sample,
    add_model_options,
    cast_copy,
    check_images,
    copy_sharing_weights,
    count_weight_bytes,
    draw_samples,
    export_stock_pipeline,
    load_pipeline,
    make_stock_images,
    make_upcycled_images,
    picture_edge,
    stock_rows_per_sample,
    workload_from_options,
)

_RUNS, _QUICK_RUNS, _QUICK_STEPS = 5, 2, 2
# Of the images that are checked against those of a wider dtype: every operation runs, and rounding stays small.
_CHECKED_STEPS = 2


class PreparedContender(NamedTuple):
    """A contender that was built: the call that makes all its images, and the figures that are known already."""

    generate_images: Call
    figures: dict[str, Any]


class PipelineBenchmark:
    """One model in float32 on the CPU, and in the dtype and on the device of the measurement; and the contenders."""

    def __init__(self, pipe: mtu.MTUPipeline, dtype: str, device: torch.device, steps: int) -> None:
        self.exact, self.device, self.steps = pipe, device, steps
        self.samples: list[Sample] = draw_samples(pipe, 1)
        self.size = picture_edge(pipe)
        self.upcycled = cast_copy(pipe, DTYPES[dtype], device, "auto")

    @functools.cached_property
    def stock_pipelines(self) -> dict[str, DiffusionPipeline]:
        """The exported pipelines, by task."""
        return {
            sample.spec.name: export_stock_pipeline(self.exact, sample.spec.name, self.upcycled)
            for sample in self.samples
        }

    @functools.cached_property
    def reference_images(self) -> tuple[Tensor, Tensor]:
        """Images of a user's code, whose error sets the tolerance, and of the same code in a wider dtype."""
        dtype = self.upcycled.unet.dtype
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        pipes = (cast_copy(self.exact, to, self.device, "eager") for to in (dtype, wide))
        user, exact = (make_upcycled_images(pipe, self.samples, _CHECKED_STEPS) for pipe in pipes)
        return user, exact

    def prepare_contender(self, contender: Contender) -> PreparedContender:
        """Builds a contender, warms it up, and checks its images.

        Raises:
            ValueError: this device cannot run it so.
            WrongResult: its images are wrong.
        """
        sources = self.stock_pipelines if contender.implementation.uses_stock_pipelines else {"": self.upcycled}
        pipes, seconds = {name: copy_sharing_weights(pipe) for name, pipe in sources.items()}, None
        if contender.run_mode is not None:
            for pipe in pipes.values():
                mtu.compile(pipe, contender.run_mode.compile_mode)
            seconds = sum(self._warm_up(contender.implementation, name, pipe) for name, pipe in pipes.items())
        generate = functools.partial(self._generate, contender.implementation, pipes)
        check_images(generate(_CHECKED_STEPS), *self.reference_images)
        figures = {
            "warmup_s": seconds,
            "weight_bytes": count_weight_bytes(pipes.values()),
            "graph": contender.uses_cuda_graphs,
        }
        # More steps hold no more at once.
        figures["peak_bytes"] = measure_peak_bytes(functools.partial(generate, _CHECKED_STEPS), self.device)
        return PreparedContender(functools.partial(generate, self.steps), figures)

    def _warm_up(self, calls: ImageCalls, name: str, pipe: DiffusionPipeline) -> float:
        specs = [sample.spec for sample in self.samples]
        if calls.uses_stock_pipelines:
            batches = [stock_rows_per_sample(spec) for spec in specs if spec.name == name]
        else:
            batches = (
                [(spec.name,) for spec in specs] if calls.one_task_per_call else [tuple(spec.name for spec in specs)]
            )
        return sum(mtu.warmup(pipe, batches, height=self.size, width=self.size).values())

    def _generate(self, calls: ImageCalls, pipes: dict[str, DiffusionPipeline], steps: int) -> Tensor:
        if calls.uses_stock_pipelines:
            images = torch.cat([make_stock_images(pipes[sample.spec.name], [sample], steps) for sample in self.samples])
        elif calls.one_task_per_call:
            images = torch.cat([make_upcycled_images(pipes[""], [sample], steps) for sample in self.samples])
        else:
            images = make_upcycled_images(pipes[""], self.samples, steps)
        synchronize(self.device)
        return images

    def make_group(self, names: Sequence[str], workload: Workload) -> Group:
        """The contenders in the setting of the upcycled model, which all make the same images."""
        config = self.upcycled.unet.expert_config
        setting = Setting(config.num_experts, DENSE if config.has_dense_routing else config.top_k)
        tasks = {name: 1 if CONTENDERS[name].implementation.one_task_per_call else len(self.samples) for name in names}
        entries = (
            Entry(name, CONTENDERS[name].relevant_setting(setting._replace(tasks=number)))
            for name, number in tasks.items()
        )
        return Group(workload, tuple(entries))

    def measure_group(self, group: Group, runs: int, log: Log) -> Figures:
        """Yields the contenders that run here with their figures; their times are interleaved."""
        ready: dict[Entry, PreparedContender] = {}
        for entry in group.entries:
            log.bar.set_description(f"warm-up and check of {entry.contender}")
            with log.report_errors(entry, group.workload):
                ready[entry] = self.prepare_contender(CONTENDERS[entry.contender])
        if not ready:
            return
        log.bar.set_description(f"rounds of {group.workload}")
        calls = [[prepared.generate_images] for prepared in ready.values()]
        # The clock of a CPU on GPUs, too: the host's work between steps is part of an image's time, and every call ends
        # in a synchronisation.
        clock = torch.device("cpu")
        timings = time_interleaved(calls, [False] * len(calls), clock, 0, runs, log.bar.update)
        for (entry, prepared), timing in zip(ready.items(), timings, strict=True):
            speed = {"images_per_s": group.workload.B / timing.median_us * 1e6}
            yield entry, timing._asdict() | prepared.figures | speed


def _parser() -> argparse.ArgumentParser:
    description = "Whole images, one of each task: stock pipelines beside one upcycled model."
    parser = make_parser(TABLE.module, description, CONTENDERS)
    add_common_options(parser, "pipeline_DEVICE.csv")
    add_model_options(parser)
    parser.add_argument("--runs", type=parse_rounds, help=f"timed runs of each contender (default: {_RUNS})")
    names = names_parser(CONTENDERS, "contender")
    parser.add_argument("--contenders", type=names, help="names, separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two steps, two runs, nothing compiled")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a contender was wrong or broke."""
    parser = _parser()
    argv, options = parse_arguments(parser, argv)
    runs = options.runs or (_QUICK_RUNS if options.quick else _RUNS)
    names = options.contenders or (EAGER if options.quick else tuple(CONTENDERS))
    with exit_on_usage_errors(parser, TypeError):
        context = start_command(TABLE, options, argv, "pipeline_{device}.csv")
        pipe = load_pipeline(options.folder)
        workload = workload_from_options(pipe, options, _QUICK_STEPS)._replace(
            B=len(pipe.unet.tasks), dtype=options.dtype
        )
    bench = PipelineBenchmark(pipe, options.dtype, context.device, workload.steps)
    group = bench.make_group(names, workload)

    def measure(group: Group, log: Log) -> Figures:
        return bench.measure_group(group, runs, log)

    rows, failures = record_groups(context, [group], measure, unit="step", rounds=WARM_ROUNDS + runs)
    print("\n".join(comparison_lines(rows)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
