"""The private interfaces of diffusers, accelerate and PEFT that mtu relies on: the one place that names them.

Each entry of `PRIVATE_INTERFACES` says what mtu uses, why, and in which version it was seen. A test of the same name in
`tests/mtu/compat/test_private_interfaces.py` fails when another version differs. Other modules use such a name only
where it must be an attribute of their own class or where callbacks set it: these entries say where.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.attention import BasicTransformerBlock
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import retrieve_latents
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

__all__ = [
    "CHUNK_ATTRIBUTES",
    "CLASS_ATTRIBUTES",
    "FUSED_ATTRIBUTES",
    "FUSED_PROJECTIONS",
    "PRIVATE_INTERFACES",
    "RUNTIME_ATTRIBUTES",
    "SAVED_KEYS",
    "StockIndex",
    "chunk_settings",
    "expand_block_scales",
    "has_accelerate_hook",
    "has_diffusers_hook",
    "is_adapter",
    "is_cast",
    "is_generated_card",
    "is_grouped",
    "is_offloaded",
    "is_own_of_adapter",
    "pipeline_settings",
    "progress_bar_settings",
    "retrieve_latents",
    "retrieve_timesteps",
    "tensors_on_disk",
    "weight_maps",
    "weights_return",
    "with_stock_signature",
]

PRIVATE_INTERFACES = {
    "hub_download": (
        "`DiffusionPipeline.download` reads model_index.json by the class method `_dict_from_json_file`, and refuses "
        "components of libraries that are not in `LOADABLE_CLASSES`: it is shown their stock class instead, whose "
        "files have the same names. Seen in diffusers 0.42.1."
    ),
    "fused_projections": (
        "`fuse_qkv_projections` adds the Linears `to_qkv` and `to_kv` to attentions and sets `fused_projections`; "
        "unfusing takes only the processors back, which `original_attn_processors` of the model keeps."
        " Seen in diffusers 0.42.1."
    ),
    "generated_card": (
        "Before it uploads a pipeline by `_upload_folder`, diffusers puts a card of its own into the folder, from the "
        "template of huggingface_hub, where the repository has none. Seen in diffusers 0.42.1."
    ),
    "model_offload": (
        "`enable_model_cpu_offload` keeps its hooks in `_all_hooks` of the pipeline and in `_hf_hook` of the modules "
        "(accelerate); group offloading is asked for by `_is_group_offload_enabled`."
        " Seen in diffusers 0.42.1, accelerate 1.15.0."
    ),
    "pipeline_settings": (
        "What is set on a pipeline besides its components are entries of its `__dict__` (`_progress_bar_config`, "
        "`image_processor`, `fusing_unet`, …), but for the configuration, `_internal_dict`. Seen in diffusers 0.42.1."
    ),
    "block_scales": (
        "UNets' adapter scales by block are spread over their layers by `_maybe_expand_lora_scales`, which "
        "`set_adapters` looks up by the name of the UNet's class: a subclass has to call it by itself."
        " Seen in diffusers 0.42.1."
    ),
    "chunks": (
        "`set_chunk_feed_forward` keeps what it was given in `_chunk_size` and `_chunk_dim` of transformer blocks."
        " Seen in diffusers 0.42.1."
    ),
    "runtime_attributes": (
        "What offloading (accelerate: `_hf_hook`, `_old_forward`), casting, group offloading and caching (diffusers: "
        "`_diffusers_hook`), and `nn.Module.compile` (`_compiled_call_impl`) leave on modules besides `forward`."
        " Seen in diffusers 0.42.1, accelerate 1.15.0."
    ),
    "call_settings": (
        "Callbacks read and set `_guidance_scale`, `_image_guidance_scale`, `_guidance_rescale`, `_clip_skip`, "
        "`_cross_attention_kwargs` and `_interrupt` of the pipeline, which the stock pipelines read at each step."
        " Seen in diffusers 0.42.1."
    ),
    "constructor_signature": (
        "The keys of a model's configuration are read off the signature of its constructor, where `**stock` must be "
        "spelled out. Seen in diffusers 0.42.1."
    ),
    "accelerate_hooks": (
        "accelerate leaves its hook of a module in `_hf_hook`, several of them in its `hooks`; one with `offload` has "
        "the module's weights in its `weights_map`, by their names in it, and meta tensors in the module. They are "
        "read there to save and to export. Taken off, a hook puts them where `original_devices` says: nowhere, where "
        "the model was loaded by a device map. Seen in accelerate 1.15.0."
    ),
    "diffusers_hooks": (
        "diffusers keeps its hooks of a module by name in `_diffusers_hook`, among them 'group_offloading' and "
        "'layerwise_casting', and offers no way to ask which a model has. Seen in diffusers 0.42.1."
    ),
    "groups_on_disk": (
        "Group offloading to disk leaves no values in the parameters between calls: a hook's `group` says so by "
        "`offload_to_disk_path` and `_is_offloaded_to_disk`, and has each tensor's name in the file "
        "`safetensors_file_path` in `tensor_to_key`. Seen in diffusers 0.42.1."
    ),
    "adapter_layers": (
        "PEFT puts a module of its own around a layer, which it keeps as `base_layer`; other parameters of it are the "
        "adapter's. Seen in peft 0.21.2."
    ),
    "progress_bar": (
        "The settings of a pipeline's progress bar can be set but not asked for: they are in `_progress_bar_config`, "
        "once there are any. Seen in diffusers 0.42.1."
    ),
    "pipeline_functions": (
        "`retrieve_timesteps` and `retrieve_latents` are in the modules of the stock pipelines alone, which do not "
        "export them. Seen in diffusers 0.42.1."
    ),
    "execution_device": (
        "Where inputs go when the models are offloaded is `_execution_device` of the pipeline: read in "
        "`mtu/pipelines/stable_diffusion.py`. Seen in diffusers 0.42.1, accelerate 1.15.0."
    ),
    "callback_inputs": (
        "What callbacks may ask for is the class attribute `_callback_tensor_inputs`, and the number of timesteps is "
        "`_num_timesteps` behind `num_timesteps`: both set in `mtu/pipelines/stable_diffusion.py`. Seen in diffusers "
        "0.42.1."
    ),
    "class_attributes": (
        "Class attributes say which blocks `compile_repeated_blocks` compiles (`_repeated_blocks`), what `device_map` "
        "does not split (`_no_split_modules`), and what `torch_dtype` leaves in float32 (`_keep_in_fp32_modules`): set "
        "in `mtu/models/unet.py`. Seen in diffusers 0.42.1."
    ),
    "module_of_components": (
        "A pipeline takes a component of a library that diffusers does not know only if the module that it is imported "
        "from has diffusers' base class of models, `ModelMixin`: `mtu` and `mtu/models/unet.py` do. Seen in diffusers "
        "0.42.1."
    ),
    "saved_keys": (
        "Configurations have entries that are no arguments: `_class_name` and `_diffusers_version` of files, "
        "`_use_default_values` of objects, `_module` of pipelines; read by `mtu/models/pretrained.py`, `mtu/pipelines` "
        "and `mtu/inspection`. Seen in diffusers 0.42.1."
    ),
}

# Attributes of modules that say how they run just now, and belong to no model; see "runtime_attributes".
RUNTIME_ATTRIBUTES = {
    "forward",
    "_hf_hook",
    "_old_forward",
    "_diffusers_hook",
    "_compiled_call_impl",
    "processor",
    "hf_device_map",
    "_internal_dict",
    # accelerate puts its own in the place of the methods that move a model, where a device map has dispatched it.
    *("to", "cuda", "npu", "mlu", "sdaa", "musa", "xpu", "neuron"),
}

# What classes of models say to diffusers; see "class_attributes".
CLASS_ATTRIBUTES = {"_repeated_blocks", "_no_split_modules", "_keep_in_fp32_modules"}

# What blocks keep of `set_chunk_feed_forward`; see "chunks".
CHUNK_ATTRIBUTES = {"_chunk_size", "_chunk_dim"}

# Entries of a model's configuration that are no arguments of its constructor; see "saved_keys".
SAVED_KEYS = {"_class_name", "_diffusers_version", "_use_default_values"}

# What fusing leaves behind: parts of the names of parameters, and attributes.
FUSED_PROJECTIONS = (".to_qkv.", ".to_kv.")
FUSED_ATTRIBUTES = {"fused_projections", "original_attn_processors"}


class StockIndex(StableDiffusionPipeline):
    """Downloads a saved multi-task pipeline: in its index, the upcycled UNet has the name of its stock class."""

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        stock = ["diffusers", UNet2DConditionModel.__name__]
        index = super()._dict_from_json_file(json_file)
        return {k: stock if isinstance(v, list) and v and v[0] == "mtu" else v for k, v in index.items()}


def is_generated_card(text: str) -> bool:
    """Whether a model card, without its front matter, is just what diffusers writes where there is none."""
    for kind in ("pipeline", "model"):
        description = (
            f"This is the model card of a 🧨 diffusers {kind} that has been pushed on the Hub. This model card has "
            "been automatically generated."
        )
        if description in text:
            card = ModelCard.from_template(ModelCardData(), model_description=description)
            return text.split() == card.text.split()
    return False


def is_offloaded(pipeline: DiffusionPipeline) -> bool:
    """Whether the UNet of a pipeline, or the pipeline as a whole, is offloaded."""
    if getattr(pipeline, "_all_hooks", None):
        return True
    unet = pipeline.components.get("unet")
    return isinstance(unet, nn.Module) and (
        any(map(has_accelerate_hook, unet.modules())) or _is_group_offload_enabled(unet)
    )


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate has put a hook on a module."""
    return hasattr(module, "_hf_hook")


