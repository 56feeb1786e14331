"""Where multi-task pipelines come from besides `mtu.upcycle`: the Hub, other pipelines, trained parameters."""

import json
import types

import diffusers.pipelines.pipeline_utils as loading
import pytest
import torch
from diffusers import StableDiffusionPipeline

import mtu
from tests.mtu.pipelines.mixed_batches import assert_same, noise

GIVEN = {"latents": noise(1), "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(folder)`: a folder stands for the repository "user/repo"; its list holds what diffusers asked for."""
    asked = []

    def stand_in(folder):
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

        def snapshot(repo, **given):
            asked.append(given)
            return str(folder)

        def file(repo, name, **given):
            asked.append(given)
            return str(folder / name)

        siblings = [types.SimpleNamespace(rfilename=name) for name in names]
        monkeypatch.setattr(loading, "model_info", lambda *a, **k: types.SimpleNamespace(siblings=siblings))
        monkeypatch.setattr(loading, "hf_hub_download", file)
        monkeypatch.setattr(loading, "snapshot_download", snapshot)
        monkeypatch.setattr(loading, "_resolve_revision", lambda *a, revision=None, **k: revision)
        return asked

    return stand_in


def run(pipe, **given):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red bell", **{**GIVEN, **given}).images


def test_a_repository_loads_as_its_folder_does(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path)
    asked = hub(tmp_path)
    loaded = mtu.MTUPipeline.from_pretrained("user/repo", revision="v2", cache_dir="there", token="secret")
    assert type(loaded) is mtu.MTUPipeline
    assert type(loaded.unet) is mtu.MTUUNet2DConditionModel
    assert loaded.unet.config.tasks == pipe.unet.config.tasks
    assert torch.equal(run(loaded), run(pipe))
    given = {"revision": "v2", "cache_dir": "there", "token": "secret"}
    assert asked
    assert all(call[name] == value for call in asked for name, value in given.items())


def test_a_repository_with_variants(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    hub(tmp_path)
    loaded = mtu.MTUPipeline.from_pretrained("user/repo", variant="fp16")
    assert torch.equal(run(loaded), run(pipe))


def test_a_repository_that_is_not_in_the_cache(pipe, hub, tmp_path, monkeypatch):
    """The UNet's files are asked for by name, and no pickled ones."""
    pipe.save_pretrained(tmp_path)
    asked = hub(tmp_path)
    (tmp_path / "unet" / "pickled.bin").touch()
    mtu.MTUPipeline.download("user/repo", force_download=True)
    (patterns,) = [call for call in asked if "allow_patterns" in call]
    assert {"unet/diffusion_pytorch_model.safetensors", "unet/config.json"} <= set(patterns["allow_patterns"])
    assert "*.bin" in patterns["ignore_patterns"]


def test_a_repository_of_a_stock_pipeline_is_told_how_to_go_on(stock, hub, tmp_path):
    stock.save_pretrained(tmp_path)
    hub(tmp_path)
    loaded = mtu.MTUPipeline.from_pretrained("user/repo")
    with pytest.raises(ValueError, match=r"upcycled UNet is needed: mtu.upcycle\(pipe\)"):
        loaded("a red bell")
    assert type(mtu.upcycle(loaded).unet) is mtu.MTUUNet2DConditionModel


def test_a_repository_without_weights(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    hub(tmp_path)
    with pytest.raises(ValueError, match="not a complete checkpoint of an upcycled UNet"):
        mtu.MTUPipeline.from_pretrained("user/repo")


@pytest.mark.parametrize("load", [mtu.MTUPipeline.from_pretrained, mtu.MTUPipeline.download])
def test_pickled_files_are_never_asked_for(load):
    with pytest.raises(ValueError, match="Only safetensors files are loaded"):
        load("user/repo", use_safetensors=False)


# ------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("given", [{"safe_serialization": False}, {"use_flashpack": True}])
def test_a_format_that_cannot_be_saved_is_refused_before_any_part_is_written(pipe, tmp_path, given):
    with pytest.raises(ValueError, match="Only safetensors files are saved"):
        pipe.save_pretrained(tmp_path / "model", **given)
    assert not (tmp_path / "model").exists()


def test_a_pipeline_with_a_stock_unet_is_not_saved_as_a_multi_task_one(stock, tmp_path):
    made = mtu.MTUPipeline.from_pipe(stock)
    for refused in (lambda: made.save_pretrained(tmp_path / "model"), lambda: made.export_task("edit")):
        with pytest.raises(ValueError, match=r"an upcycled UNet is needed: mtu.upcycle\(pipe\)"):
            refused()
    assert not (tmp_path / "model").exists()


def test_the_card_is_that_of_the_model_that_was_saved_last(pipe, tmp_path):
    card = tmp_path / "README.md"
    pipe.save_pretrained(tmp_path)
    assert "`edit`" in card.read_text()
    pipe.unet.remove_task("edit")
    pipe.save_pretrained(tmp_path)
    assert "`edit`" not in card.read_text()
    card.write_text("# Mein Modell, größer\n", encoding="latin-1")
    pipe.save_pretrained(tmp_path)
    assert card.read_text(encoding="latin-1") == "# Mein Modell, größer\n"


# --------------------------------------------------------------------------------------------------- other pipelines


def test_a_folder_opened_by_the_stock_class_becomes_a_multi_task_pipeline(pipe, tmp_path):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"upcycled already: mtu.MTUPipeline.from_pipe\(pipe\) makes"):
        mtu.upcycle(opened)
    made = mtu.MTUPipeline.from_pipe(opened)
    assert type(made) is mtu.MTUPipeline
    assert made.unet is opened.unet
    assert made.vae is opened.vae
    assert torch.equal(run(made), expected)


def test_a_stock_pipeline_of_a_multi_task_one(pipe):
    """As diffusers says where it refuses a UNet of another class."""
    with pytest.raises(ValueError, match="expected"):
        StableDiffusionPipeline.from_pipe(pipe)
    made = StableDiffusionPipeline.from_pipe(pipe, unet=pipe.unet)
    assert type(made) is StableDiffusionPipeline
    assert_same(run(made, guidance_scale=7.5), run(pipe))


def test_another_unet_is_given_to_from_pipe(pipe, stock):
    assert mtu.MTUPipeline.from_pipe(pipe, unet=stock.unet).unet is stock.unet


# ---------------------------------------------------------------------------------------------- settings of pipelines


@pytest.mark.slow
def test_trained_parameters_make_a_pipeline(pipe, stock, tmp_path):
    pipe.unet.save_trained(tmp_path)
    made = mtu.load_trained(stock, tmp_path)
    assert type(made) is mtu.MTUPipeline
    assert made.vae is stock.vae
    assert torch.equal(run(made), run(pipe))
    with pytest.raises(TypeError, match="load_trained takes a UNet or a StableDiffusionPipeline, but got a "):
        mtu.load_trained(pipe.export_task("edit"), tmp_path)


@pytest.mark.parametrize("how", ["upcycle", "load_trained", "export_task"])
def test_settings_of_a_pipeline_are_carried_over(pipe, stock, tmp_path, how):
    source = pipe if how == "export_task" else stock
    source.set_progress_bar_config(disable=True, leave=False)
    source.image_processor = type(source.image_processor)(vae_scale_factor=2, do_normalize=False)
    source.fusing_vae = True
    source.model_cpu_offload_seq = "unet->vae"
    source.register_to_config(_name_or_path="user/base", _note="mine")
    source.vae.enable_slicing()
    pipe.unet.save_trained(tmp_path)
    made = {
        "upcycle": lambda: mtu.upcycle(stock),
        "load_trained": lambda: mtu.load_trained(stock, tmp_path),
        "export_task": lambda: pipe.export_task("edit"),
    }[how]()
    assert made._progress_bar_config == {"disable": True, "leave": False}
    assert made.image_processor is source.image_processor
    assert made.fusing_vae
    assert made.model_cpu_offload_seq == "unet->vae"
    assert (made.config._name_or_path, made.config._note) == ("user/base", "mine")
    assert made.config.requires_safety_checker is False
    assert made.vae.use_slicing
    made.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == type(made).__name__


@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offloaded_pipelines_are_refused(pipe, stock, tmp_path, how):
    pipe.unet.save_trained(tmp_path)
    for one in (pipe, stock):
        if how == "group":
            one.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
        else:
            getattr(one, f"enable_{how}_cpu_offload")(device="cpu")
    before = dict(pipe.components), dict(stock.components)
    for convert in (
        lambda: pipe.export_task("edit"),
        lambda: mtu.upcycle(stock),
        lambda: mtu.load_trained(stock, tmp_path),
    ):
        with pytest.raises(ValueError, match="A pipeline that is not offloaded is needed"):
            convert()
    assert (dict(pipe.components), dict(stock.components)) == before
    if how != "group":
        pipe.remove_all_hooks()
        assert torch.isfinite(run(pipe.export_task("text-to-image"))).all()
