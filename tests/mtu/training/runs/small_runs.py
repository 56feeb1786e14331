"""The smallest trainings that go through all steps: a tiny base model on disk, and folders of noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mtu.cli import main
from mtu.tasks import SD_TASKS
from mtu.training.runs.run_config import RunConfig
from mtu.training.runs.settings_file import read_run_config

from ...pipelines.conftest import stock_pipeline

SIZE = 16  # pixels
TASKS = ("edit", "remove")


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny stock pipeline, and beside it one of data for each task."""
    root = tmp_path_factory.mktemp("training")
    stock_pipeline().save_pretrained(root / "base")
    for task in SD_TASKS:
        write_image_folder(root / "data" / task.name, task.name)
    return root / "base"


def write_image_folder(folder: Path, name: str, rows: int = 3) -> None:
    """Write the folder of a task with images of noise."""
    folder.mkdir(parents=True)
    task = next(task for task in SD_TASKS if task.name == name)
    rng, lines = np.random.default_rng(SD_TASKS.index(task)), []
    for row in range(rows):
        line = {"target_file_name": f"{row}.png"}
        write_noise(folder / f"{row}.png", rng)
        if task.takes_image:
            line["condition_file_name"] = f"{row}-before.png"
            write_noise(folder / f"{row}-before.png", rng)
        if task.uses_prompt:
            line["prompt"] = f"{name} {row}"
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_noise(path: Path, rng: np.random.Generator) -> None:
    PIL.Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def small_settings(base: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """Settings by key of a training of two tasks and three steps; None: the default."""
    given = {
        "model": str(base),
        "output": str(output),
        "data": {task: str(base.parent / "data" / task) for task in TASKS},
        "steps": 3,
        "batch_size": 4,
        "resolution": SIZE,
        "learning_rate": 1e-3,
        "log_every": 1,
        "checkpoint_every": 2,
        "validation": {"inference_steps": 2, "examples": 2},
        **settings,
    }
    return {key: value for key, value in given.items() if value is not None}


def small_config(base: Path, output: Path, **settings: Any) -> RunConfig:
    return read_run_config(None, small_settings(base, output, **settings))


def run_command(*arguments: str) -> tuple[int | str | None, bool]:
    """Run `mtu`, and return its exit code and whether the processes are still connected."""
    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code, torch.distributed.is_initialized()
    raise AssertionError("the command did not end the process")
