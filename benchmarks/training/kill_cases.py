"""The trainings that `kill_and_resume` ends early: the icon model on all tasks, loaded and split in several ways."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline

import mtu
from benchmarks.harness.provenance import ROOT
from mtu import storage
from mtu.data.icons.task_dataset import IconTask
from mtu.tasks import SD_TASKS
from mtu.training import Trainer, TrainerConfig
from mtu.training.checkpoints import checkpoint_steps
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective

# With three examples of each task in a step, most steps end in the middle of an epoch of seven rows.
_ROWS = 7
_BATCH_SIZE = 12
_GROUPS = {"weights": "trained.", "average": "average.", "optimizer": "optimizer."}


class Case(NamedTuple):
    """A training, as far as it differs from the others.

    Attributes:
        processes: number of processes.
        workers: number of processes that load batches, for each of them.
        accumulation: number of passes of a step.
        cache: where latents and embeddings are kept: "memory", "disk" or "none".
    """

    processes: int = 1
    workers: int = 0
    accumulation: int = 1
    cache: str = "memory"


CASES = {
    "mid-epoch": Case(),
    "two workers": Case(workers=2),
    "accumulation 3": Case(accumulation=3),
    "two processes": Case(processes=2),
    "cached": Case(cache="disk"),
    "uncached": Case(cache="none"),
}


class Digests(NamedTuple):
    """The SHA-256 of what a training left, each in twelve digits: its last checkpoint's tensors, and its log."""

    weights: str
    average: str
    optimizer: str
    log: str


def train_case(case: Case, steps: int, directory: Path, resume: bool) -> None:
    """Train in this process, which writes its output into the folder."""
    _redirect_output(directory / f"output-{os.environ.get('RANK', 0)}.txt")
    warnings.filterwarnings("ignore", "Training goes on from step")  # said of torn checkpoints
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "mtu" / "assets" / "icons-base", safety_checker=None)
    objective = MultiTaskObjective(
        mtu.upcycle(pipeline),
        {task.name: IconTask(task.name, _ROWS) for task in SD_TASKS},
        MultiTaskConfig(
            batch_size=_BATCH_SIZE,
            resolution=32,
            conditioning_dropout_prob=0.1,
            random_flip=True,
            latent_cache=case.cache,
            text_cache=case.cache,
            cache_directory=directory / "cache",
        ),
    )
    config = TrainerConfig(
        steps=steps,
        learning_rate=1e-3,
        warmup_steps=4,
        schedule="cosine",
        ema_decay=0.9,
        gradient_accumulation_steps=case.accumulation,
        num_workers=case.workers,
        checkpoint_every=2,
        log_every=1,
    )
    Trainer(objective, config, directory).train(resume=resume and bool(checkpoint_steps(directory)))


def logged_step(directory: Path) -> int:
    """The last step in the log of a training, 0 if there is none."""
    try:
        lines = (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, json.JSONDecodeError):
        return 0  # The line is being written.


def digests_of_training(directory: Path, steps: int) -> Digests:
    """Compute the digests of a training that made all its steps.

    Raises:
        ValueError: the last checkpoint is missing or damaged.
    """
    state, tensors = storage.read_description_and_tensors(directory / "checkpoints", f"step-{steps:08d}")
    kinds = {kind: _digest({n: t for n, t in tensors.items() if n.startswith(p)}) for kind, p in _GROUPS.items()}
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [(entry["step"], entry["loss"], entry["learning_rate"], entry["terms"]) for entry in entries]
    return Digests(**kinds, log=hashlib.sha256(json.dumps([log, state["optimizer_numbers"]]).encode()).hexdigest()[:12])


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
