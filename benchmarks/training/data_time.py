"""`python -m benchmarks.training.data_time`: the part of a training step in which the trainer waits for its batch.

The trainer itself takes the times and logs them. Two trainings are measured with caches that are full:

- "icons": the demo's model on its four tasks. The steps are real ones, on a CPU.
- "sd15": batches of the size of Stable Diffusion 1.5 at 512² for two tasks, from caches of random tensors. In the place
  of the UNet the process sleeps for 20 ms an example, about what a data-centre GPU takes for its step: as with a GPU,
  the CPU is free meanwhile. Slower accelerators wait less.

Workers load the next batches during a step; without them, a step waits for all of its loading.
"""

import hashlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

import mtu
from benchmarks.harness.arguments import parse_counts, parse_rounds
from benchmarks.harness.commands import add_commit_option, exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.recording import new_run_name
from benchmarks.harness.rows import append_cells, check_header
from benchmarks.training.icon_folder import EDGE
from mtu.data.icons.task_dataset import IconTask
from mtu.data.task_dataset import TaskDataset
from mtu.recipes.icons.demo import SHIPPED_BASE_MODEL
from mtu.tasks import EDIT, TEXT_TO_IMAGE, TaskSpec
from mtu.training import LogEntry, Objective, PartialLoss, Trainer, TrainerConfig
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective
from mtu.training.multitask.batches import BatchLoader, ModelCache, TrainedTask
from mtu.training.multitask.encoded_cache import EncodedCache
from mtu.training.multitask.encoding import text_key
from mtu.training.multitask.step_plan import StepPlan

MODULE = "benchmarks.training.data_time"
FILE = "training_data_time.csv"
# The most that a step may wait for its data, relative to the step.
MOST = 0.05
COLUMNS = ("group", "training", "cache", "workers", "B", "step_us", "data_us", "ratio", "steps")
_STEPS = 30
# Steps that do not count: workers start, and files come into the page cache.
_WARM_STEPS = 5
_SECONDS_PER_EXAMPLE = 0.02
_ROWS = 256
_ICONS_BATCH = 48
_LATENT_SHAPE = (4, 64, 64)
_TEXT_SHAPE = (77, 768)
_TIMESTEPS = 1000
# Stand for the digests of models.
_MODEL_DIGEST = "none"


class Case(NamedTuple):
    """A training whose waiting is measured.

    Attributes:
        training: "icons" or "sd15".
        cache: "disk" or "memory".
        workers: processes that load batches.
        batch_size: examples of a step.
    """

    training: str
    cache: str
    workers: int
    batch_size: int


class _Rows:
    """Rows without images, whose encodings are all in the cache."""

    def __init__(self, spec: TaskSpec) -> None:
        self._name = spec.name

    def __len__(self) -> int:
        return _ROWS

    def prompts(self, row: int) -> Sequence[Sequence[str]]:
        return [(f"{self._name} {row}",)]

    def load_images(self, row: int, variant: int) -> Any:
        raise AssertionError("A row that is in the cache must not be loaded.")

    def image_digest(self, row: int, variant: int) -> str:
        return hashlib.sha256(f"{self._name} {row}".encode()).hexdigest()

    def describe_row(self, row: int) -> str:
        return f"row {row}"

    @property
    def digest(self) -> str:
        return self._name


class SleepingObjective(Objective):
    """Loads the batches of SD 1.5 at 512², and sleeps in the place of the UNet.

    Args:
        loader: loads the batches.
    """

    def __init__(self, loader: BatchLoader) -> None:
        super().__init__()
        self._loader = loader
        self.weight = torch.nn.Parameter(torch.zeros(1))

    @property
    def load_batch(self) -> BatchLoader:
        """The loader."""
        return self._loader

    def forward(self, batch: Any) -> PartialLoss:
        """Sleep as long as the accelerator would compute."""
        time.sleep(_SECONDS_PER_EXAMPLE * len(batch.task_ids))
        return PartialLoss(self.weight.sum() + 0 * batch.noise.mean())


