"""Saved parts: one task's rows, and the trained parameters alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mtu
from mtu import TaskSpec
from mtu.storage import _digest

from ..file_operations import CUTS, count_operations, run_cut_off
from ..outputs import assert_close, assert_differ, assert_unchanged, predict, snapshot
from ..tiny import FAMILIES, SDXL, inputs, randomise_, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"num_experts": 4, "top_k": 2}, id="top2"),
    pytest.param({"num_experts": 2, "expert_ratio": 0.75}, id="uneven"),
]


EDIT, TRAINED = "mtu_task.edit", "mtu_trained"


def tensors_of(folder, name):
    """The file of tensors that a description names."""
    return folder / json.loads((folder / f"{name}.json").read_text())["file"]


def as_earlier_versions_wrote(folder, name):
    """Rename files to the names of earlier versions, whose descriptions named no file."""
    stem = name.partition(".")[0]
    path = folder / f"{name}.json"
    description = json.loads(path.read_text())
    (folder / description.pop("file")).rename(folder / f"{stem}.safetensors")
    description["sha256"] = _digest(folder / f"{stem}.safetensors", description)
    path.unlink()
    (folder / f"{stem}.json").write_text(json.dumps(description))


def retrained(unet, name):
    """Train, as it were, what task `name` alone owns."""
    index = unet.task_index(name)
    for key, parameter in unet.named_trainable_parameters():
        if ".ff." not in key:
            randomise_([parameter.data[index : index + 1]], seed=len(key))
    return unet


# ------------------------------------------------------------------------------------------------------------- task


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_saved_task_comes_back(tmp_path, config, settings):
    unet = upcycled_unet(config, **settings)
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.save_task(tmp_path, "edit")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        tensors_of(tmp_path, "mtu_task.edit").name,
        "mtu_task.edit.json",
    ]
    unet.remove_task("edit")
    assert unet.load_task(tmp_path) == 3
    assert_close(predict(unet, given, *NAMES), expected)


def test_a_saved_task_holds_its_rows_alone(tmp_path):
    unet = upcycled_unet()
    unet.save_task(tmp_path, "text-to-image")
    tensors = load_file(tensors_of(tmp_path, "mtu_task.text-to-image"))
    assert tensors["conv_in.weight"].shape == (32, 4, 3, 3)
    assert tensors["task_embedding.weight"].shape == (16,)
    assert len(tensors) == 3 + 2 * len(unet.routed_feed_forwards())
    for name, tensor in tensors.items():
        own = unet.state_dict()[name][0]
        assert torch.equal(tensor, own[:, :4] if name == "conv_in.weight" else own)


@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_task_replaces_the_one_of_its_name(tmp_path, settings, dropped):
    source, unet = retrained(upcycled_unet(**settings), "edit"), upcycled_unet(**settings)
    given = inputs(unet)
    expected, before = predict(source, given, *NAMES), predict(unet, given, *NAMES)
    assert_differ(expected, before)
    for model in (source, unet):
        if dropped:
            model.drop_routers_()
    source.save_task(tmp_path, "edit")
    assert unet.load_task(tmp_path, replace=True) == 1
    assert torch.equal(predict(unet, given, *NAMES), expected)


def test_a_task_with_other_channels_and_settings(tmp_path):
    source, unet = upcycled_unet(), upcycled_unet()
    source.add_task(TaskSpec("depth", condition_channels=9, guidance="none", num_inference_steps=7), "remove")
    retrained(source, "depth").save_task(tmp_path, "depth")
    assert unet.load_task(tmp_path) == 4
    assert unet.tasks[4] == source.tasks[4]
    given = inputs(unet, channels=13)
    assert_close(predict(unet, given, "depth", *NAMES[1:]), predict(source, given, "depth", *NAMES[1:]))


@pytest.mark.slow
def test_a_float32_task_fits_a_bfloat16_model(tmp_path):
    upcycled_unet().save_task(tmp_path, "edit")
    unet = upcycled_unet().to(torch.bfloat16)
    unet.load_task(tmp_path, replace=True)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def edit_json(folder, change, name=EDIT, signed=True):
    """Change a description; `signed`: as another writer of the format would, with a digest that fits."""
    path = folder / f"{name}.json"
    description = json.loads(path.read_text())
    change(description)
    if signed:
        description["sha256"] = _digest(tensors_of(folder, name), description)
    path.write_text(json.dumps(description))


def flip_a_byte(folder, name=EDIT):
    path = tensors_of(folder, name)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(folder, name=EDIT):
    path = tensors_of(folder, name)
    path.write_bytes(path.read_bytes()[:-100])


def test_a_folder_holds_several_tasks(tmp_path):
    source, unet = retrained(retrained(upcycled_unet(), "edit"), "remove"), upcycled_unet()
    source.save_task(tmp_path, "edit")
    source.save_task(tmp_path, "remove")
    with pytest.raises(ValueError, match=r"holds the tasks \['edit', 'remove'\]: pass name="):
        unet.load_task(tmp_path, replace=True)
    with pytest.raises(ValueError, match=r"holds no task 'sing': it holds \['edit', 'remove'\]\.$"):
        unet.load_task(tmp_path, name="sing")
    given = inputs(unet)
    for name in ("edit", "remove"):
        unet.load_task(tmp_path, replace=True, name=name)
    assert torch.equal(predict(unet, given, *NAMES), predict(source, given, *NAMES))
    # Saving one anew leaves the other, and nothing of the older one.
    retrained(source, "text-to-image").save_task(tmp_path, "edit")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_task_of_an_earlier_version_loads_and_is_replaced_by_its_own_name_alone(tmp_path):
    source, unet = retrained(upcycled_unet(), "edit"), upcycled_unet()
    source.save_task(tmp_path, "edit")
    as_earlier_versions_wrote(tmp_path, EDIT)
    source.save_task(tmp_path, "remove")
    given = inputs(unet)
    unet.load_task(tmp_path, replace=True, name="edit")
    assert torch.equal(predict(unet, given, *NAMES), predict(source, given, *NAMES))
    source.save_task(tmp_path, "edit")
    assert not (tmp_path / "mtu_task.json").exists()
    assert not (tmp_path / "mtu_task.safetensors").exists()
    unet.load_task(tmp_path, replace=True, name="edit")


BROKEN_TASKS = [
    pytest.param(lambda f: flip_a_byte(f), "truncated or was altered", id="byte"),
    pytest.param(lambda f: truncate(f), "truncated or was altered", id="truncated"),
    pytest.param(
        lambda f: edit_json(f, lambda d: d["task"].update(guidance_scale=3.0), signed=False),
        "truncated or was altered",
        id="edited",
    ),
    pytest.param(lambda f: tensors_of(f, EDIT).unlink(), r"holds no mtu_task\.edit\.\w+\.safetensors", id="no_tensors"),
    pytest.param(lambda f: (f / f"{EDIT}.json").unlink(), "holds no mtu_task.json", id="no_json"),
    pytest.param(lambda f: (f / f"{EDIT}.json").write_text("{"), "not the JSON file that was saved", id="json"),
    pytest.param(lambda f: (f / f"{EDIT}.json").write_text("[]"), "lacks the entry", id="list"),
    pytest.param(lambda f: edit_json(f, lambda d: d.pop("architecture")), "lacks the entry 'architecture'", id="arch"),
    pytest.param(lambda f: edit_json(f, lambda d: d.update(task=None)), "described by the fields", id="null"),
    pytest.param(lambda f: edit_json(f, lambda d: d["task"].update(scale=0)), "scale must be", id="spec"),
    pytest.param(
        lambda f: edit_json(f, lambda d: d["task"].update(condition_channels=5)),
        r"must have shape .*9, 3, 3\)",
        id="c5",
    ),
    pytest.param(lambda f: None, "'edit' exists already: pass replace=True", id="exists"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_TASKS)
def test_a_bad_task_folder_raises_and_changes_nothing(tmp_path, damage, message):
    upcycled_unet().save_task(tmp_path, "edit")
    unet = retrained(upcycled_unet(), "edit")
    before = snapshot(unet)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        unet.load_task(tmp_path)
    assert_unchanged(unet, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2}, "experts = "),
        ({"norm": "task_expert"}, "experts = "),
        ({"config": SDXL, "num_experts": 4}, "belongs to another architecture"),
        ({"drop": True}, "routers_dropped = False"),
    ],
    ids=str,
)
def test_a_task_of_another_architecture_raises_and_changes_nothing(tmp_path, settings, message):
    upcycled_unet().save_task(tmp_path, "edit")
    dropped = settings.get("drop", False)
    unet = upcycled_unet(**{k: v for k, v in settings.items() if k != "drop"})
    if dropped:
        unet.drop_routers_()
    before = snapshot(unet)
    with pytest.raises(ValueError, match=message):
        unet.load_task(tmp_path, replace=True)
    assert_unchanged(unet, before)


def test_a_task_of_other_channels_does_not_replace(tmp_path):
    source, unet = upcycled_unet(), upcycled_unet()
    source.remove_task("edit")
    source.add_task(TaskSpec("edit", condition_channels=2))
    source.save_task(tmp_path, "edit")
    before = snapshot(unet)
    with pytest.raises(ValueError, match="'edit' has 4 condition channels here, but 2"):
        unet.load_task(tmp_path, replace=True)
    assert_unchanged(unet, before)


def test_saving_to_a_file_or_an_unknown_task_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, but a folder"):
        upcycled_unet().save_task(tmp_path / "file", "edit")
    with pytest.raises(ValueError, match="Unknown task"):
        upcycled_unet().save_task(tmp_path / "new", "paint")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------- trained


@pytest.mark.slow
@pytest.mark.parametrize(("save", "load"), [("save_trained", "load_trained"), ("save_task", "load_task")])
def test_saving_over_an_older_one_may_be_cut_off_anywhere(tmp_path, monkeypatch, save, load):
    """The older or the newer loads; `tests.mtu.test_storage` tells the kinds of cuts apart."""
    old, new = upcycled_unet(), upcycled_unet()
    new.conv_in.bias.data += 1

    def write(unet, folder):
        unet.save_task(folder, "edit") if save == "save_task" else unet.save_trained(folder)

    def read(folder):
        if load == "load_trained":
            return mtu.load_trained(stock_unet(), folder).conv_in.bias[1]
        target = upcycled_unet()
        target.load_task(folder, replace=True)
        return target.conv_in.bias[1]

    write(old, tmp_path / "count")
    found = []
    for operation in range(count_operations(monkeypatch, lambda: write(new, tmp_path / "count"))):
        folder = tmp_path / str(operation)
        write(old, folder)
        run_cut_off(monkeypatch, lambda folder=folder: write(new, folder), operation, CUTS[0])
        loaded = read(folder)
        found.append([torch.equal(loaded, unet.conv_in.bias[1]) for unet in (old, new)])
    assert found == sorted(found, reverse=True)
    assert [True, False] in found
    assert [False, True] in found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_trained_parameters_over_the_same_base(tmp_path, config, settings):
    unet = upcycled_unet(config, **settings)
    unet.add_task(TaskSpec("depth", condition_channels=6), "edit")
    unet.save_trained(tmp_path)
    saved = load_file(tensors_of(tmp_path, TRAINED))
    assert saved.keys() == {name for name, _ in unet.named_trainable_parameters()}
    base = stock_unet(config)
    addresses = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    loaded = mtu.load_trained(base, tmp_path, backend="eager")
    given = inputs(unet, channels=10)
    unet.set_backend("eager")
    assert torch.equal(predict(loaded, given, *NAMES), predict(unet, given, *NAMES))
    assert loaded.tasks == unet.tasks
    assert loaded.conv_out.weight.data_ptr() == addresses["conv_out.weight"]
    assert loaded.routed_feed_forwards()[0].backend == "eager"
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == saved.keys()


def test_trained_parameters_of_an_earlier_version(tmp_path):
    unet = upcycled_unet()
    unet.save_trained(tmp_path)
    as_earlier_versions_wrote(tmp_path, TRAINED)
    given = inputs(unet)
    loaded = mtu.load_trained(stock_unet(), tmp_path)
    assert torch.equal(predict(loaded, given, *NAMES), predict(unet, given, *NAMES))
    unet.save_trained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_trained_parameters_take_the_type_of_the_base(tmp_path):
    upcycled_unet().save_trained(tmp_path)
    loaded = mtu.load_trained(stock_unet().to(torch.bfloat16), tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


BROKEN_TRAINED = [
    pytest.param(lambda f: flip_a_byte(f, TRAINED), "truncated or was altered", id="byte"),
    pytest.param(lambda f: truncate(f, TRAINED), "truncated or was altered", id="truncated"),
    pytest.param(
        lambda f: edit_json(f, lambda d: d["experts"].update(routing_scale=1.0), TRAINED, signed=False),
        "truncated or was altered",
        id="edited",
    ),
    pytest.param(lambda f: (f / f"{TRAINED}.json").unlink(), "holds no mtu_trained.json", id="no_json"),
    pytest.param(lambda f: tensors_of(f, TRAINED).unlink(), r"holds no mtu_trained\.\w+\.safe", id="no_tensors"),
    pytest.param(lambda f: edit_json(f, lambda d: d["tasks"].pop(), TRAINED), "must have shape", id="tasks"),
    pytest.param(lambda f: edit_json(f, lambda d: d.update(tasks=[]), TRAINED), "at least one task", id="no_tasks"),
    pytest.param(
        lambda f: edit_json(f, lambda d: d["experts"].update(num_experts=2), TRAINED),
        "must have shape",
        id="experts",
    ),
    pytest.param(
        lambda f: edit_json(f, lambda d: d["experts"].update(colour=2), TRAINED), "no expert layout", id="field"
    ),
    pytest.param(
        lambda f: edit_json(f, lambda d: d["base"].update(layers_per_block=2), TRAINED),
        "another architecture",
        id="b",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_TRAINED)
def test_bad_trained_parameters_raise_and_spare_the_base(tmp_path, damage, message):
    upcycled_unet().save_trained(tmp_path)
    damage(tmp_path)
    base = stock_unet()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        mtu.load_trained(base, tmp_path)
    assert_unchanged(base, before)


@pytest.mark.parametrize("config", [SDXL, {**FAMILIES["sd"], "layers_per_block": 2}], ids=["sdxl", "deeper"])
def test_another_base_raises(tmp_path, config):
    upcycled_unet().save_trained(tmp_path)
    with pytest.raises(ValueError, match="belongs to another architecture"):
        mtu.load_trained(stock_unet(config), tmp_path)


def test_trained_parameters_include_the_routers(tmp_path):
    unet = upcycled_unet()
    unet.drop_routers_()
    with pytest.raises(ValueError, match="include the routers, which were dropped"):
        unet.save_trained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_trained_parameters_over_an_upcycled_model_raise(tmp_path):
    unet = upcycled_unet()
    unet.save_trained(tmp_path)
    with pytest.raises(ValueError, match="upcycled already"):
        mtu.load_trained(unet, tmp_path)
    with pytest.raises(ValueError, match="no backend"):
        mtu.load_trained(stock_unet(), tmp_path, backend="fast")
