"""The settings of a training: types, sentences for what is wrong, flags over a file, and the files that ship."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mtu.training.multitask import MultiTaskConfig
from mtu.training.runs.run_config import DataSource, RunConfig, UpcycleConfig, settings_by_key
from mtu.training.runs.settings_file import SHIPPED_SETTINGS, read_run_config
from mtu.training.runs.settings_table import format_settings_page
from mtu.training.trainer_config import TrainerConfig

LEAST = "model: icons\noutput: x\nsteps: 3\n"


@pytest.fixture
def read(tmp_path):
    """Read the settings of a file with the given lines after the least ones."""

    def read(lines="", flags=None, least=LEAST):
        (tmp_path / "my.yaml").write_text(least + lines)
        return read_run_config(tmp_path / "my.yaml", flags)

    return read


def test_each_field_is_one_setting_with_a_sentence():
    parts = (RunConfig, TrainerConfig, MultiTaskConfig)
    names = {field.name for part in parts for field in dataclasses.fields(part)} - {"trainer", "objective"}
    assert set(settings_by_key()) == names
    assert all(setting.help.endswith(".") for setting in settings_by_key().values())


def test_the_page_of_settings_is_made_of_them():
    page = Path(__file__).parents[4] / "docs" / "training-settings.md"
    assert page.read_text(encoding="utf-8") == format_settings_page()


@pytest.mark.parametrize(
    ("lines", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a text to YAML
        ("checkpoint_every: 1e3", "checkpoint_every", 1000),
        ("ema_decay: null", "ema_decay", None),
        ("snr_gamma: none", "snr_gamma", None),
        ("betas: [0.8, 0.9]", "betas", (0.8, 0.9)),
        ("precision: no", "precision", "no"),  # false to YAML
        ("resolution: [64, 96]", "resolution", (64, 96)),
        ("resolution: 64", "resolution", 64),
        ("cache_directory: a/b", "cache_directory", Path("a/b")),
    ],
)
def test_values_get_the_type_of_their_setting(read, lines, key, value):
    config = read(lines)
    found = next(getattr(part, key) for part in (config.trainer, config.objective) if hasattr(part, key))
    assert found == value
    assert type(found) is type(value)


def test_data_tasks_and_upcycling(read):
    config = read(
        """
data:
  edit: some/folder
  remove: {icons: 5, split: test}