def build_sd15(case: Case, folder: Path) -> Objective:
    """The objective of the size of SD 1.5; it fills its caches with random tensors."""
    config = MultiTaskConfig(batch_size=case.batch_size, resolution=512)
    tasks = [TrainedTask(spec, number, _Rows(spec)) for number, spec in enumerate((TEXT_TO_IMAGE, EDIT))]
    names = [task.spec.name for task in tasks]
    plan = StepPlan(dict.fromkeys(names, _ROWS), dict.fromkeys(names, 1), case.batch_size, config.seed)
    on_disk = case.cache == "disk"
    latents, texts = (EncodedCache(folder / name if on_disk else None) for name in ("latents", "texts"))
    loader = BatchLoader(
        tasks,
        plan,
        config,
        num_timesteps=_TIMESTEPS,
        latent_shape=_LATENT_SHAPE,
        zeros_for_dropped_prompt=False,
        latent_cache=ModelCache(latents, _MODEL_DIGEST),
        text_cache=ModelCache(texts, _MODEL_DIGEST),
    )
    channels, *size = _LATENT_SHAPE
    for item in loader.image_items():
        tensors = {"target": torch.randn(2 * channels, *size), "sizes": torch.tensor([512, 512, 0, 0])}
        if tasks[item.task].spec.takes_image:
            tensors["condition"] = torch.randn(_LATENT_SHAPE)
        latents.put(loader.image_key(item), tensors)
    for prompt in loader.prompts():
        texts.put(text_key(_MODEL_DIGEST, prompt), {"prompt_embeds": torch.randn(_TEXT_SHAPE)})
    return SleepingObjective(loader)


def build_icons(case: Case, folder: Path) -> Objective:
    """The objective of the demo: the icons model on its four tasks."""
    base = StableDiffusionPipeline.from_pretrained(SHIPPED_BASE_MODEL, use_safetensors=True)
    pipeline = mtu.upcycle(base)
    datasets: dict[str, TaskDataset] = {spec.name: IconTask(spec.name, _ROWS // 4) for spec in pipeline.unet.tasks}
    caches: dict[str, Any] = {"latent_cache": case.cache, "text_cache": case.cache}
    directory = folder if case.cache == "disk" else None
    config = MultiTaskConfig(batch_size=case.batch_size, resolution=EDGE, cache_directory=directory, **caches)
    return MultiTaskObjective(pipeline, datasets, config)


_BUILDERS: dict[str, Callable[[Case, Path], Objective]] = {"icons": build_icons, "sd15": build_sd15}


def measure_case(case: Case, steps: int) -> dict[str, Any]:
    """Trains, and returns the cells of the row: medians over the steps."""
    with tempfile.TemporaryDirectory() as folder:
        objective = _BUILDERS[case.training](case, Path(folder))
        config = TrainerConfig(_WARM_STEPS + steps, num_workers=case.workers, log_every=1)
        entries = Trainer(objective, config, description=f"{case.training}, {case.workers} workers").train()
    step_us, data_us = medians_of(entries[_WARM_STEPS - 1 :])
    times = {"step_us": f"{step_us:.0f}", "data_us": f"{data_us:.0f}", "ratio": f"{data_us / step_us:.4f}"}
    place = {"training": case.training, "cache": case.cache, "workers": case.workers, "B": case.batch_size}
    return {**place, **times, "steps": steps}


def medians_of(entries: Sequence[LogEntry]) -> tuple[float, float]:
    """The median times in µs of a step and of its waiting for data, from the log of all steps; the first one's is left
    out, as it has no beginning."""
    pairs = itertools.pairwise(entries)
    step = statistics.median(after.seconds - before.seconds for before, after in pairs)
    return step * 1e6, statistics.median(entry.data_seconds for entry in entries[1:]) * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(MODULE, "The part of a training step in which the trainer waits for its batch.")
    add = parser.add_argument
    add("--batches", type=parse_counts, default=(4, 16), help="examples of a step of SD 1.5 (default: 4,16)")
    add("--steps", type=parse_rounds, default=_STEPS, help="timed steps (default: %(default)s)")
    add("--quick", action="store_true", help="a few steps of two cases")
    add("--output", type=Path, default=RESULTS / FILE, help="CSV to add rows to (default: %(default)s)")
    add_commit_option(parser)
    argv, options = parse_arguments(parser, argv)
    source = collect_provenance(command_line(MODULE, argv), commit=options.commit)
    with exit_on_usage_errors(parser):
        check_header(options.output, [*COLUMNS, *source])
    settings = [(cache, workers) for cache in ("disk", "memory") for workers in (0, 2)]
    cases = [Case("sd15", *setting, B) for setting in settings for B in options.batches]
    cases += [Case("icons", *setting, _ICONS_BATCH) for setting in settings]
    if options.quick:
        options.steps, cases = 3, [Case("sd15", "disk", 2, 4), Case("icons", "memory", 0, 8)]
    group = new_run_name()
    for case in tqdm(cases, unit="case", file=sys.stderr):
        cells = measure_case(case, options.steps)
        append_cells(options.output, {"group": group, **cells, **source})
        print(_line(case, float(cells["ratio"])))
    return 0


def _line(case: Case, ratio: float) -> str:
    line = f"{case.training}, cache on {case.cache}, {case.workers} workers, B={case.batch_size}: {ratio:.4f}"
    # A step without workers waits for all of its loading, so the target is for those with workers.
    verdict = "" if ratio <= MOST or not case.workers else ", missed"
    return f"{line} (at most {MOST}{verdict})" if case.workers else line


if __name__ == "__main__":
    sys.exit(main())
