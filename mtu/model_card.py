"""The README.md of a saved model: what it is, and which line loads it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mtu.tasks import TaskSpec

if TYPE_CHECKING:
    from mtu.unet import MTUUNet2DConditionModel

__all__ = ["write_model_card"]


def write_model_card(directory: str | os.PathLike, unet: "MTUUNet2DConditionModel") -> None:
    """Write README.md into a pipeline's folder, unless there is one."""
    path = Path(directory, "README.md")
    if path.exists():
        return
    config = unet.expert_config
    tasks = "\n".join(
        f"- `{spec.name}`: {' and '.join(_inputs(spec))}; {spec.guidance} guidance, {spec.num_inference_steps} steps"
        for spec in unet.tasks
    )
    path.write_text(
        f"""# Multi-task diffusion model

A Stable Diffusion model upcycled with MTU (arXiv 2503.11905): {config.num_experts} experts per feed-forward network,
{"all active" if config.is_dense else f"{config.active_experts} active per task"}. Its tasks:

{tasks}

```python
import mtu

pipe = mtu.MTUPipeline.from_pretrained(folder)                            # all tasks
unet = mtu.MTUUNet2DConditionModel.from_pretrained(folder, subfolder="unet")
```

`diffusers.StableDiffusionPipeline.from_pretrained(folder)` opens the same folder for its first task, where `mtu` is
installed. `DiffusionPipeline.from_pretrained` cannot: it finds only classes of diffusers. The stock class
`UNet2DConditionModel` cannot load the UNet: its norms and input convolution hold a row per task.
"""
    )


def _inputs(spec: TaskSpec) -> list[str]:
    return ["a prompt"] * spec.uses_prompt + ["an image"] * spec.takes_image
