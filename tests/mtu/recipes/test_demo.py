"""The demo, in miniature from end to end, and what it measures and shows."""

import csv
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import mtu
from mtu.data.icons.examples import EDIT_KINDS, TASK_NAMES
from mtu.data.images import psnr
from mtu.recipes.icons.base_model import BaseModelConfig, build_untrained_pipeline, convert_to_float16_and_save
from mtu.recipes.icons.demo import ICON_TASKS, DemoConfig, _largest_divisor, run_demo
from mtu.recipes.icons.denoiser import DenoiserConfig
from mtu.recipes.icons.held_out_evaluation import (
    Measurement,
    before_after_grid,
    generate_example_images,
    held_out_examples,
    measure_quality,
    write_measurements_csv,
)
from mtu.recipes.icons.text_encoder import TextEncoderConfig
from mtu.recipes.icons.vae import VAEConfig
from mtu.training.checkpoints import Checkpoint, read_newest_checkpoint, write_checkpoint

from ..file_operations import CUTS, count_operations, run_cut_off
from .small_demo import SMALL_DEMO

MINIATURE = BaseModelConfig(
    vae=VAEConfig(block_out_channels=(8, 8, 16), norm_num_groups=4),
    text_encoder=TextEncoderConfig(width=16, num_layers=1, num_heads=2),
    denoiser=DenoiserConfig(block_out_channels=(8, 8, 16), heads=2, norm_num_groups=4),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    convert_to_float16_and_save(build_untrained_pipeline(MINIATURE), folder)
    return folder


@pytest.mark.slow
def test_demo_from_end_to_end(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SMALL_DEMO
    # Over what an earlier run left.
    write_checkpoint(tmp_path / "out" / "training", Checkpoint(1, {"a": torch.ones(1)}, {}))
    run_demo(base, tmp_path / "out", config)
    assert read_newest_checkpoint(tmp_path / "out" / "training").step == 3
    printed = capsys.readouterr().out
    for words in ("trained parameters", "FLOPs", "copying the input", "before", "after", "VAE's ceiling"):
        assert words in printed
    assert (tmp_path / "out" / "grid.png").stat().st_size > 1000
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").read_text().splitlines()))
    assert {row["task"] for row in rows} >= {"text-to-image", "remove", *(f"edit: {kind}" for kind in EDIT_KINDS)}
    assert all(row["torch"] == torch.__version__ for row in rows)
    model = mtu.MTUPipeline.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    assert [spec.name for spec in model.unet.tasks] == list(TASK_NAMES)
    assert model.unet.tasks == ICON_TASKS


@pytest.mark.slow
def test_every_batch_mixes_the_tasks_and_examples_are_held_out() -> None:
    examples = held_out_examples(3, seed=0)
    assert len(examples) == 3 * (3 + len(EDIT_KINDS))
    assert {example.task_name for example in examples[: 3 + len(EDIT_KINDS)]} == set(TASK_NAMES)
    again = held_out_examples(3, seed=0)
    assert all(
        torch.equal(a.target_image, b.target_image) and a.prompt == b.prompt
        for a, b in zip(examples, again, strict=True)
    )


@pytest.mark.slow
def test_measures_are_right_for_images_that_are_known(base: Path) -> None:
    pipeline = mtu.upcycle(StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32), ICON_TASKS)
    examples = held_out_examples(2, seed=0)
    targets = torch.stack([example.target_image for example in examples])
    noisy = (targets + 0.1 * torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    rows = {(row.task, row.metric): row for row in measure_quality(pipeline, examples, noisy, targets)}
    for (task, metric), row in rows.items():
        if task == "text-to-image":
            assert row.copied_input is None
            assert row.after_training == 100.0, metric
        else:
            assert row.after_training == pytest.approx(100, abs=0.1)  # PSNR of equal images is capped at 100 dB
            where = [i for i, e in enumerate(examples) if task in (e.task_name, f"{e.task_name}: {e.edit_kind}")]
            expected = psnr(noisy[where], targets[where]).mean()  # of two examples the mean is the median
            assert row.before_training == pytest.approx(float(expected), abs=1e-3)
            assert row.copied_input is not None
            assert 5 < row.copied_input < 40


@pytest.mark.slow
def test_images_do_not_depend_on_how_they_are_batched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = mtu.upcycle(StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32), ICON_TASKS)
    examples = held_out_examples(1, seed=0)
    together = generate_example_images(pipeline, examples, 0, "together", steps=2)
    monkeypatch.setattr("mtu.recipes.icons.held_out_evaluation._BATCH", 2)
    apart = generate_example_images(pipeline, examples, 0, "apart", steps=2)
    # float32 rounding of two denoising steps and the VAE, each some 40 layers of 2 ulp, on values up to 1.
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    grid = before_after_grid(examples, together, apart)
    assert grid.width > 4 * 64
    assert grid.height > 7 * 64


def test_a_table_of_metrics_is_whole_or_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    row = Measurement("edit", "PSNR (dB)", 2, None, 1.0, 2.0, 3.0)
    write_measurements_csv(path, [row], {"seed": 0})
    older = path.read_text()
    for operation in range(
        count_operations(monkeypatch, lambda: write_measurements_csv(path, [row, row], {"seed": 0}))
    ):
        write_measurements_csv(path, [row], {"seed": 0})
        run_cut_off(monkeypatch, lambda: write_measurements_csv(path, [row, row], {"seed": 0}), operation, CUTS[0])
        assert path.read_text() in (older, older + older.splitlines()[1] + "\n")


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        run_demo(tmp_path, tmp_path / "out", DemoConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (5, 4), (7, 6), (11, 6), (64, 12)])
def test_a_batch_is_shared_by_as_many_threads_as_divide_it(cores, threads):
    assert _largest_divisor(12, cores) == threads
