"""`python -m benchmarks.pipelines.image_psnr`: every way to run the model gives the images of the eager one.

    PSNR = −10 log₁₀ (mean of (image − exact)² over pixels), images in [0, 1], averaged over the images of a task

`exact` are the images of the upcycled model in float32 on the backend "eager", from the same latents. In bf16 the PSNR
of each path must reach that of the stock pipeline on the exported task, eager. Both errors are noise of rounding, which
the steps of a sampler amplify in a few images a thousandfold. One such image makes most of a squared error that is
pooled over many, so the pooled error is written down but has no target; and differences come with their standard error
over the samples, which are the same for all. The path "stock-channels-last" shows how far chance alone parts two paths:
it differs from "stock-eager" in nothing but the order of sums. In float32 the target is 60 dB, since the rounding of
8-bit pictures is at 59 dB.

The shipped icons model gets small seeded differences between tasks, as in `benchmarks.pipelines.pipeline`. Writes a CSV
row for each way, task and dtype, and for all tasks together.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import mtu
from benchmarks.harness.arguments import parse_choices, parse_count
from benchmarks.harness.commands import add_common_options, make_parser, parse, start
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.recording import Log
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Entry, Setting, Workload
from benchmarks.pipelines.pipeline_models import (
    Sample,
    add_model_options,
    cast,
    draw_samples,
    each_task,
    export,
    load_pipeline,
    stock_images,
    upcycled_images,
    workload_of,
)
from benchmarks.pipelines.psnr_rows import STOCK, TABLE, compare, squared_errors, table, verdict
from mtu.experts import stock_config

# With 16 the standard error is itself too uncertain: one row in twenty was three of them off, and not so with more.
_PER_TASK = 48
_QUICK = {"samples": 2, "steps": 2}
# Samples of a call, at most: it bounds the size of what is compiled, and memory.
_BATCH = 16


class PipelinePair(NamedTuple):
    """What pipelines are made of: one in float32 to fold, and the same in the dtype and place that are looked at."""

    exact: mtu.MTUPipeline
    upcycled: mtu.MTUPipeline

    def on(self, backend: str) -> mtu.MTUPipeline:
        """The upcycled pipeline, its UNet on another backend."""
        self.upcycled.unet.set_backend(backend)
        return self.upcycled


Images = Callable[[PipelinePair, Sequence[Sample], int], Tensor]


class ExecutionPath(NamedTuple):
    """One way to make images: what it is, in a line; devices that have it; origin, samples, steps → images."""

    about: str
    devices: tuple[str, ...]
    images: Images


def stock(layout: torch.memory_format, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """A stock pipeline for each task, folded in float32; its UNet in a memory layout."""

    def pipeline(name: str) -> DiffusionPipeline:
        pipe = export(origin.exact, name, origin.upcycled)
        pipe.unet.to(memory_format=layout)
        return pipe

    return _by_task(samples, pipeline, stock_images, steps)


def routed(backend: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The upcycled pipeline, one task in each call."""
    pipe = origin.on(backend)
    return _by_task(samples, lambda name: pipe, upcycled_images, steps)


