"""What mtu relies on beyond the public interfaces of diffusers is still so: a test for each entry, by its name."""

import ast
import functools
import inspect
import json
import re
import types
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.hub_utils import load_or_create_model_card
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import mtu
from mtu.compat.private_interfaces import (
    CHUNK_ATTRIBUTES,
    CLASS_ATTRIBUTES,
    FUSED_ATTRIBUTES,
    FUSED_PROJECTIONS,
    PRIVATE_INTERFACES,
    RUNTIME_ATTRIBUTES,
    SAVED_KEYS,
    StockIndex,
    chunk_settings,
    expand_block_scales,
    has_accelerate_hook,
    has_diffusers_hook,
    is_adapter,
    is_cast,
    is_generated_card,
    is_grouped,
    is_offloaded,
    is_own_of_adapter,
    pipeline_settings,
    progress_bar_settings,
    retrieve_latents,
    retrieve_timesteps,
    tensors_on_disk,
    weight_maps,
    weights_return,
)
from tests.mtu.pipelines.conftest import stock_pipeline
from tests.mtu.tiny import SD, stock_unet, upcycled_unet

PACKAGE = Path(mtu.__file__).parent
# Where other modules use private names, as `PRIVATE_INTERFACES` says: attributes of their own classes, attributes that
# callbacks set, and entries of configurations.
CALL_SETTINGS = {"_guidance_scale", "_image_guidance_scale", "_guidance_rescale"}
ELSEWHERE = {
    "models/unet.py": CLASS_ATTRIBUTES,
    "models/ffn.py": CHUNK_ATTRIBUTES,
    "pipelines/stable_diffusion.py": {
        *CALL_SETTINGS,
        "_callback_tensor_inputs",
        "_upload_folder",
        "_clip_skip",
        "_cross_attention_kwargs",
        "_execution_device",
        "_interrupt",
        "_num_timesteps",
    },
    "pipelines/callbacks.py": CALL_SETTINGS,
    "pipelines/conversion.py": {"_class_name", "_diffusers_version", "_module"},
    "inspection/inspected_model.py": {"_class_name"},
    "models/pretrained.py": {"_class_name"},
    "runtime/compiling.py": {"_compiled_call_impl"},
    "upcycling.py": {"_compiled_call_impl"},
    "compat/plain_linear.py": {"_compiled_call_impl"},
}


def of_private_interface(test):
    """Have a test say, however it fails, which of `PRIVATE_INTERFACES` a package has left."""

    @functools.wraps(test)
    def checked(*args, **kwargs):
        name = test.__name__.removeprefix("test_")
        try:
            return test(*args, **kwargs)
        except Exception as error:
            raise AssertionError(f"Not so any more, {name}: {PRIVATE_INTERFACES[name]}") from error

    return checked


@pytest.mark.parametrize("name", PRIVATE_INTERFACES)
def test_each_private_interface_has_a_test_and_a_version(name):
    assert hasattr(globals()[f"test_{name}"], "__wrapped__"), "its test is not marked as `of_private_interface`"
    assert re.search(r"Seen in (diffusers|accelerate|peft) \d+\.\d+\.\d+[^.]*(\.\d+)*\.$", PRIVATE_INTERFACES[name])


NAMED = set(re.findall(r"\b_[a-z]\w+", " ".join(PRIVATE_INTERFACES.values())))


def private_names(path):
    """The private names that a module reads, sets, asks for by a string, or imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Call):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        elif isinstance(node, ast.Constant) and node.value in NAMED:
            names = [node.value]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("diffusers", "accelerate", "peft")):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if re.fullmatch(r"_[a-z]\w*", name))


def own_names():
    """What classes and modules of mtu define."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.attr if isinstance(node, ast.Attribute) else node.id


def test_private_names_are_in_the_one_place_that_names_them():
    of_torch = {*dir(nn.Module), *vars(nn.Module()), *dir(Tensor), *dir(torch), "_post_accumulate_grad_hooks"}
    of_tuples = {"_asdict", "_fields", "_replace"}
    known = ({*own_names(), *of_torch} - NAMED) | of_tuples
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        used = set(private_names(path)) - known
        if where != "compat/private_interfaces.py":
            assert used == ELSEWHERE.get(where, set()), f"{where}: private names belong in private_interfaces.py"


@of_private_interface
def test_block_scales():
    (scales,) = expand_block_scales(stock_unet(SD), [{"down": 0.5, "up": {"block_1": [0.1, 0.2]}}])
    attentions = {"down_blocks.0": [0.5], "mid_block": [1.0], "up_blocks.1": [0.1, 0.2]}
    assert scales == {f"{name}.attentions.{i}": v for name, values in attentions.items() for i, v in enumerate(values)}
    assert expand_block_scales(stock_unet(SD), [None, 0.3]) == [1.0, 0.3]


