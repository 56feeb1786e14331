"""`python -m benchmarks.training.first_step`: trains the icons model until the end of one step, for `resume` to time.

It prints one line of JSON: the time of day at the end of the step, and the seconds from the call of the trainer to it.
With --checkpoint-at it writes a checkpoint of that step in the place of measuring: that of the first step, renamed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diffusers import StableDiffusionPipeline
from torch.optim.optimizer import register_optimizer_step_post_hook

import mtu
from benchmarks.training.icon_folder import EDGE
from mtu.data.image_folder import ImageFolder
from mtu.recipes.icons.demo import SHIPPED_BASE_MODEL
from mtu.training import Trainer, TrainerConfig
from mtu.training.checkpoints import Checkpoint, delete_checkpoints, read_newest_checkpoint, write_checkpoint
from mtu.training.multitask import MultiTaskConfig, MultiTaskObjective

_TASK = "edit"
# More than any training that is measured makes.
STEPS = 1_000_000


class _FirstStepDone(BaseException):
    """Ends the training after its first step."""


def build_trainer(options: argparse.Namespace) -> Trainer:
    """The training of the upcycled icons model on one task."""
    base = StableDiffusionPipeline.from_pretrained(SHIPPED_BASE_MODEL, use_safetensors=True)
    pipeline = mtu.upcycle(base)
    spec = pipeline.unet.tasks[pipeline.unet.task_index(_TASK)]
    config = MultiTaskConfig(
        batch_size=options.batch_size,
        resolution=EDGE,
        latent_cache=options.cache,
        text_cache=options.cache,
        cache_directory=options.cache_folder if options.cache == "disk" else None,
    )
    objective = MultiTaskObjective(pipeline, {_TASK: ImageFolder(options.data, spec)}, config)
    settings = TrainerConfig(
        STEPS,
        num_workers=options.workers,
        checkpoint_every=STEPS,
        log_every=STEPS,
        # A validation follows a checkpoint.
        validate_every=1 if options.checkpoint_at else None,
    )
    return Trainer(objective, settings, options.run, validate=_stop)


def _stop(*arguments: object) -> NoReturn:
    raise _FirstStepDone


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.first_step", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder that `icon_folder` wrote")
    add("--run", type=Path, required=True, help="the folder of the training")
    add("--cache-folder", type=Path, required=True, help="the folder of the cache, if it is on disk")
    add("--batch-size", type=int, default=1, help="(default: 1)")
    add("--cache", choices=("disk", "none"), default="disk", help="of latents and texts (default: disk)")
    add("--workers", type=int, default=0, help="processes that load data (default: 0)")
    add("--resume", action="store_true", help="go on from the checkpoint of the folder")
    add("--checkpoint-at", type=int, help="write a checkpoint of this step, and measure nothing")
    options = parser.parse_args(argv)
    trainer = build_trainer(options)
    # What is measured ends before any checkpoint, so that the next process goes on from the same.
    hook = None if options.checkpoint_at else register_optimizer_step_post_hook(_stop)
    start = time.perf_counter()
    try:
        trainer.train(resume=options.resume, overwrite=not options.resume)
    except _FirstStepDone:
        end, seconds = time.time(), time.perf_counter() - start
    else:
        raise AssertionError("The training must end after its first step.")
    finally:
        if hook is not None:
            hook.remove()
    if options.checkpoint_at:
        _, tensors, state = read_newest_checkpoint(options.run)
        delete_checkpoints(options.run)
        # The digest that was read is of the old file.
        del state["sha256"]
        write_checkpoint(options.run, Checkpoint(options.checkpoint_at, tensors, state))
    print(json.dumps({"end": end, "loop": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
