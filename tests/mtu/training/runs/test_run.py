"""`run_training`: what a training leaves in its folder, what it refuses, and how it goes on."""

import dataclasses
import json
import shutil

import PIL.Image
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import mtu
from mtu.training.multitask.encoded_cache import EncodedCache
from mtu.training.runs import run
from mtu.training.runs.run import run_training
from mtu.training.runs.run_config import DataSource
from mtu.training.runs.settings_file import read_run_config

from ...tiny import SDXL, stock_unet
from ..multitask.tiny_pipelines import xl_pipeline
from .small_runs import TASKS, small_config, small_settings


@pytest.fixture(scope="module")
def finished(small_base, tmp_path_factory):
    """The folder of a training with everything switched on, and its log."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = small_config(
        small_base, output, ema_decay=0.5, validate_every=2, tensorboard=True, upcycle={"num_experts": 2}
    )
    return config, run_training(config)


def unet_of(output):
    return mtu.MTUUNet2DConditionModel.from_pretrained(output / "model" / "unet").state_dict()


def test_the_folder_holds_what_the_guide_says(finished):
    config, entries = finished
    names = {path.name for path in config.output.iterdir()}
    assert names == {
        ".lock",
        "cache",
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "losses.png",
        "model",
        "tensorboard",
        "validation",
    }
    assert [entry.step for entry in entries] == [1, 2, 3]
    assert set(entries[0].terms) == set(TASKS)
    for step in (2, 3):
        pictures = {path.name for path in (config.output / "validation" / f"step-{step:08d}").iterdir()}
        assert pictures == {"edit.png", "remove.png", "routing.png"}


def test_tensorboard_finds_one_file_of_losses_and_one_of_pictures(finished):
    config, _ = finished
    # TensorBoard follows the newest file of a folder alone.
    for folder in (config.output / "tensorboard", config.output / "tensorboard" / "validation"):
        assert len([path for path in folder.iterdir() if path.is_file()]) == 1


def test_the_finished_pipeline_holds_the_average_and_the_frozen_weights(finished, small_base):
    config, _ = finished
    pipe = mtu.MTUPipeline.from_pretrained(config.output / "model")
    assert [task.name for task in pipe.unet.tasks] == list(TASKS)
    assert pipe.unet.expert_config.num_experts == 2
    base = UNet2DConditionModel.from_pretrained(small_base / "unet").state_dict()
    trained = {name for name, _ in pipe.unet.named_trainable_parameters()}
    state = pipe.unet.state_dict()
    frozen = [name for name in base if name not in trained]
    assert frozen
    assert all(torch.equal(state[name], base[name]) for name in frozen)
    (newest,) = (config.output / "checkpoints").glob("step-00000003.*.safetensors")
    averages = {name.split("unet.")[1]: t for name, t in load_file(newest).items() if name.startswith("average")}
    assert set(averages) == trained
    assert all(torch.equal(state[name], tensor) for name, tensor in averages.items())


def test_the_resolved_settings_run_again(finished):
    config, _ = finished
    again = read_run_config(config.output)
    assert again == dataclasses.replace(again, data=config.data)
    assert again.to_yaml() == config.to_yaml()


def test_a_training_goes_on_from_its_folder_alone(finished, tmp_path):
    config, _ = finished
    copied = shutil.copytree(config.output, tmp_path / "copied")
    for path in (copied / "checkpoints").glob("step-00000003*"):
        path.unlink()
    shutil.rmtree(copied / "model")
    entries = run_training(read_run_config(copied, {"output": str(copied)}), resume=True)
    assert [entry.step for entry in entries] == [1, 2, 3]
    expected, found = unet_of(config.output), unet_of(copied)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_weights_that_are_held_in_bfloat16_are_saved_as_they_were(small_base, tmp_path):
    run_training(small_config(small_base, tmp_path / "run", frozen_dtype="bfloat16", precision="bf16", steps=1))
    base, found = UNet2DConditionModel.from_pretrained(small_base / "unet").state_dict(), unet_of(tmp_path / "run")
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(found[name], base[name])
    assert not torch.equal(base[name], base[name].bfloat16().float())
    assert not torch.equal(found["conv_in.weight"][0, :, :4], base["conv_in.weight"])


def test_validation_data_of_their_own_and_no_pictures(small_base, tmp_path):
    other = {"edit": str(small_base.parent / "data" / "remove")}
    config = small_config(
        small_base, tmp_path / "run", steps=1, validate_every=1, validation={"examples": 0, "data": other}
    )
    run_training(config)
    assert [path.name for path in (tmp_path / "run/validation/step-00000001").iterdir()] == ["routing.png"]


def test_sdxl_trains_and_its_finished_pipeline_trains_on(small_base, tmp_path):
    pipe = xl_pipeline()
    pipe.register_modules(unet=stock_unet(SDXL))
    pipe.save_pretrained(tmp_path / "base")
    settings = {"data": {"edit": str(small_base.parent / "data" / "edit")}, "steps": 1, "batch_size": 2}
    plots = {"validate_every": 1, "validation": {"examples": 0}}
    run_training(small_config(tmp_path / "base", tmp_path / "run", **settings, **plots))
    finished = tmp_path / "run" / "model"
    unet = StableDiffusionXLPipeline.from_pretrained(finished).unet
    assert ([task.name for task in unet.tasks], unet.expert_config.num_experts) == (["edit"], 1)
    run_training(small_config(finished, tmp_path / "next", **settings))
    with pytest.raises(ValueError, match="upcycled already"):
        run_training(small_config(finished, tmp_path / "other", **settings, upcycle={"num_experts": 2}))
    with pytest.raises(ValueError, match="has the tasks edit, but got 'remove'"):
        run_training(small_config(finished, tmp_path / "other", steps=1))


def test_pictures_have_a_row_an_example(finished):
    config, _ = finished
    with PIL.Image.open(config.output / "validation/step-00000003/edit.png") as picture:
        # Condition, output and truth, each enlarged to 160 pixels.
        assert picture.width > 3 * 160
        assert picture.height > 2 * 160


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_folder_with_checkpoints_needs_resume_or_overwrite(finished):
    config, _ = finished
    with pytest.raises(FileExistsError, match="resume"):
        run_training(config)


def test_resuming_with_other_settings_is_refused_and_leaves_the_settings(finished):
    config, _ = finished
    before = (config.output / "config.yaml").read_text()
    changed = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, learning_rate=1.0))
    with pytest.raises(ValueError, match="learning_rate"):
        run_training(changed, resume=True)
    assert (config.output / "config.yaml").read_text() == before


def test_a_resume_with_other_data_names_the_task(finished, tmp_path):
    config, _ = finished
    folder = shutil.copytree(config.data["edit"].folder, tmp_path / "edits")
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("edit 0", "edit zero"))
    changed = dataclasses.replace(config, data={**config.data, "edit": DataSource(folder)})
    with pytest.raises(ValueError, match=r"made with another data \(edit\)"):
        run_training(changed, resume=True)


def test_a_resume_without_a_folder_is_refused(small_base, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run_training(small_config(small_base, tmp_path / "nothing"), resume=True)


def test_a_resume_before_the_first_checkpoint_starts(small_base, tmp_path):
    entries = run_training(small_config(small_base, tmp_path, steps=1), resume=True)
    assert [entry.step for entry in entries] == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {}}, "no data to train on"),
        ({"data": {"edit": "no/such"}}, "no/such"),
        ({"data": {"colorize": "x"}}, "'colorize', which is not among the built-in tasks"),
        ({"model": "no/such"}, "holds no model_index.json"),
        ({"model": "sd15"}, "names an architecture"),
        ({"upcycle": {"num_experts": 5}}, "num_experts must divide"),
        ({"resolution": 15}, "multiple of 2"),
        ({"batch_size": 5, "gradient_accumulation_steps": 2}, "batch_size"),
    ],
)
def test_settings_that_cannot_be_trained(small_base, tmp_path, settings, message):
    config = small_config(small_base, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=message):
        run_training(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_rows_are_listed_before_a_model_is_loaded(small_base, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_upcycled_pipeline", None)
    shutil.copytree(small_base.parent / "data" / "edit", tmp_path / "edits")
    for row in (0, 2):
        (tmp_path / "edits" / f"{row}.png").unlink()
    config = small_config(small_base, tmp_path / "run", data={"edit": str(tmp_path / "edits")})
    with pytest.raises(ValueError, match=r"cannot be trained on: .*line 1: .*; .*line 3: "):
        run_training(config)


def test_an_output_that_cannot_be_made(small_base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made"):
        run_training(small_config(small_base, tmp_path / "file" / "run"))


def test_a_full_disk_while_images_are_encoded_is_one_sentence(small_base, tmp_path, monkeypatch):
    def fail(self, key, tensors):
        raise OSError(28, f"{key} cannot be written: No space left on device")

    monkeypatch.setattr(EncodedCache, "put", fail)
    with pytest.raises(OSError, match=r"^The disk of .* is full \(.*No space left on device\): .*--resume goes on\.$"):
        run_training(small_config(small_base, tmp_path / "run"))


def test_a_folder_with_checkpoints_is_refused_before_a_model_is_looked_for(finished, monkeypatch):
    monkeypatch.setattr(run, "find_base_model", None)
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_training(finished[0])


def test_a_full_disk_at_the_end_is_one_sentence(finished, monkeypatch, tmp_path):
    config, _ = finished
    copied = shutil.copytree(config.output, tmp_path / "copied")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mtu.MTUPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"finished pipeline cannot be written .*No space left"):
        run_training(read_run_config(copied, {"output": str(copied)}), resume=True)
    assert json.loads((copied / "checkpoints" / "step-00000003.json").read_text())


def test_settings_helper_is_what_a_file_may_say(small_base, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(small_settings(small_base, tmp_path / "run")))
    assert read_run_config(tmp_path / "my.yaml") == small_config(small_base, tmp_path / "run")
