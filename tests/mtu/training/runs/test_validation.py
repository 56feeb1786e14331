"""Pictures and plots of a validation."""

import pytest
import torch

from mtu.data.task_dataset import ExampleImages
from mtu.tasks import EDIT, SUPER_RESOLUTION, TEXT_TO_IMAGE
from mtu.training.loss_log import LogEntry
from mtu.training.multitask import MultiTaskConfig
from mtu.training.runs.training_plots import plot_losses, plot_routing, save_figure
from mtu.training.runs.validation import check_validation
from mtu.training.runs.validation_pictures import choose_examples, draw_example_grid

from .small_runs import small_config


class Rows:
    """Ten rows whose pictures are of one colour."""

    def __len__(self):
        return 10

    def prompts(self, row):
        return [[f"prompt {row} " + "which is long " * 20, "another"]]

    def load_images(self, row, variant):
        return ExampleImages(torch.full((3, 8, 8), row / 10), torch.full((3, 8, 8), row / 20))

    def describe_row(self, row):
        return f"row {row}"


def test_examples_spread_over_the_rows():
    config = MultiTaskConfig(resolution=8)
    chosen = choose_examples(Rows(), EDIT, 4, config)
    assert [example.prompt.split()[1] for example in chosen] == ["0", "2", "5", "7"]
    assert len(choose_examples(Rows(), EDIT, 99, config)) == 10
    assert choose_examples(Rows(), SUPER_RESOLUTION, 1, config)[0].prompt == ""


def test_a_grid_shows_condition_output_and_truth_in_their_columns():
    (example,) = choose_examples(Rows(), EDIT, 4, MultiTaskConfig(resolution=8))[2:3]
    grid = draw_example_grid("edit, step 3", [example], [torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)])
    colours = [grid.getpixel((12 + 80 + column * 166, 140)) for column in range(3)]
    assert colours == [(64, 64, 64), (255, 0, 0), (128, 128, 128)]


def test_a_task_without_an_image_has_two_columns():
    class WithoutConditions(Rows):
        def load_images(self, row, variant):
            return super().load_images(row, variant)._replace(condition=None)

    examples = choose_examples(WithoutConditions(), TEXT_TO_IMAGE, 2, MultiTaskConfig(resolution=8))
    grid = draw_example_grid("t", examples, [example.pixels.target for example in examples])
    assert grid.width == 2 * 12 + 2 * 160 + 6


@pytest.mark.parametrize("experts", [1, 4])
def test_plots_can_be_drawn(tmp_path, experts):
    weights = torch.rand(3, 2, experts)
    layers = [f"{block}.attentions.0.transformer_blocks.0" for block in ("down_blocks.0", "mid_block", "up_blocks.1")]
    figure = plot_routing(weights, ["edit", "remove"], layers, 5)
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert labels == ["down 0", "mid", "up 1"]
    shown = figure.axes[0].images[0].get_array()
    assert torch.allclose(torch.from_numpy(shown.data), (weights / weights.sum(-1, keepdim=True))[:, 0].T)
    save_figure(figure, tmp_path / "routing.png")
    entries = [LogEntry(step, 1.0, 1e-4, 1.0, 0.0, {"edit": 0.5, "remove": 0.5}) for step in (1, 2)]
    figure = plot_losses([*entries, LogEntry(3, 1.0, 1e-4, 1.0, 0.0, {"edit": 0.25})], ["edit", "remove"])
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines == {"edit": [1, 2, 3], "remove": [1, 2]}


def test_losses_on_a_logarithmic_axis_have_plain_numbers():
    losses = [0.03, 0.9]
    entries = [LogEntry(step, loss, 1e-4, 1.0, 0.0, {"edit": loss}) for step, loss in enumerate(losses)]
    figure = plot_losses(entries, ["edit"])
    figure.canvas.draw()
    (axis,) = figure.axes
    shown = [label.get_text() for label in axis.get_yticklabels() if min(losses) < label.get_position()[1] < 1]
    assert shown == ["0.05", "0.1", "0.2", "0.5"]
    assert not any(label.get_text() for label in axis.get_yticklabels(minor=True))


def test_pictures_of_sdxl_are_refused_and_plots_are_not(small_base, tmp_path):
    config = small_config(small_base, tmp_path, validate_every=1)
    with pytest.raises(ValueError, match=r"expected validation: \{examples: 0\}"):
        check_validation(config, is_xl=True)
    check_validation(small_config(small_base, tmp_path, validate_every=1, validation={"examples": 0}), is_xl=True)
    check_validation(small_config(small_base, tmp_path), is_xl=True)