def weight_maps(module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Where accelerate keeps the weights of a module between its calls, by their names in it."""
    return (hook.weights_map for hook in _offloading_hooks(module))


def weights_return(module: nn.Module) -> bool:
    """Whether a module gets its weights back where its hooks are taken off: not if it was loaded without them."""
    devices = (device for hook in _offloading_hooks(module) for device in hook.original_devices.values())
    return all(device.type != "meta" for device in devices)


def _offloading_hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) is True and one.weights_map is not None:
            yield one


def has_diffusers_hook(module: nn.Module) -> bool:
    """Whether diffusers has put hooks on a module."""
    return hasattr(module, "_diffusers_hook")


def is_cast(module: nn.Module) -> bool:
    """Whether layerwise casting stores a module's own weights in another dtype than they are computed in."""
    return _diffusers_hook(module, "layerwise_casting") is not None


def is_grouped(module: nn.Module) -> bool:
    """Whether a module itself is under group offloading."""
    return _diffusers_hook(module, "group_offloading") is not None


def tensors_on_disk(module: nn.Module) -> dict[int, tuple[str, str]]:
    """File and key of each tensor of a model that group offloading keeps on disk, by the tensor's identity."""
    groups = [_diffusers_hook(m, "group_offloading").group for m in module.modules() if is_grouped(m)]
    return {
        id(tensor): (group.safetensors_file_path, key)
        for group in groups
        if group.offload_to_disk_path is not None and group._is_offloaded_to_disk
        for tensor, key in group.tensor_to_key.items()
    }


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one that PEFT puts around another."""
    return type(module).__module__.partition(".")[0] == "peft"


def is_own_of_adapter(name: str, adapter: str) -> bool:
    """Whether a parameter belongs to the adapter of that name, and not to the layer that it is around."""
    return name.startswith(f"{adapter}.") and not name.startswith(f"{adapter}.base_layer.")


def chunk_settings(block: BasicTransformerBlock) -> tuple[int | None, int]:
    """In how large chunks of which dimension a block's feed-forward network runs; None: at once."""
    return block._chunk_size, block._chunk_dim


def progress_bar_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What `set_progress_bar_config` was given."""
    return dict(getattr(pipeline, "_progress_bar_config", {}))


def pipeline_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What is set on a pipeline besides its components and its configuration, by attribute."""
    others = {*pipeline.components, "_internal_dict", "_all_hooks"}
    return {name: value for name, value in vars(pipeline).items() if name not in others}


def expand_block_scales(unet: UNet2DConditionModel, scales: Sequence[float | dict | None]) -> Sequence[float | dict]:
    """The scales of several adapters, those by block ({"down": 0.9, "up": {"block_1": 0.6}}) spread over the layers.

    Raises:
        ValueError: a block that this UNet has not, or too many scales for one.
    """
    return _maybe_expand_lora_scales(unet, [1.0 if scale is None else scale for scale in scales])


def with_stock_signature(cls: type[UNet2DConditionModel]) -> None:
    """Have a subclass whose constructor takes `**stock` register all its arguments in its configuration."""
    own = inspect.signature(cls.__init__)
    stock = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
        if name != "self"
    ]
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    constructor: Any = cls.__init__
    constructor.__signature__ = own.replace(parameters=[*kept, *stock])
    cls.__init__ = register_to_config(constructor)
