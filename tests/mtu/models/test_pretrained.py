"""Whole checkpoints: same output after loading, and strictness."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mtu import MTUUNet2DConditionModel

from ..file_operations import CUTS, count_operations, run_cut_off
from ..outputs import predict
from ..tiny import FAMILIES, inputs, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = [
    pytest.param({}, id="dense"),
    pytest.param({"norm": "task_expert"}, id="expert_norms"),
    pytest.param({"num_experts": 4, "top_k": 2}, id="top2"),
    pytest.param({"num_experts": 2, "expert_ratio": 0.75}, id="uneven"),
]


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    """Nothing here may be written or read by pickle."""

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.save or torch.load was called")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)


@pytest.fixture
def folder(tmp_path):
    upcycled_unet().save_pretrained(tmp_path)
    return tmp_path


def load(path, **kwargs):
    return MTUUNet2DConditionModel.from_pretrained(path, **kwargs)


def edit_config(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "removed"}))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_loaded_model_gives_the_same_bits(tmp_path, config, settings, dtype, dropped):
    unet = upcycled_unet(config, **settings).to(dtype)
    if dropped:
        unet.drop_routers_()
    given = inputs(unet)
    expected = predict(unet, given, *NAMES)
    unet.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    loaded = load(tmp_path, torch_dtype=dtype)
    assert type(loaded) is MTUUNet2DConditionModel
    assert (loaded.tasks, loaded.expert_config) == (unet.tasks, unet.expert_config)
    assert not loaded.training
    assert torch.equal(predict(loaded, given, *NAMES), expected)
    for (name, tensor), (other_name, other) in zip(unet.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert (name, tensor.dtype) == (other_name, other.dtype)
        assert torch.equal(tensor, other), name


def test_what_is_trained_and_what_frozen_survives_loading(folder):
    unet, loaded = upcycled_unet(), load(folder)
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert len(trainable) < len(list(loaded.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": False},
        {"low_cpu_mem_usage": True},
        {"device_map": {"": "cpu"}},
        {"use_safetensors": True},
        {"use_safetensors": None},
        {"subfolder": "unet"},
    ],
    ids=str,
)
def test_the_usual_ways_of_loading(tmp_path, options):
    unet = upcycled_unet()
    unet.save_pretrained(tmp_path / options.get("subfolder", ""))
    loaded, info = load(str(tmp_path), output_loading_info=True, **options)
    assert not info["missing_keys"]
    given = inputs(unet)
    assert torch.equal(predict(loaded, given, *NAMES), predict(unet, given, *NAMES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", [True, False])
def test_a_routing_table_is_not_rounded_by_loading_in_low_precision(tmp_path, dtype, low):
    unet = upcycled_unet(top_k=2, num_experts=4)
    unet.drop_routers_()
    unet.save_pretrained(tmp_path)
    loaded = load(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.router_weights(), unet.router_weights())


def test_a_sharded_checkpoint_and_a_variant(tmp_path):
    unet = upcycled_unet()
    given = inputs(unet)
    unet.save_pretrained(tmp_path, max_shard_size="200KB", variant="ema")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(predict(load(tmp_path, variant="ema"), given, *NAMES), predict(unet, given, *NAMES))


def test_saving_over_another_checkpoint(folder):
    unet = upcycled_unet(num_experts=2)
    unet.save_pretrained(folder)
    assert load(folder).config.num_experts == 2


@pytest.mark.slow
@pytest.mark.parametrize("shards", [("200KB", "10GB"), ("200KB", "400KB"), ("400KB", "200KB"), ("10GB", "200KB")])
@pytest.mark.parametrize("variant", [None, "ema"])
def test_saving_over_another_number_of_shards(tmp_path, shards, variant):
    """Also the shards and the index of a stock UNet."""
    stock_unet().save_pretrained(tmp_path, max_shard_size=shards[0], variant=variant)
    (tmp_path / "notes.txt").write_text("mine")
    unet, given = upcycled_unet(), inputs(upcycled_unet())
    unet.save_pretrained(tmp_path, max_shard_size=shards[1], variant=variant)
    assert torch.equal(predict(load(tmp_path, variant=variant), given, *NAMES), predict(unet, given, *NAMES))
    unet.save_pretrained(tmp_path / "fresh", max_shard_size=shards[1], variant=variant)
    names = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names | {"notes.txt", "fresh"}


@pytest.mark.slow
@pytest.mark.parametrize(("old_shards", "new_shards"), [("900KB", "10GB"), ("10GB", "900KB")])
def test_saving_may_be_cut_off_anywhere(tmp_path, monkeypatch, old_shards, new_shards):
    """Over a model of another layout, whose tensors do not fit the newer configuration.

    Every few operations: `tests.mtu.test_storage` goes through all of them.
    """
    old, new = upcycled_unet(num_experts=2, norm="task_expert"), upcycled_unet()

    def write(folder):
        new.save_pretrained(folder, max_shard_size=new_shards)

    old.save_pretrained(tmp_path / "count", max_shard_size=old_shards)
    found = []
    for operation in range(0, count_operations(monkeypatch, lambda: write(tmp_path / "count")), 4):
        folder = tmp_path / str(operation)
        old.save_pretrained(folder, max_shard_size=old_shards)
        run_cut_off(monkeypatch, lambda folder=folder: write(folder), operation, CUTS[0])
        found.append(load(folder).config.num_experts)
    assert found == sorted(found)
    assert set(found) == {2, 4}
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "count").iterdir()}


def test_another_variant_stays(folder):
    upcycled_unet().save_pretrained(folder, variant="ema")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", WEIGHTS, "diffusion_pytorch_model.ema.safetensors"
    }  # fmt: skip


def test_uploads_are_named_by_the_folder_and_other_processes_stay_out_of_the_way(tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr("diffusers.models.modeling_utils.create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("diffusers.models.modeling_utils.load_or_create_model_card", lambda *_, **__: ModelCard("card"))
    monkeypatch.setattr("diffusers.models.modeling_utils.populate_model_card", lambda card: card)
    monkeypatch.setattr(MTUUNet2DConditionModel, "_upload_folder", lambda self, folder, name, **_: uploads.append(
        (name, sorted(os.listdir(folder)))))  # fmt: skip
    upcycled_unet().save_pretrained(str(tmp_path / "mine"), push_to_hub=True)
    assert uploads == [("mine", ["README.md", "config.json", WEIGHTS])]
    assert sorted(os.listdir(tmp_path / "mine")) == ["README.md", "config.json", WEIGHTS]
    upcycled_unet().save_pretrained(tmp_path / "other", is_main_process=False)
    assert os.listdir(tmp_path / "other") == [WEIGHTS]


def test_saving_to_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, but a folder"):
        upcycled_unet().save_pretrained(tmp_path / "file")


def test_pickle_is_refused_on_both_sides(folder):
    for arguments, named in (((folder, True, None, False), {}), ((folder,), {"safe_serialization": False})):
        with pytest.raises(ValueError, match="Only safetensors files are saved"):
            upcycled_unet().save_pretrained(*arguments, **named)
    with pytest.raises(ValueError, match="Only safetensors files are loaded"):
        load(folder, use_safetensors=False)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named diffusion_pytorch_model.safetensors"):
        load(folder)


def test_an_index_cannot_bring_pickle_in(tmp_path):
    upcycled_unet().save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "shard.bin")
    index.write_text(index.read_text().replace(shard.name, "shard.bin"))
    with pytest.raises(ValueError, match=r"only safetensors files are loaded, but .* names 'shard.bin'"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------- strictness

BROKEN_TENSORS = [
    (lambda t: t.pop("mid_block.resnets.0.conv1.weight"), "1 missing tensors, for example mid_block.resnets.0.conv1"),
    (lambda t: t.pop("task_embedding.weight"), "1 missing tensors, for example task_embedding"),
    (lambda t: t.update(extra=torch.ones(1)), "1 unexpected tensors, for example extra"),
    (lambda t: t.update({"task_embedding.weight": torch.ones(5, 16)}), r"task_embedding.weight .*\[5, 16\]"),
    (lambda t: t.update({"conv_norm_out.bias": torch.ones(5)}), r"conv_norm_out.bias .*\[5\]"),
    (lambda t: [t.pop(key) for key in list(t) if "router" in key], "missing tensors"),
    (lambda t: t.clear() or t.update(a=torch.ones(1)), "missing tensors"),
]


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize(("change", "message"), BROKEN_TENSORS, ids=range(len(BROKEN_TENSORS)))
def test_wrong_tensors_raise(folder, change, message, low):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, low_cpu_mem_usage=low)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 2},
        {"num_experts": 2, "expert_ratio": 0.5},
        {"expert_ratio": 0.5},
        {"norm": "task_expert"},
        {"router_width": 32},
        {"routers_dropped": True},
        {"tasks": ["edit"]},
        {"tasks": []},
        {"tasks": None},
        {"tasks": [{"name": "Bad Name"}]},
        {"num_experts": "four"},
        {"num_experts": "removed"},
        {"routing_scale": None},
        {"top_k": 9},
        {"cross_attention_dim": 24},
        {"layers_per_block": 2},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_raises(folder, changes, low):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=r"checkpoint of (another architecture|an upcycled UNet)") as caught:
        load(folder, low_cpu_mem_usage=low)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0, 4, 1000, -1])
def test_a_truncated_file_raises(folder, part):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:part])
    with pytest.raises(ValueError, match="not a complete checkpoint of an upcycled UNet"):
        load(folder)


def test_files_of_another_kind_raise(folder):
    (folder / WEIGHTS).write_bytes(b"\x80\x04\x95pickled" * 100)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json"):
        load(folder)


def test_a_missing_shard_raises(tmp_path):
    upcycled_unet().save_pretrained(tmp_path, max_shard_size="200KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match="does not appear to have a file named"):
        load(tmp_path)


def test_a_stock_folder_raises_and_says_what_to_do(tmp_path):
    stock_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a UNet2DConditionModel, .* pass it to mtu.upcycle"):
        load(tmp_path)


def test_a_folder_that_is_not_there_raises(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere", local_files_only=True)