@of_private_interface
def test_call_settings():
    text, edit = StableDiffusionPipeline, StableDiffusionInstructPix2PixPipeline
    read = {text: "interrupt guidance_scale guidance_rescale", edit: "guidance_scale image_guidance_scale"}
    expected = {"interrupt": 3, "guidance_scale": 2.0, "guidance_rescale": 4, "image_guidance_scale": 1.0}
    pipe = types.SimpleNamespace(**{f"_{name}": value for name, value in expected.items()}, **expected)
    pipe.unet, expected["do_classifier_free_guidance"] = stock_unet(SD), True
    for cls, names in read.items():
        for name in [*names.split(), "do_classifier_free_guidance"]:
            loop = inspect.getsource(cls.__call__).partition("Denoising loop")[2]
            assert f"self.{name}" in loop
            assert getattr(cls, name).fget(pipe) == expected[name]


@of_private_interface
def test_constructor_signature():
    own, stock = (
        set(inspect.signature(cls.__init__).parameters) for cls in (mtu.MTUUNet2DConditionModel, UNet2DConditionModel)
    )
    assert stock < own
    assert (own - {"self"}) <= set(upcycled_unet(SD).config)


@of_private_interface
def test_hub_download(tmp_path):
    """If diffusers knows mtu one day, or reads the index in another way, `StockIndex` can go or must change."""
    assert "mtu" not in LOADABLE_CLASSES
    assert "cls._dict_from_json_file(config_file)" in inspect.getsource(DiffusionPipeline.download)
    index = {
        "_class_name": "MTUPipeline",
        "unet": ["mtu", "MTUUNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    stock = ["diffusers", "UNet2DConditionModel"]
    assert StockIndex._dict_from_json_file(tmp_path / "model_index.json") == {**index, "unet": stock}


@of_private_interface
def test_model_offload():
    pipe = stock_pipeline()
    assert not is_offloaded(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe._all_hooks
    assert is_offloaded(pipe)
    pipe.remove_all_hooks()
    assert not is_offloaded(pipe)
    pipe.unet.enable_group_offload("cpu", "cpu", "leaf_level")
    assert is_offloaded(pipe)


@of_private_interface
def test_pipeline_settings():
    pipe = stock_pipeline()
    names = {"_is_unet_config_sample_size_int", "vae_scale_factor", "image_processor", "_progress_bar_config"}
    assert pipeline_settings(pipe).keys() == names


def new_attributes(change):
    """What a change adds to the attributes of the modules of a UNet, and to its state dict."""
    unet = stock_unet(SD)
    before = {module: set(vars(module)) for module in unet.modules()}
    keys = set(unet.state_dict())
    change(unet)
    added = {name for module, names in before.items() for name in set(vars(module)) - names}
    return unet, added, set(unet.state_dict()) - keys


@of_private_interface
def test_fused_projections():
    unet, attributes, keys = new_attributes(lambda unet: unet.fuse_qkv_projections())
    assert keys
    assert all(any(part in key for part in FUSED_PROJECTIONS) for key in keys)
    assert attributes <= FUSED_ATTRIBUTES
    assert all(module.fused_projections for module in unet.modules() if hasattr(module, "to_qkv"))
    unet.unfuse_qkv_projections()
    assert keys <= set(unet.state_dict()), "unfusing takes the copies away now: unfused_state is needed no more"


@of_private_interface
def test_runtime_attributes():
    ways = [
        lambda unet: accelerate.cpu_offload(unet, "cpu"),
        lambda unet: unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
        lambda unet: unet.enable_group_offload("cpu", "cpu", "leaf_level"),
        lambda unet: unet.mid_block.compile(),
    ]
    for way in ways:
        assert new_attributes(way)[1] <= RUNTIME_ATTRIBUTES


@of_private_interface
def test_chunks():
    block = stock_unet(SD).mid_block.attentions[0].transformer_blocks[0]
    assert chunk_settings(block) == (None, 0)
    block.set_chunk_feed_forward(8, dim=1)
    assert chunk_settings(block) == (8, 1)
    assert set(vars(block)) >= CHUNK_ATTRIBUTES


@of_private_interface
def test_generated_card(monkeypatch):
    def not_found(*args, **kwargs):
        raise EntryNotFoundError("none")

    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", not_found)
    for is_pipeline in (True, False):
        text = load_or_create_model_card("user/repo", is_pipeline=is_pipeline).text
        assert is_generated_card(text)
        assert not is_generated_card(text + "By us.")
    assert "working_dir" in inspect.signature(DiffusionPipeline._upload_folder).parameters


@of_private_interface
def test_accelerate_hooks():
    unet = stock_unet(SD)
    weight = unet.conv_out.weight.detach()
    assert not list(weight_maps(unet.conv_out))
    accelerate.cpu_offload(unet, "cpu")
    layer = unet.conv_out
    assert has_accelerate_hook(layer)
    assert layer.weight.is_meta
    (weights,) = weight_maps(layer)
    assert torch.equal(weights["weight"], weight)
    assert weights_return(layer)
    accelerate.hooks.remove_hook_from_module(unet, recurse=True)
    assert torch.equal(layer.weight, weight)
    accelerate.cpu_offload(unet.to("meta"), "cpu", state_dict={"conv_out.weight": weight})
    assert not weights_return(layer)
    one = nn.Linear(2, 2)
    add_hook_to_module(one, SequentialHook(AlignDevicesHook(), AlignDevicesHook(offload=True, weights_map={"a": 1})))
    assert list(weight_maps(one)) == [{"a": 1}]


@of_private_interface
def test_diffusers_hooks():
    unet = stock_unet(SD)
    assert not any(is_cast(m) or is_grouped(m) or has_diffusers_hook(m) for m in unet.modules())
    unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert is_cast(unet.conv_in)
    assert has_diffusers_hook(unet.conv_in)
    grouped = stock_unet(SD)
    grouped.enable_group_offload("cpu", "cpu", "leaf_level")
    assert is_grouped(grouped.conv_out)
    assert not is_cast(grouped.conv_out)


@of_private_interface
def test_groups_on_disk(tmp_path):
    unet = stock_unet(SD)
    weight = unet.conv_out.weight.detach().clone()
    for folder in (None, tmp_path):
        other = stock_unet(SD)
        other.enable_group_offload("cpu", "cpu", "leaf_level", offload_to_disk_path=folder and str(folder))
        found = tensors_on_disk(other)
        assert bool(found) == (folder is not None)
    file, key = found[id(other.conv_out.weight)]
    assert torch.equal(load_file(file)[key], weight)


@of_private_interface
def test_adapter_layers():
    unet = stock_unet(SD)
    plain = {name for name, _ in unet.named_parameters()}
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    adapters = [name for name, module in unet.named_modules() if is_adapter(module) and name.endswith("to_q")]
    assert adapters
    kept = [n for n, _ in unet.named_parameters() if not any(is_own_of_adapter(n, adapter) for adapter in adapters)]
    assert {name.replace(".base_layer", "") for name in kept} == plain


@of_private_interface
def test_progress_bar():
    pipe = stock_pipeline()
    pipe.set_progress_bar_config(disable=True, leave=False)
    assert progress_bar_settings(pipe) == {"disable": True, "leave": False}


@of_private_interface
def test_pipeline_functions():
    pipe = stock_pipeline()
    timesteps, count = retrieve_timesteps(pipe.scheduler, 3, "cpu")
    assert len(timesteps) == count == 3
    encoded = pipe.vae.encode(torch.zeros(1, 3, 16, 16))
    assert torch.equal(retrieve_latents(encoded, sample_mode="argmax"), encoded.latent_dist.mode())


@of_private_interface
def test_execution_device():
    pipe = stock_pipeline()
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert pipe.device.type == "meta"
    assert pipe._execution_device.type == "cpu"


@of_private_interface
def test_callback_inputs():
    assert {"latents", "prompt_embeds"} <= set(StableDiffusionPipeline._callback_tensor_inputs)
    assert vars(StableDiffusionPipeline)["num_timesteps"].__get__(types.SimpleNamespace(_num_timesteps=3)) == 3


@of_private_interface
def test_class_attributes(tmp_path):
    assert all(hasattr(UNet2DConditionModel, name) for name in CLASS_ATTRIBUTES)
    unet = upcycled_unet(SD)
    unet.drop_routers_()
    unet.compile_repeated_blocks(backend="eager")
    compiled = {type(module).__name__ for module in unet.modules() if module._compiled_call_impl is not None}
    assert compiled == set(unet._repeated_blocks)
    unet.save_pretrained(tmp_path)
    half = mtu.MTUUNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    tables = [layer.router.weights for layer in half.routed_layers()]
    assert half.dtype == torch.bfloat16
    assert all(
        torch.equal(table, layer.router.weights) for table, layer in zip(tables, unet.routed_layers(), strict=True)
    )
    assert unet._get_no_split_modules("auto")


@of_private_interface
def test_module_of_components(tmp_path):
    """If diffusers takes components of other libraries as they are, the modules need no `ModelMixin`."""
    pipe = mtu.upcycle(stock_pipeline())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["mtu", "MTUUNet2DConditionModel"]
    assert type(mtu.MTUPipeline.from_pretrained(tmp_path).unet) is mtu.MTUUNet2DConditionModel
    source = inspect.getsource(pipeline_loading_utils.load_sub_model)
    assert "get_class_obj_and_candidates" in source
    assert "ModelMixin" in pipeline_loading_utils.ALL_IMPORTABLE_CLASSES


@of_private_interface
def test_saved_keys(tmp_path):
    pipe = stock_pipeline()
    pipe.save_pretrained(tmp_path)
    saved, index = (json.loads((tmp_path / f).read_text()) for f in ("unet/config.json", "model_index.json"))
    arguments = set(inspect.signature(UNet2DConditionModel.__init__).parameters)
    assert saved["_class_name"] == "UNet2DConditionModel"
    assert {*saved, *pipe.unet.config} - arguments <= SAVED_KEYS
    assert {"_class_name", "_diffusers_version"} <= set(index)