tasks: [edit, {name: remove, guidance_scale: 2.0}]
upcycle: {num_experts: 2}
"""
    )
    assert config.data == {"edit": DataSource(Path("some/folder")), "remove": DataSource(icons=5, split="test")}
    assert config.tasks == ("edit", {"name": "remove", "guidance_scale": 2.0})
    assert config.upcycle == UpcycleConfig(num_experts=2)


def test_one_seed_serves_all_parts(read):
    config = read("seed: 7")
    assert (config.trainer.seed, config.objective.seed, config.upcycle_seed) == (7, 7, 7)
    assert read("seed: 7\nupcycle: {seed: 1}").upcycle_seed == 1


# --------------------------------------------------------------------------------------------------------------- flags


def test_flags_replace_settings_of_the_file(read):
    flags = {"learning_rate": "1e-5", "betas": "0.5,0.6", "ema_decay": "null", "resolution": "32", "tasks": "edit"}
    config = read("learning_rate: 1\nema_decay: 0.9\ndata: {edit: a}", {**flags, "tensorboard": True})
    assert (config.trainer.learning_rate, config.trainer.betas, config.trainer.ema_decay) == (1e-5, (0.5, 0.6), None)
    assert (config.objective.resolution, config.tasks, config.trainer.tensorboard) == (32, ("edit",), True)


def test_flags_replace_keys_of_mappings_one_by_one(read):
    flags = {"data": {"remove": "icons:7"}, "upcycle": {"top_k": "1"}, "shares": {"edit": "2"}}
    config = read("data: {edit: a, remove: b}\nupcycle: {num_experts: 2}\nshares: {remove: 3}", flags)
    assert config.data == {"edit": DataSource(Path("a")), "remove": DataSource(icons=7)}
    assert config.upcycle == UpcycleConfig(num_experts=2, top_k=1)
    assert config.objective.shares == {"edit": 2.0, "remove": 3.0}


def test_a_length_on_the_command_line_replaces_that_of_the_file(read):
    least = "model: icons\noutput: x\n"
    assert read("epochs: 3", {"steps": "5"}, least).count_steps(100) == 5
    assert read("steps: 3", {"epochs": "2"}, least).count_steps(100) == 13  # ⌈2 · 100 / 16⌉


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("lerning_rate: 3", r"Line 4 of .*my\.yaml has the unknown key 'lerning_rate': .* 'learning_rate'\."),
        ("learning_rate: fast", r"learning_rate \(line 4 of .*my\.yaml\) must be a number, but got 'fast'\."),
        ("learning_rate: .nan", "must be a number, but got nan"),
        ("learning_rate: -1", "learning_rate must be a positive number"),
        ("steps: 4", r"gives 'steps' twice, in lines 3 and 4\."),
        ("epochs: 4", r"steps \(line 3 .*\) and epochs \(line 4 .*\) both give the length"),
        ("log_every: 2.5", "must be an integer, but got 2.5"),
        ("tensorboard: 1", "must be true or false, but got 1"),
        ("schedule: linear", "must be constant or cosine, but got 'linear'"),
        ("precision: fp16", "must be no or bf16, but got 'fp16'"),
        ("betas: [1]", "must be a list of 2 elements"),
        ("data: {edit: {foldr: a}}", "data .*: edit has no key 'foldr': the nearest known one is 'folder'"),
        ("data: {edit: {folder: a, icons: 3}}", "edit: expected either a folder or a number of icons"),
        ("data: 3", "must be a mapping"),
        ("upcycle: {num_expert: 3}", "has no key 'num_expert': the nearest known one is 'num_experts'"),
        ("validation: {examples: -1}", "validation .*: examples must be at least 0"),
        ("tasks: [edit]\ndata: {remove: x}", "Task 'edit' has no data"),
        ("tasks: [edt]\ndata: {edit: x}", "Task 'edt' has no data, .*: the nearest one is 'edit'"),
        ("tasks: [edit]\ndata: {edit: x, remove: x}", "data for 'remove', which is not among the tasks: expected edit"),
        ("data: {edit: x, edit: y}", r"gives 'edit' twice, in line 4\."),
        ("null: 3", r"Line 4 of .*my\.yaml has null as a key"),
        ("shares: {edi: 2}\ndata: {edit: x}", "shares names 'edi', which has no data"),
        ("frozen_dtype: bfloat16", "frozen_dtype: bfloat16 needs precision: bf16"),
        ("fully_shard: true\nloss_threads: 2", "fully_shard needs loss_threads: 1, but got 2"),
        ("prediction_type: epsilon\nrescale_betas_zero_snr: true", "prediction_type: epsilon needs a signal"),
        ("epochs: [", r"^Line 4 of .*my\.yaml is not YAML: expected the node content"),
        ("epochs: 2024-99-99", "my.yaml is not YAML: month must be in 1..12"),
    ],
)
def test_what_is_wrong_is_one_sentence(read, lines, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(lines)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": "x"}, "--batch-size must be an integer, but got 'x'"),
        ({"batch_siz": "1"}, "no setting 'batch_siz': the nearest known one is 'batch_size'"),
        ({"steps": "0"}, "steps must be an integer ≥ 1"),
        ({"steps": "1", "epochs": "1"}, "--steps and --epochs both give the length"),
        ({"upcycle": {"num_experts": "x"}}, "--upcycle num_experts must be an integer or null, but got 'x'"),
        ({"upcycle": {"experts": "2"}}, "--upcycle has no key 'experts'"),
        ({"validation": {"examples": "-1"}}, "--validation: examples must be at least 0"),
        ({"epochs": "0"}, "epochs must be a positive number"),
    ],
)
def test_flags_that_are_wrong(read, flags, message):
    with pytest.raises(ValueError, match=message):
        read("", flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: icons\noutput: x\n", "give steps or epochs"),
        ("output: x\nsteps: 3\n", "'model' is missing: give it as --model"),
        ("model: icons\nsteps: 3\n", "'output' is missing"),
        ("- 3", r"my\.yaml holds a list: expected lines of the form KEY: VALUE"),
        ("", r"my\.yaml is empty: expected lines of the form KEY: VALUE"),
    ],
)
def test_files_that_lack_something(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(least=text)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "my.yaml").write_bytes(LEAST.encode() + b"seed: \xff\n")
    with pytest.raises(ValueError, match=r"^Line 4 of .*my\.yaml is not UTF-8 text"):
        read_run_config(tmp_path / "my.yaml")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .* one of sd15, sdxl, icons"):
        read_run_config(tmp_path / "no.yaml")
    with pytest.raises(ValueError, match=r"There is no file .*config\.yaml"):
        read_run_config(tmp_path)


# --------------------------------------------------------------------------------------------------------------- files


def test_resolved_settings_are_a_file_that_says_the_same_from_anywhere(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read(
        "epochs: 2\ndata: {edit: a/b, remove: {icons: 3}}\ntasks: [{name: edit}, remove]",
        least="model: icons\noutput: x\n",
    )
    path, text = tmp_path / "resolved.yaml", config.to_yaml()
    path.write_text(text)
    monkeypatch.chdir(tmp_path.parent)
    again = read_run_config(path)
    assert again.to_yaml() == text
    assert again.output == Path(yaml.safe_load(text)["output"])
    assert set(yaml.safe_load(text)) == set(settings_by_key()) - {"steps"}
    assert yaml.safe_load(text)["data"] == {"edit": {"folder": str(tmp_path / "a/b")}, "remove": {"icons": 3}}


@pytest.mark.parametrize("name", SHIPPED_SETTINGS)
def test_shipped_settings_can_be_read(name):
    config = read_run_config(name, {"output": "x"})
    assert config.model == name


def test_the_shipped_settings_are_those_of_the_paper():
    sd15, sdxl = (read_run_config(name, {"output": "x"}) for name in ("sd15", "sdxl"))
    assert {(c.epochs, c.objective.batch_size, c.objective.resolution) for c in (sd15, sdxl)} == {(100.0, 128, 512)}
    assert (sd15.trainer.learning_rate, sd15.trainer.weight_decay, sd15.upcycle.num_experts) == (1e-4, 0.0, 4)
    assert (sdxl.trainer.learning_rate, sdxl.trainer.weight_decay, sdxl.upcycle.num_experts) == (5e-5, 0.01, 1)
