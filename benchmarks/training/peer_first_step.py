"""`python -m benchmarks.training.peer_first_step`: runs diffusers' train_instruct_pix2pix.py until its first step ends.

It prints one line of JSON, as `first_step` does: the time of day at the end of the step, and the seconds from the start
of the script's loop, before it reads a checkpoint, to it. The script itself stays as it is. Its libraries that mtu does
not need come from a folder (`pip install --target DIR datasets tensorboard`), and a few lines stand for the transforms
of torchvision that it uses.
"""

import argparse
import importlib.machinery
import json
import os
import runpy
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

# Imported before there is a module of this name, whose presence changes what they import.
from diffusers import StableDiffusionInstructPix2PixPipeline  # noqa: F401
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def install_transforms() -> None:
    """Make a module `torchvision.transforms` with what the script uses, if there is none."""

    class Compose:
        def __init__(self, steps: Sequence[Callable[[Tensor], Tensor]]) -> None:
            self.steps = steps

        def __call__(self, images: Tensor) -> Tensor:
            for step in self.steps:
                images = step(images)
            return images

    class CenterCrop:
        def __init__(self, size: int) -> None:
            self.size = size

        def __call__(self, images: Tensor) -> Tensor:
            top, left = ((edge - self.size) // 2 for edge in images.shape[-2:])
            return images[..., top : top + self.size, left : left + self.size]

    class RandomCrop(CenterCrop):
        def __call__(self, images: Tensor) -> Tensor:
            top, left = (int(torch.randint(0, edge - self.size + 1, ())) for edge in images.shape[-2:])
            return images[..., top : top + self.size, left : left + self.size]

    class Lambda:
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            self.function = function

        def __call__(self, images: Tensor) -> Tensor:
            return self.function(images)

    class RandomHorizontalFlip:
        def __call__(self, images: Tensor) -> Tensor:
            return images.flip(-1) if torch.rand(()) < 0.5 else images

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    for kind in (Compose, CenterCrop, RandomCrop, Lambda, RandomHorizontalFlip):
        setattr(transforms, kind.__name__, kind)
    for module in (package, transforms):
        # Libraries that ask for the package find it by this.
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    package.transforms = transforms  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def watch_first_step(keeps_going: bool) -> None:
    """Print the times when the script logs its first step, and end the process then."""
    start: list[float] = []

    def init_trackers(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        start.append(time.perf_counter())

    def log(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        print(json.dumps({"end": time.time(), "loop": time.perf_counter() - start[0]}), flush=True)
        if not keeps_going:
            os._exit(0)

    # The script logs once a step, right after it.
    Accelerator.init_trackers, Accelerator.log = init_trackers, log  # pyright: ignore[reportAttributeAccessIssue]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; arguments after `--` are the script's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.peer_first_step", description=__doc__)
    parser.add_argument("--script", type=Path, required=True, help="train_instruct_pix2pix.py")
    parser.add_argument("--site", type=Path, required=True, help="the folder of its libraries")
    parser.add_argument("--keep-going", action="store_true", help="let the script end by itself")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args(argv)
    # Behind the others, so that torch and diffusers are those of the other contenders.
    sys.path.append(str(options.site))
    install_transforms()
    watch_first_step(options.keep_going)
    sys.argv = [str(options.script), *options.arguments]
    runpy.run_path(str(options.script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
