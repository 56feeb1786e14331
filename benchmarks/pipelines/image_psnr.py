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
row for each path, task and dtype, and for all tasks together.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import mtu
from benchmarks.harness import commands
from benchmarks.harness.arguments import names_parser, parse_count
from benchmarks.harness.contenders import Contender
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.recording import Log
from benchmarks.harness.rows import Row
from benchmarks.harness.workloads import Entry, Setting, Workload
from benchmarks.pipelines.pipeline_models import (
    Sample,
    add_model_options,
    cast_copy,
    draw_samples,
    export_stock_pipeline,
    load_pipeline,
    make_stock_images,
    make_upcycled_images,
    positions_by_task,
    workload_from_options,
)
from benchmarks.pipelines.psnr_rows import STOCK, TABLE, make_psnr_rows, squared_errors, table_lines, verdict
from mtu.experts import stock_config

# With 16 the standard error is itself too uncertain: one row in twenty was three of them off, and not so with more.
_PER_TASK = 48
_QUICK = {"samples": 2, "steps": 2}
# The most samples of a call, which bounds memory and the sizes that are compiled.
_BATCH = 16


class PipelinePair(NamedTuple):
    """One pipeline in float32, which is folded, and the same in the dtype and on the device of a workload."""

    exact_pipeline: mtu.MTUPipeline
    upcycled_pipeline: mtu.MTUPipeline

    def upcycled_on_backend(self, backend: str) -> mtu.MTUPipeline:
        """The upcycled pipeline, its UNet on another backend."""
        self.upcycled_pipeline.unet.set_backend(backend)
        return self.upcycled_pipeline


class ExecutionPath(NamedTuple):
    """The implementation of a contender: the function that makes its images, and the devices that it runs on."""

    make_images: Callable[[PipelinePair, Sequence[Sample], int], Tensor]
    device_types: tuple[str, ...] = ("cpu", "cuda")
    is_reference: bool = False


def stock_path_images(
    layout: torch.memory_format, origin: PipelinePair, samples: Sequence[Sample], steps: int
) -> Tensor:
    """A stock pipeline for each task, folded in float32, whose UNet has a memory layout."""

    def pipeline(name: str) -> DiffusionPipeline:
        pipe = export_stock_pipeline(origin.exact_pipeline, name, origin.upcycled_pipeline)
        pipe.unet.to(memory_format=layout)
        return pipe

    return _by_task(samples, pipeline, make_stock_images, steps)


