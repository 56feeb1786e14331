"""What a training will take, against arithmetic and against what trainings really write."""

import json
from pathlib import Path

import pytest

from mtu.training.runs import dry_run
from mtu.training.runs.dry_run import estimate_run
from mtu.training.runs.dry_run_report import run_estimate_reports
from mtu.training.runs.run import run_training
from mtu.training.runs.settings_file import read_run_config

from .small_runs import small_config


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    """The speed of the device does not matter here, so a small product measures it."""
    monkeypatch.setattr(dry_run, "_MATRIX_SIZES", {"cuda": 64, "cpu": 64})


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_files_are_as_large_as_estimated(small_base, tmp_path):
    config = small_config(small_base, tmp_path / "run", ema_decay=0.9, steps=2, checkpoint_every=1)
    estimate = estimate_run(config)
    assert not config.output.exists()
    run_training(config)
    (newest,) = (config.output / "checkpoints").glob("step-00000002.*.safetensors")
    assert estimate.disk.checkpoint == pytest.approx(newest.stat().st_size, rel=0.1)
    # Each file has a header of a few hundred bytes.
    latents, texts = (config.output / "cache" / kind for kind in ("latents", "texts"))
    images = sum(task.images for task in estimate.tasks)
    assert len(list(latents.rglob("*.safetensors"))) == images
    assert estimate.disk.latent_cache == pytest.approx(size_of(latents), abs=500 * images)
    prompts = 1 + sum(task.prompts for task in estimate.tasks)
    assert len(list(texts.rglob("*.safetensors"))) == prompts
    # The estimate takes the 77 tokens of CLIP; the tiny text encoder has 16.
    assert estimate.disk.text_cache * 16 // 77 == pytest.approx(size_of(texts), abs=500 * prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {}}, "no data to train on"),
        ({"resolution": 15}, "multiple of 2"),
        ({"batch_size": 5, "gradient_accumulation_steps": 2}, "batch_size must be a multiple of 2"),
    ],
)
def test_a_dry_run_refuses_what_a_training_refuses(small_base, tmp_path, settings, message):
    config = small_config(small_base, tmp_path / "run", **settings)
    for start in (estimate_run, run_training):
        with pytest.raises(ValueError, match=message):
            start(config)


def test_models_that_stay_on_the_gpu_are_named(small_base, tmp_path):
    def note(**settings):
        (_, memory, _) = run_estimate_reports(estimate_run(small_config(small_base, tmp_path, **settings)))
        return str(memory)

    assert "before the first step alone" in note()
    assert "the text encoders (0.5 GB in SD 1.5) stay there" in note(text_cache="none")
    assert "the VAE (0.3 GB) stays there" in note(latent_cache="none")
    assert estimate_run(small_config(small_base, tmp_path, text_cache="none")).disk.text_cache == 0


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_settings_of_the_paper_fill_no_disk_with_prompts(name):
    assert read_run_config(name, {"output": "x"}).objective.text_cache == "none"


def test_epochs_of_each_task_follow_its_share(small_base, tmp_path):
    config = small_config(small_base, tmp_path, steps=None, epochs=8, shares={"edit": 3}, batch_size=8)
    estimate = estimate_run(config)
    # 8 epochs of 6 rows are 48 examples, in 6 steps of 8: 6 of edit and 2 of remove.
    assert estimate.steps == 6
    assert {t.name: (t.rows, t.examples_per_step, t.epochs) for t in estimate.tasks} == {
        "edit": (3, 6.0, 12.0),
        "remove": (3, 2.0, 4.0),
    }


def test_the_time_of_an_earlier_training_is_taken_from_its_log(small_base, tmp_path):
    lines = [{"step": 10, "seconds": 5.0}, {"step": 20, "seconds": 25.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    estimate = estimate_run(small_config(small_base, tmp_path))
    assert estimate.duration.seconds_per_step == 2.0
    assert estimate.duration.is_measured


@pytest.mark.slow
def test_the_settings_of_the_paper_need_no_weights_and_no_data(tmp_path):
    settings = {"output": str(tmp_path / "run"), "gradient_accumulation_steps": "16"}
    estimate = estimate_run(read_run_config("sd15", settings))
    assert estimate.trained_parameters == pytest.approx(158.5e6, rel=1e-3)
    assert estimate.memory.training_state == pytest.approx(12 * estimate.trained_parameters)
    assert (estimate.steps, estimate.disk.latent_cache) == (None, None)
    text = "\n".join(map(str, run_estimate_reports(estimate)))
    assert "not given" in text
    assert "unknown" in text
