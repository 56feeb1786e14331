"""The description of a task, and the four built-in tasks with the paper's settings.

A task's weights live in the model (`mtu.models`), its data in `mtu.data`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

__all__ = [
    "EDIT",
    "REMOVE",
    "SDXL_TASKS",
    "SD_TASKS",
    "SUPER_RESOLUTION",
    "TEXT_TO_IMAGE",
    "TaskSpec",
    "as_task_specs",
]

Guidance = Literal["none", "text", "dual"]
Resample = Literal["lanczos", "bicubic", "bilinear"]

# A name is also a part of file names (`save_task`), whose length file systems limit, and a word on the command line.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{,99}")


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One task of a multi-task diffusion model: the inputs of its UNet, and the settings of its sampling.

    Guidance combines the noise predictions of the branches of one sample (`t` prompt, `i` negative prompt with the
    image, `u` negative prompt without the image):

        none:  t
        text:  u + s_text (t − u)                         two branches, classifier-free guidance
        dual:  u + s_text (t − i) + s_image (i − u)       three branches, InstructPix2Pix

    Args:
        name: a lower-case name of up to 100 letters, digits and `. _ -`.
        condition_channels: the latent channels of the condition image, which follow the noisy latents; 0: no image.
        guidance: "none", "text" or "dual".
        guidance_scale: s_text.
        image_guidance_scale: s_image, for "dual".
        num_inference_steps: the default number of denoising steps.
        uses_prompt: False for a task whose prompt is always empty.
        scale: the output size / the size of the condition image (2 for super-resolution).
        resample: the filter that resizes the condition image to the output size.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> colorize = mtu.TaskSpec("colorize", guidance="dual", guidance_scale=5.0, image_guidance_scale=1.5)
        >>> unet.add_task(colorize, init_from="edit")

    Source: MTU (arXiv 2503.11905) §4; InstructPix2Pix (arXiv 2211.09800) eq. 3.
    """

    name: str
    condition_channels: int = 4
    guidance: Guidance = "text"
    guidance_scale: float = 7.5
    image_guidance_scale: float | None = None
    num_inference_steps: int = 20
    uses_prompt: bool = True
    scale: int = 1
    resample: Resample = "lanczos"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"A task name is up to 100 lower-case letters, digits and '.', '_', '-', but got {self.name!r}."
            )
        for field in ("condition_channels", "num_inference_steps", "scale"):
            value, least = getattr(self, field), 0 if field == "condition_channels" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Task {self.name!r}: {field} must be an integer ≥ {least}, but got {value!r}.")
        for field in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, field)
            if field == "image_guidance_scale" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"Task {self.name!r}: {field} must be a finite number ≥ 0, but got {value!r}.")
        if not isinstance(self.uses_prompt, bool):
            raise ValueError(f"Task {self.name!r}: uses_prompt must be True or False, but got {self.uses_prompt!r}.")
        if self.guidance not in ("none", "text", "dual"):
            raise ValueError(
                f"Task {self.name!r}: guidance must be 'none', 'text' or 'dual', but got {self.guidance!r}."
            )
        if self.resample not in ("lanczos", "bicubic", "bilinear"):
            raise ValueError(
                f"Task {self.name!r}: resample must be 'lanczos', 'bicubic' or 'bilinear', but got {self.resample!r}."
            )
        if self.guidance == "dual" and (self.condition_channels == 0 or self.image_guidance_scale is None):
            raise ValueError(
                f"Task {self.name!r}: dual guidance needs condition_channels > 0 and an image_guidance_scale, but got "
                f"{self.condition_channels} and {self.image_guidance_scale}."
            )

    @property
    def takes_image(self) -> bool:
        """Whether the task is conditioned on an image."""
        return self.condition_channels > 0

    def guidance_branches(
        self,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        *,
        embeds_guidance_scale: bool = False,
    ) -> tuple[tuple[bool, bool], ...]:
        """The noise predictions that one sample needs: 1, 2 or 3 branches, of which the prompt's is the first.

        As in diffusers, text guidance with a scale ≤ 1 needs the prompt's branch alone. By its formula, dual guidance
        with both scales 1 also does.

        Args:
            guidance_scale: s_text; None: the task's own. It has no effect on tasks without guidance.
            image_guidance_scale: s_image; None: the task's own. It has an effect on dual guidance only.
            embeds_guidance_scale: whether the UNet takes s_text as an input (`timestep_cond`), as latent consistency
                models do. Then tasks without an image run the prompt's branch alone, as in diffusers.

        Returns:
            A pair for each branch: whether it has the prompt (otherwise the negative prompt), and whether it has the
            image (otherwise zeros).
        """
        s_text = self.guidance_scale if guidance_scale is None else guidance_scale
        s_image = self.image_guidance_scale if image_guidance_scale is None else image_guidance_scale
        if self.guidance == "dual" and not s_text == s_image == 1:
            return (True, True), (False, True), (False, False)
        if self.guidance == "text" and s_text > 1 and (self.takes_image or not embeds_guidance_scale):
            # With an image, classifier-free guidance drops the prompt and keeps the image.
            return (True, True), (False, True)
        return ((True, True),)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TaskSpec":
        """Make a task from the fields that `to_dict` returned.

        Raises:
            ValueError: a field is unknown, missing or out of its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping):
            raise ValueError(f"A task is described by the fields {sorted(known)}, but got {fields!r}.")
        if "name" not in fields or not known.issuperset(fields):
            raise ValueError(f"A task is described by the fields {sorted(known)}, but got {sorted(fields)}.")
        return cls(**fields)


TEXT_TO_IMAGE = TaskSpec("text-to-image", condition_channels=0, guidance="text", guidance_scale=7.5)
EDIT = TaskSpec("edit", guidance="dual", guidance_scale=7.5, image_guidance_scale=1.6)
SUPER_RESOLUTION = TaskSpec(
    "super-resolution", guidance="none", guidance_scale=1.0, uses_prompt=False, scale=2, resample="bicubic"
)
REMOVE = TaskSpec("remove", guidance="dual", guidance_scale=4.0, image_guidance_scale=1.5)

SD_TASKS = (TEXT_TO_IMAGE, EDIT, SUPER_RESOLUTION, REMOVE)
SDXL_TASKS = (
    dataclasses.replace(TEXT_TO_IMAGE, guidance_scale=5.0, num_inference_steps=50),
    dataclasses.replace(EDIT, guidance_scale=10.0, image_guidance_scale=1.5, num_inference_steps=50),
    dataclasses.replace(SUPER_RESOLUTION, num_inference_steps=50),
    dataclasses.replace(REMOVE, num_inference_steps=50),
)


def as_task_specs(
    tasks: Iterable[TaskSpec | Mapping[str, Any] | str], built_in: Sequence[TaskSpec] = SD_TASKS
) -> tuple[TaskSpec, ...]:
    """Convert descriptions of tasks to task specs.

    Args:
        tasks: at least one task, each a spec, its dictionary (as in config.json) or the name of a built-in task.
        built_in: the tasks that names stand for; the settings of SDXL differ from those of SD 1.5.

    Returns:
        The specs, in the same order.

    Raises:
        ValueError: there is no task, a name occurs twice, or a name is not that of a built-in task.
        TypeError: an element has another type.
    """
    if isinstance(tasks, str | TaskSpec | Mapping):
        raise TypeError(f"tasks must be a list of tasks, but got the single task {tasks!r}.")
    by_name = {spec.name: spec for spec in built_in}
    specs = []
    for task in tasks:
        if isinstance(task, TaskSpec):
            specs.append(task)
        elif isinstance(task, Mapping):
            specs.append(TaskSpec.from_dict(task))
        elif isinstance(task, str):
            if task not in by_name:
                raise ValueError(
                    f"Unknown task {task!r}: expected one of {sorted(by_name)}, or a TaskSpec for a task of your own."
                )
            specs.append(by_name[task])
        else:
            raise TypeError(f"A task is a TaskSpec, its dictionary or a built-in name, but got {type(task).__name__}.")
    names = [spec.name for spec in specs]
    if not names:
        raise ValueError("A multi-task model needs at least one task, but got an empty list.")
    if len(set(names)) != len(names):
        raise ValueError(f"Task names must be unique, but got {names}.")
    return tuple(specs)
