"""The validation of a training: pictures of fixed examples, the routing of the model, and the losses, as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from mtu.data.task_dataset import TaskDataset
from mtu.pipelines import MTUPipeline
from mtu.training.loss_log import LogEntry
from mtu.training.runs.run_config import RunConfig
from mtu.training.runs.training_plots import plot_losses, plot_routing, save_figure
from mtu.training.runs.validation_pictures import (
    ValidationExample,
    choose_examples,
    draw_example_grid,
    generate_outputs,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Validation", "check_validation"]


def check_validation(config: RunConfig, is_xl: bool) -> None:
    """Check that the pictures of a validation can be made.

    Raises:
        ValueError: the model belongs to the family of SDXL.
    """
    if is_xl and config.trainer.validate_every is not None and config.validation.examples > 0:
        raise ValueError(
            "Pictures of a validation need a multi-task pipeline, which SDXL does not have yet: expected validation: "
            "{examples: 0}, which leaves the plots of routing and losses."
        )


class Validation:
    """Writes the pictures and plots of a step into `OUTPUT/validation/step-00000500`.

    Args:
        pipeline: the pipeline, whose UNet is trained.
        datasets: the training data, or other examples, of each task.
        config: the settings of the training.

    Raises:
        ValueError: an image cannot be read.
    """

    def __init__(
        self,
        pipeline: MTUPipeline | StableDiffusionXLPipeline,
        datasets: Mapping[str, TaskDataset],
        config: RunConfig,
    ) -> None:
        self.pipeline, self.config = pipeline, config
        self._writer: SummaryWriter | None = None
        specs = {spec.name: spec for spec in pipeline.unet.tasks}
        count = config.validation.examples
        self.examples: dict[str, list[ValidationExample]] = {}
        if count:
            self.examples = {
                name: choose_examples(dataset, specs[name], count, config.objective)
                for name, dataset in datasets.items()
            }

    def make_pictures(self, step: int) -> dict[str, Image.Image]:
        """Generate the outputs of all examples with the present weights, and draw a grid for each task.

        Args:
            step: number of steps made, for the titles.
        """
        if not self.examples:
            return {}
        outputs = generate_outputs(self.pipeline, self.examples, self.config.objective, self.config.validation)
        return {
            task: draw_example_grid(f"{task}, step {step}", self.examples[task], made) for task, made in outputs.items()
        }

    def write(self, step: int, pictures: Mapping[str, Image.Image], entries: Sequence[LogEntry]) -> Path:
        """Write pictures, the plot of the routing, and that of the losses.

        Args:
            step: number of steps made.
            pictures: the grid of each task.
            entries: the log so far.

        Returns:
            The folder of the step.

        Raises:
            OSError: a file cannot be written.
        """
        folder = self.config.output / "validation" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for task, picture in pictures.items():
            picture.save(folder / f"{task}.png")
        unet = self.pipeline.unet
        names = list(unet.routed_blocks_by_name())
        # The state dict has the middle block last.
        order = sorted(range(len(names)), key=lambda i: ("down", "mid", "up").index(names[i].partition("_")[0]))
        weights = unet.router_weights()[order]
        tasks = [task.name for task in unet.tasks]
        figure = plot_routing(weights, tasks, [names[i] for i in order], step)
        save_figure(figure, folder / "routing.png")
        if entries:
            save_figure(plot_losses(entries, tasks), self.config.output / "losses.png")
        if self.config.trainer.tensorboard:
            with Image.open(folder / "routing.png") as routing:
                self._write_for_tensorboard(step, {**pictures, "routing": routing})
        return folder

    def close(self) -> None:
        """Close the file of TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_for_tensorboard(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        # tensorboard is optional and takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            # TensorBoard reads the newest file of a folder alone, so the losses need a folder without pictures. What a
            # resumed training shows again replaces the earlier pictures.
            folder = self.config.output / "tensorboard" / "validation"
            self._writer = SummaryWriter(str(folder), purge_step=step)
        for name, picture in pictures.items():
            self._writer.add_image(f"validation/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()