def routed_path_images(backend: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The upcycled pipeline, one task in each call."""
    pipe = origin.upcycled_on_backend(backend)
    return _by_task(samples, lambda name: pipe, make_upcycled_images, steps)


def mixed_path_images(backend: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The upcycled pipeline, all tasks in each call."""
    return _in_batches(origin.upcycled_on_backend(backend), samples, make_upcycled_images, steps)


def compiled_path_images(mode: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The upcycled pipeline compiled, all tasks in each call."""
    unet = origin.upcycled_pipeline.unet
    pipe = mtu.compile(cast_copy(origin.upcycled_pipeline, unet.dtype, unet.device, "auto"), mode)
    names = [sample.spec.name for sample in samples]
    mtu.warmup(pipe, list(dict.fromkeys(tuple(names[i : i + _BATCH]) for i in range(0, len(names), _BATCH))))
    return _in_batches(pipe, samples, make_upcycled_images, steps)


def folded_path_images(backend: str, origin: PipelinePair, samples: Sequence[Sample], steps: int) -> Tensor:
    """The exported UNet of each task as a model of one task and one expert, on a backend."""

    def pipeline(name: str) -> DiffusionPipeline:
        pipe = cast_copy(origin.exact_pipeline, torch.float32, torch.device("cpu"), "eager")
        pipe.unet = fold_to_one_expert(origin.exact_pipeline.unet, name)
        return cast_copy(pipe, origin.upcycled_pipeline.unet.dtype, origin.upcycled_pipeline.unet.device, backend)

    return _by_task(samples, pipeline, make_upcycled_images, steps)


_CPU, _CUDA = ("cpu",), ("cuda",)
_STOCK = functools.partial(stock_path_images, torch.contiguous_format)
_CHANNELS_LAST = functools.partial(stock_path_images, torch.channels_last)
_EAGER = ExecutionPath(functools.partial(routed_path_images, "eager"), is_reference=True)
_GRAPHS = functools.partial(compiled_path_images, "reduce-overhead")
_FOLDED_CPP, _FOLDED_TRITON = (functools.partial(folded_path_images, backend) for backend in ("cpp", "triton"))
PATHS: dict[str, Contender] = {
    STOCK: Contender("the stock pipelines of the exported tasks", ExecutionPath(_STOCK)),
    "stock-channels-last": Contender("the same in another memory layout", ExecutionPath(_CHANNELS_LAST)),
    "mtu-eager": Contender("one task a call, backend 'eager'", _EAGER),
    "mtu-cpp": Contender(
        "one task a call, backend 'cpp'", ExecutionPath(functools.partial(routed_path_images, "cpp"), _CPU)
    ),
    "mtu-triton": Contender(
        "one task a call, backend 'triton'", ExecutionPath(functools.partial(routed_path_images, "triton"), _CUDA)
    ),
    "mixed": Contender(
        "all tasks in each call, backend 'auto'", ExecutionPath(functools.partial(mixed_path_images, "auto"))
    ),
    "compiled": Contender("the same, compiled", ExecutionPath(functools.partial(compiled_path_images, "default"))),
    "graphs": Contender("the same in CUDA graphs", ExecutionPath(_GRAPHS, _CUDA)),
    "folded-cpp": Contender("exported, one expert, backend 'cpp'", ExecutionPath(_FOLDED_CPP, _CPU)),
    "folded-triton": Contender("exported, one expert, backend 'triton'", ExecutionPath(_FOLDED_TRITON, _CUDA)),
}


def fold_to_one_expert(unet: mtu.MTUUNet2DConditionModel, name: str) -> mtu.MTUUNet2DConditionModel:
    """One task folded into its weights, as a model of that task alone with one expert, which the fused kernels run."""
    exported = unet.export_task(name)
    alone = mtu.MTUUNet2DConditionModel(
        **(stock_config(exported) | {"in_channels": unet.config["in_channels"]}),
        tasks=[unet.tasks[unet.task_index(name)]],
        num_experts=1,
        expert_ratio=1.0,
        routing_scale=1.0,
        router_width=unet.expert_config.router_width,
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


def measure_errors(
    pipe: mtu.MTUPipeline, paths: Sequence[str], workloads: Sequence[Workload], device: torch.device, log: Log
) -> Iterator[tuple[Workload, dict[str, Tensor]]]:
    """Yields each workload with the squared errors of its samples, by path; paths that cannot run here are left out.

    Args:
        pipe: float32, on the CPU.
        paths: names, that of the stock pipelines among them.
        workloads: of one model and number of images, each in a dtype of its own.
        device: that all paths run on.
        log: counts the paths that break.
    """
    steps = workloads[0].steps
    samples = draw_samples(pipe, workloads[0].B // len(pipe.unet.tasks))
    log.bar.set_description("float32, eager")
    exact = routed_path_images(
        "eager", PipelinePair(pipe, cast_copy(pipe, torch.float32, device, "eager")), samples, steps
    )
    for workload in workloads:
        origin, errors = PipelinePair(pipe, cast_copy(pipe, DTYPES[workload.dtype], device, "eager")), {}
        for path in paths:
            log.bar.set_description(f"{path} {workload.dtype}")
            with log.report_errors(Entry(path, Setting()), workload):
                implementation = PATHS[path].implementation
                # The reference is not compared with itself.
                if not (implementation.is_reference and workload.dtype == "fp32"):
                    errors[path] = squared_errors(implementation.make_images(origin, samples, steps), exact)
        yield workload, errors


def compare_paths(
    context: commands.CommandContext, pipe: mtu.MTUPipeline, paths: Sequence[str], workloads: Sequence[Workload]
) -> tuple[list[Row], int]:
    """Compares all paths in each workload, and appends rows to the file. Returns also how many paths broke."""
    log, rows = Log(len(paths) * len(workloads), unit="path"), []
    tasks = [spec.name for spec in pipe.unet.tasks]
    with log.bar:
        for workload, errors in measure_errors(pipe, paths, workloads, context.device, log):
            for row in make_psnr_rows(errors, tasks, workload, context.device.type, context.source):
                context.append_row(row)
                rows.append(row)
    return rows, log.failures


def _by_task(
    samples: Sequence[Sample],
    pipeline: Callable[[str], DiffusionPipeline],
    images: Callable[[DiffusionPipeline, Sequence[Sample], int], Tensor],
    steps: int,
) -> Tensor:
    """Images in the order of the samples, made task by task."""
    made = {}
    for name, positions in positions_by_task(samples).items():
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


def _parser() -> argparse.ArgumentParser:
    description = "Images of every way to run the model, compared with those of the eager one."
    parser = commands.make_parser(TABLE.module, description, PATHS, "paths")
    commands.add_common_options(parser, "image_psnr_DEVICE.csv", dtype=False)
    add_model_options(parser)
    add, paths, dtypes = parser.add_argument, names_parser(PATHS, "path"), names_parser(DTYPES, "dtype")
    add("--dtypes", type=dtypes, default=("bf16", "fp32"), help="(default: bf16,fp32)")
    add("--paths", type=paths, help="names, separated by commas (default: all that the device has)")
    add("--samples", type=parse_count, help=f"of each task (default: {_PER_TASK})")
    add("--quick", action="store_true", help="a smoke test: two samples of each task, two steps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a path missed its target."""
    parser = _parser()
    argv, options = commands.parse_arguments(parser, argv)
    with commands.exit_on_usage_errors(parser):
        context = commands.start_command(TABLE, options, argv, "image_psnr_{device}.csv")
    here = [name for name, path in PATHS.items() if context.device.type in path.implementation.device_types]
    paths = here if options.paths is None else [STOCK, *(name for name in options.paths if name != STOCK)]
    elsewhere = [name for name in paths if name not in here]
    if elsewhere:
        parser.error(f"--paths must be some of {', '.join(here)} on this device, got {elsewhere[0]}.")
    with commands.exit_on_usage_errors(parser, TypeError):
        pipe = load_pipeline(options.folder)
        workload = workload_from_options(pipe, options, _QUICK["steps"])
    # Otherwise convolutions of float32 tensors have products of ten bits.
    torch.backends.cudnn.allow_tf32 = False
    images = len(pipe.unet.tasks) * (options.samples or (_QUICK["samples"] if options.quick else _PER_TASK))
    workloads = [workload._replace(B=images, dtype=dtype) for dtype in options.dtypes]
    rows, failures = compare_paths(context, pipe, paths, workloads)
    print("\n".join(table_lines(rows)))
    print(f"{len(rows)} rows added to {context.output_file}")
    return int(failures > 0 or any(verdict(row) == "missed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
