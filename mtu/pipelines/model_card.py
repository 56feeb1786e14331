"""The README.md of a saved pipeline: what it is, and which lines load it."""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mtu.compat.private_interfaces import is_generated_card
from mtu.storage import write_text
from mtu.tasks import TaskSpec

if TYPE_CHECKING:
    from mtu.models.unet import MTUUNet2DConditionModel

__all__ = ["write_model_card"]

# The last line of a card that mtu wrote: with it, a card that someone has edited since can be told.
_MARK = "<!-- Written by mtu, which writes it anew unless it was edited: {digest} -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{digest\}", "([0-9a-f]{64})"))
# diffusers puts this before a card that it uploads.
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def write_model_card(directory: str | os.PathLike, unet: "MTUUNet2DConditionModel") -> None:
    """Write README.md into a pipeline's folder, unless there is one that someone else wrote or has edited."""
    path = Path(directory, "README.md")
    old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    front, text = _parted(old)
    if text.strip() and not _is_written_by_mtu(text) and not is_generated_card(text):
        return
    card = _card(unet)
    write_text(path, f"{front}{card}\n{_MARK.format(digest=_digest(card))}\n")


def _parted(text: str) -> tuple[str, str]:
    match = _FRONT_MATTER.match(text)
    return ("", text) if match is None else (match.group(), text[match.end() :])


def _is_written_by_mtu(text: str) -> bool:
    mark = _MARKED.search(text)
    return mark is not None and not text[mark.end() :].strip() and mark.group(1) == _digest(text[: mark.start()])


def _digest(card: str) -> str:
    """SHA-256 of a card, whatever the blank lines around it and its ends of lines."""
    return hashlib.sha256("\n".join(card.strip().splitlines()).encode()).hexdigest()


def _card(unet: "MTUUNet2DConditionModel") -> str:
    config = unet.expert_config
    active = "all active" if config.is_dense else f"{config.active_experts} active per task"
    tasks = "\n".join(
        f"- `{spec.name}`: {' and '.join(_inputs(spec))}; {spec.guidance} guidance, {spec.num_inference_steps} steps"
        for spec in unet.tasks
    )
    return f"""# Multi-task diffusion model

A Stable Diffusion model upcycled with MTU (arXiv 2503.11905): {config.num_experts} experts per feed-forward network,
{active}. Its tasks:

{tasks}

All tasks, from this folder or from a repository of the Hub:

```python
import mtu

pipe = mtu.MTUPipeline.from_pretrained(folder)
unet = mtu.MTUUNet2DConditionModel.from_pretrained(folder, subfolder="unet")
```

diffusers' own class opens a folder on the disk, for the first task alone, once `mtu` is imported:

```python
import mtu
from diffusers import StableDiffusionPipeline

first = StableDiffusionPipeline.from_pretrained(folder)
pipe = mtu.MTUPipeline.from_pipe(first)  # and for all tasks again
```

`DiffusionPipeline.from_pretrained` cannot open it, as it finds only classes of diffusers; nor can the stock class
`UNet2DConditionModel` load the UNet, whose norms and input convolution hold a row per task.
"""


def _inputs(spec: TaskSpec) -> list[str]:
    return ["a prompt"] * spec.uses_prompt + ["an image"] * spec.takes_image