def mixed(backend: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The upcycled pipeline, all tasks in each call."""
    return _in_batches(origin.on(backend), samples, upcycled_images, steps)


def compiled(mode: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The upcycled pipeline compiled, all tasks in each call."""
    unet = origin.upcycled.unet
    pipe = mtu.compile(cast(origin.upcycled, unet.dtype, unet.device, "auto"), mode)
    names = [sample.spec.name for sample in samples]
    mtu.warmup(pipe, list(dict.fromkeys(tuple(names[i : i + _BATCH]) for i in range(0, len(names), _BATCH))))
    return _in_batches(pipe, samples, upcycled_images, steps)


def folded(backend: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The exported UNet of each task as a model of one task and one expert, on a backend."""

    def pipeline(name: str) -> DiffusionPipeline:
        pipe = cast(origin.exact, torch.float32, torch.device("cpu"), "eager")
        pipe.unet = one_expert(origin.exact.unet, name)
        return cast(pipe, origin.upcycled.unet.dtype, origin.upcycled.unet.device, backend)

    return _by_task(samples, pipeline, upcycled_images, steps)


PATHS = {
    STOCK: ExecutionPath(
        "the stock pipelines of the exported tasks",
        ("cpu", "cuda"),
        functools.partial(stock, torch.contiguous_format),
    ),
    "stock-channels-last": ExecutionPath(
        "the same in another memory layout",
        ("cpu", "cuda"),
        functools.partial(stock, torch.channels_last),
    ),
    "mtu-eager": ExecutionPath("one task a call, backend 'eager'", ("cpu", "cuda"), functools.partial(routed, "eager")),
    "mtu-cpp": ExecutionPath("one task a call, backend 'cpp'", ("cpu",), functools.partial(routed, "cpp")),
    "mtu-triton": ExecutionPath("one task a call, backend 'triton'", ("cuda",), functools.partial(routed, "triton")),
    "mixed": ExecutionPath("all tasks in each call, backend 'auto'", ("cpu", "cuda"), functools.partial(mixed, "auto")),
    "compiled": ExecutionPath("the same, compiled", ("cpu", "cuda"), functools.partial(compiled, "default")),
    "graphs": ExecutionPath("the same in CUDA graphs", ("cuda",), functools.partial(compiled, "reduce-overhead")),
    "folded-cpp": ExecutionPath("exported, one expert, backend 'cpp'", ("cpu",), functools.partial(folded, "cpp")),
    "folded-triton": ExecutionPath(
        "exported, one expert, backend 'triton'", ("cuda",), functools.partial(folded, "triton")
    ),
}


def one_expert(unet: mtu.MTUUNet2DConditionModel, name: str) -> mtu.MTUUNet2DConditionModel:
    """One task folded into its weights, as a model of that task alone with one expert: the fused kernels then run it.

    Args:
        unet: the upcycled UNet.
        name: of the task.
    """
    exported = unet.export_task(name)
    alone = mtu.MTUUNet2DConditionModel(
        **(stock_config(exported) | {"in_channels": unet.config.in_channels}),
        tasks=[unet.tasks[unet.task_index(name)]],
        num_experts=1,
        expert_ratio=1.0,
        routing_scale=1.0,
        router_width=unet.config.router_width,
        routers_dropped=True,
    )
    state = exported.state_dict()
    for key, tensor in alone.state_dict().items():
        if key.endswith(".ff.router.weights"):
            state[key] = torch.ones_like(tensor)
        elif ".norm3." in key or key.startswith("conv_in."):
            state[key] = state[key][None]
    alone.load_state_dict(state)
    return alone.requires_grad_(False).eval()


def measure(
    pipe: mtu.MTUPipeline, paths: Sequence[str], workloads: Sequence[Workload], device: torch.device, log: Log
) -> Iterator[tuple[Workload, dict[str, Tensor]]]:
    """Yields each workload with the squared errors of its samples, by path; paths that cannot run here are left out.

    Args:
        pipe: float32, on the CPU.
        paths: names, that of the stock pipelines among them.
        workloads: of one model and number of images, each in a dtype of its own.
        device: where all of them run.
        log: which counts the paths that break.
    """
    steps = workloads[0].steps
    samples = draw_samples(pipe, workloads[0].B // len(pipe.unet.tasks))
    log.bar.set_description("float32, eager")
    exact = routed("eager", PipelinePair(pipe, cast(pipe, torch.float32, device, "eager")), samples, steps)
    for workload in workloads:
        origin, errors = PipelinePair(pipe, cast(pipe, DTYPES[workload.dtype], device, "eager")), {}
        for path in paths:
            log.bar.set_description(f"{path} {workload.dtype}")
            with log.attempt(Entry(path, Setting()), workload):
                # Compared with itself it says nothing.
                if (path, workload.dtype) != ("mtu-eager", "fp32"):
                    errors[path] = squared_errors(PATHS[path].images(origin, samples, steps), exact)
        yield workload, errors


def run(
    pipe: mtu.MTUPipeline,
    paths: Sequence[str],
    workloads: Sequence[Workload],
    device: torch.device,
    output: Path,
    source: dict[str, str],
) -> tuple[list[Row], int]:
    """Compares all paths in each workload, and appends rows to the file.

    Returns:
        The rows, and how many paths are missing because they broke.
    """
    log, rows = Log(len(paths) * len(workloads), unit="path"), []
    with log.bar:
        for workload, errors in measure(pipe, paths, workloads, device, log):
            tasks = [spec.name for spec in pipe.unet.tasks]
            for row in compare(errors, tasks, workload, device.type, source):
                TABLE.append(output, row)
                rows.append(row)
    return rows, log.failures


# ---------------------------------------------------------------------------------------------------------- parts


def _by_task(
    samples: Sequence[Sample],
    pipeline: Callable[[str], DiffusionPipeline],
    images: Callable[[DiffusionPipeline, Sequence[Sample], int], Tensor],
    steps: int,
) -> Tensor:
    """Images in the order of the samples, made task by task."""
    made = {}
    for name, positions in each_task(samples).items():
        own = _in_batches(pipeline(name), [samples[i] for i in positions], images, steps)
        made |= dict(zip(positions, own, strict=True))
    return torch.stack([made[i] for i in range(len(samples))])


def _in_batches(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    images: Callable[[DiffusionPipeline, Sequence[Sample], int], Tensor],
    steps: int,
) -> Tensor:
    return torch.cat([images(pipe, samples[i : i + _BATCH], steps) for i in range(0, len(samples), _BATCH)])


def _paths(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(PATHS), "path")


def _dtypes(text: str) -> tuple[str, ...]:
    return parse_choices(text, tuple(DTYPES), "dtype")


def _parser() -> argparse.ArgumentParser:
    description = "Images of every way to run the model, compared with those of the eager one."
    parser = make_parser(TABLE.module, description, PATHS, "paths")
    add_common_options(parser, "image_psnr_DEVICE.csv", dtype=False)
    add_model_options(parser)
    parser.add_argument("--dtypes", type=_dtypes, default=("bf16", "fp32"), help="(default: bf16,fp32)")
    parser.add_argument("--paths", type=_paths, help="names, separated by commas (default: all that the device has)")
    parser.add_argument("--samples", type=parse_count, help=f"of each task (default: {_PER_TASK})")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two samples of each task, two steps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a path missed its target."""
    parser = _parser()
    argv, options = parse(parser, argv)
    try:
        device, output, source = start(TABLE, options, argv, "image_psnr_{device}.csv")
    except ValueError as error:
        parser.error(str(error))
    here = [name for name, path in PATHS.items() if device.type in path.devices]
    paths = here if options.paths is None else [STOCK, *(name for name in options.paths if name != STOCK)]
    elsewhere = [name for name in paths if name not in here]
    if elsewhere:
        parser.error(f"--paths must be some of {', '.join(here)} on this device, got {elsewhere[0]}.")
    try:
        pipe = load_pipeline(options.folder)
        workload = workload_of(pipe, options, _QUICK["steps"])
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    # Otherwise convolutions of float32 tensors are those of ten bits.
    torch.backends.cudnn.allow_tf32 = False
    images = len(pipe.unet.tasks) * (options.samples or (_QUICK["samples"] if options.quick else _PER_TASK))
    workloads = [workload._replace(B=images, dtype=dtype) for dtype in options.dtypes]
    rows, failures = run(pipe, paths, workloads, device, output, source)
    print("\n".join(table(rows)))
    print(f"{len(rows)} rows added to {output}")
    return int(failures > 0 or any(verdict(row) == "missed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
