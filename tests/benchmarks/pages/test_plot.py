"""Pictures: their points, their files, and the message where nothing can be drawn."""

import math

import pytest
from matplotlib.image import imread

from benchmarks.ffn.roofline import roofline_points
from benchmarks.harness.workloads import DENSE, Setting
from benchmarks.models.steps import (
    Case,
    case_of,
    compare_with_usual,
    deployed_batch_and_steps,
    steps_by_setup,
    usual_cases,
)
from benchmarks.pages import plot, plot_roofline, plot_scaling, plot_unet

from ..page_cases import STEPS, grown, make_roofs, make_step, write_rows
from ..rows_cases import FOUR, make_row


def colors(path):
    """How many colours a picture has: an empty one has one."""
    pixels = imread(path)[::3, ::3, :3]
    assert pixels.shape[0] > 100
    return len({tuple(pixel) for pixel in pixels.reshape(-1, 3).round(2)})


def test_labels_say_what_is_unusual():
    assert str(case_of(make_step("mtu-cpp+graphs", 1))) == "mtu-cpp+graphs"
    assert str(case_of(make_step("mtu-cpp", 1, setting=Setting(8, 2, 4)))) == "mtu-cpp, top-2 of 8"
    assert str(case_of(make_step("mtu-cpp", 1, setting=Setting(4, 2, 1)))) == "mtu-cpp, top-2 of 4, one task"
    assert str(case_of(make_step("mtu-cpp", 1, setting=Setting(8)))) == "mtu-cpp, 8 experts, one task"
    assert str(case_of(make_step("mtu-cpp", 1, setting=Setting(1, DENSE, 4), model="sdxl"))) == "mtu-cpp"
    # One sample has one task, also where more were asked for; the original and a folded task have none.
    assert str(case_of(make_step("mtu-cpp", 1, B=1))) == "mtu-cpp"
    assert str(case_of(make_step("stock", 1))) == "stock"
    assert str(case_of(make_step("mtu-cpp-folded", 1))) == "mtu-cpp-folded"
    assert str(case_of(make_step("four-unets", 1, setting=Setting(4, DENSE, 1)))) == "four-unets, one task"


def test_steps_are_relative_to_the_original_of_their_group():
    rows = [make_step("stock", 1000), make_step("mtu-cpp", 900), make_step("stock", 10, group="other")]
    rows += [make_step("mtu-cpp", 1, B=2, group="alone")]
    (cases,) = steps_by_setup(rows).values()
    steps = cases[Case("mtu-cpp")]
    assert steps[4].relative_to_original(900) == 0.9
    assert steps[2].original_row is None
    assert math.isnan(steps[2].relative_to_original(1))


def test_unusual_steps_are_divided_by_the_usual_step_of_their_group():
    one_task, top_2 = Setting(4, DENSE, 1), Setting(4, 2, 4)
    rows = [make_step("mtu-cpp", 100), make_step("mtu-cpp", 98, setting=one_task)]
    rows += [make_step("mtu-cpp", 80, setting=top_2), make_step("mtu-cpp", 79, setting=top_2._replace(tasks=1))]
    rows += [make_step("mtu-cpp@each", 130), make_step("mtu-cpp@routers", 50, group="other")]
    (cases,) = steps_by_setup(rows).values()
    ratios = {
        str(case): own.measured.median_us / plain.measured.median_us
        for case, comparison in compare_with_usual(cases).items()
        for own, plain in comparison.pairs_by_batch.values()
    }
    assert ratios == {"mtu-cpp, one task": 0.98, "mtu-cpp, top-2 of 4": 0.8, "mtu-cpp@each": 1.3}
    assert list(usual_cases(cases)) == [Case("mtu-cpp")]


def test_deployed_are_four_tasks_or_the_largest_batch():
    rows = [make_step(name, time, B=B) for name, time in STEPS.items() for B in (2, 4, 8)]
    ((B, steps),) = (deployed_batch_and_steps(cases) for cases in steps_by_setup(rows).values())
    assert B == 4
    assert list(map(str, steps)) == ["stock", "stock+graphs", "mtu-triton", "mtu-triton+graphs", "four-unets"]
    ((B, _),) = (
        deployed_batch_and_steps(cases)
        for cases in steps_by_setup([row for row in rows if row.workload.B != 4]).values()
    )
    assert B == 8


@pytest.mark.slow
def test_pictures_of_each_kind(tmp_path):
    places = [{"model": model, "B": B} for model in ("sd15", "sdxl") for B in (1, 4)]
    steps = [make_step(name, time * place["B"], **place) for place in places for name, time in STEPS.items()]
    plot_unet.write_plot([*steps, make_step("swapped-unets", 9e4)], tmp_path / "unet.png")
    plot_scaling.write_plot(grown(), tmp_path / "deep" / "scaling.png")
    shapes = ((320, 4096), (640, 1024), (1280, 64))
    rows = [
        make_row(name, 100 + at, shape=shape) for shape in shapes for at, name in enumerate(("eager", "mtu-triton"))
    ]
    plot_roofline.write_plot(roofline_points(rows, {("cuda", "bf16"): make_roofs()}), tmp_path / "roofline.png")
    for name in ("unet", "deep/scaling", "roofline"):
        assert colors(tmp_path / f"{name}.png") > 10


@pytest.mark.slow
def test_all_pictures_of_a_folder(tmp_path, capsys):
    results, images = tmp_path / "results", tmp_path / "images"
    results.mkdir()
    write_rows(results / "moe_ffn_cuda.csv", [make_row(name, 100) for name in ("products", "eager", "mtu-triton")])
    write_rows(results / "scaling_cuda.csv", grown())
    write_rows(results / "machine.csv", [make_roofs(), make_roofs("cpu")])
    write_rows(results / "unet_cuda.csv", [make_step(name, time) for name, time in STEPS.items()])
    assert plot.main(["--results", str(results), "--output", str(images)]) == 0
    names = ["moe_ffn_cuda.png", "roofline_cuda.png", "scaling_cuda.png", "unet_cuda.png"]
    assert sorted(path.name for path in images.iterdir()) == names
    assert sorted(line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()) == names


def test_pictures_that_cannot_be_drawn_are_reported_after_the_others(tmp_path, capsys):
    write_rows(tmp_path / "scaling_cuda.csv", [make_row("eager", 1, setting=FOUR)])
    write_rows(tmp_path / "unet_cuda.csv", [make_step("stock", 10), make_step("mtu-triton", 9)])
    with pytest.raises(SystemExit, match="2"):
        plot.main(["--results", str(tmp_path), "--output", str(tmp_path)])
    assert "error: scaling_cuda.png needs rows of two token counts" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.png")] == ["unet_cuda.png"]


def test_a_picture_needs_what_it_compares_with(tmp_path):
    with pytest.raises(ValueError, match=r"unet\.png needs rows of stock and of contenders in its group, got none\."):
        plot_unet.write_plot([make_step("mtu-triton", 9)], tmp_path / "unet.png")
    with pytest.raises(ValueError, match=r"roofline\.png needs forward passes .*, got none\."):
        plot_roofline.write_plot([], tmp_path / "roofline.png")
