"""The waiting for data: batches of the size of SD 1.5 from caches, and the medians of the log."""

import csv

import pytest

from benchmarks.training import data_time
from mtu.training import BatchPart, LogEntry


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_batches_of_the_size_of_sd15_come_from_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(data_time, "_ROWS", 3)
    objective = data_time.build_sd15(data_time.Case("sd15", cache, 0, 4), tmp_path)
    batch = objective.load_batch(BatchPart(0, 0, 1))
    assert batch.missing_images is None
    assert batch.missing_prompts == []
    assert batch.latents.tensors["target"].shape == (4, 8, 64, 64)
    assert batch.texts.tensors["prompt_embeds"].shape == (4, 77, 768)
    assert any(tmp_path.rglob("*.safetensors")) == (cache == "disk")


def test_medians_are_of_whole_steps():
    seconds = [5.0, 6.0, 8.0, 9.0]
    entries = [LogEntry(i, 0.0, 0.0, second, 0.1 * i, {}) for i, second in enumerate(seconds)]
    step_us, data_us = data_time.medians_of(entries)
    assert step_us == pytest.approx(1e6)
    assert data_us == pytest.approx(0.2e6)


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_time, "_ROWS", 8)
    path = tmp_path / "data.csv"
    assert data_time.main(["--quick", "--output", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["training"] for row in rows] == ["sd15", "icons"]
    assert all(0 <= float(row["ratio"]) < 1 and float(row["step_us"]) > 0 for row in rows)
    assert len({row["group"] for row in rows}) == 1
    # Two steps wait for all of their loading if there are no workers, so the target is for those with workers.
    assert "sd15, cache on disk, 2 workers, B=4: 0." in capsys.readouterr().out
