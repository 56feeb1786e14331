"""What mtu relies on beyond the public interfaces of diffusers and accelerate: the one place that names it.

Each entry of `PRIVATE_WAYS` says what is used and why; `tests/mtu/test_diffusers_compat.py` has a test of that name,
which fails when another version of diffusers does it otherwise. Seen in diffusers 0.42.1 and accelerate 1.15.0.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

__all__ = [
    "FUSED_ATTRIBUTES",
    "FUSED_PROJECTIONS",
    "PRIVATE_WAYS",
    "RUNTIME_ATTRIBUTES",
    "StockIndex",
    "expand_block_scales",
    "is_generated_card",
    "is_offloaded",
    "pipeline_settings",
    "with_stock_signature",
]

PRIVATE_WAYS = {
    "hub_download": (
        "`DiffusionPipeline.download` reads model_index.json by the class method `_dict_from_json_file`, and refuses "
        "components of libraries that are not in `LOADABLE_CLASSES`: it is shown their stock class instead, whose "
        "files have the same names."
    ),
    "fused_projections": (
        "`fuse_qkv_projections` adds the Linears `to_qkv` and `to_kv` to attentions and sets `fused_projections`; "
        "unfusing takes only the processors back, which `original_attn_processors` of the model keeps."
    ),
    "generated_card": (
        "Before it uploads a pipeline by `_upload_folder`, diffusers puts a card of its own into the folder, from the "
        "template of huggingface_hub, where the repository has none."
    ),
    "model_offload": (
        "`enable_model_cpu_offload` keeps its hooks in `_all_hooks` of the pipeline and in `_hf_hook` of the modules "
        "(accelerate); group offloading is asked for by `_is_group_offload_enabled`."
    ),
    "pipeline_settings": (
        "What is set on a pipeline besides its components are entries of its `__dict__` (`_progress_bar_config`, "
        "`image_processor`, `fusing_unet`, …), but for the configuration, `_internal_dict`."
    ),
    "block_scales": (
        "UNets' adapter scales by block are spread over their layers by `_maybe_expand_lora_scales`, which "
        "`set_adapters` looks up by the name of the UNet's class: a subclass has to call it by itself."
    ),
    "chunks": (
        "`set_chunk_feed_forward` keeps what it was given in `_chunk_size` and `_chunk_dim` of transformer blocks."
    ),
    "runtime_attributes": (
        "What offloading (accelerate: `_hf_hook`, `_old_forward`), casting, group offloading and caching (diffusers: "
        "`_diffusers_hook`), and `nn.Module.compile` (`_compiled_call_impl`) leave on modules besides `forward`."
    ),
    "call_settings": (
        "Callbacks read and set `_guidance_scale`, `_image_guidance_scale`, `_guidance_rescale`, `_clip_skip`, "
        "`_cross_attention_kwargs` and `_interrupt` of the pipeline, which the stock pipelines read at each step."
    ),
    "constructor_signature": (
        "The keys of a model's configuration are read off the signature of its constructor, where `**stock` must be "
        "spelled out."
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
}

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
    unet = pipeline.components.get("unet")
    if bool(getattr(pipeline, "_all_hooks", None)) or not isinstance(unet, nn.Module):
        return bool(getattr(pipeline, "_all_hooks", None))
    return any(hasattr(module, "_hf_hook") for module in unet.modules()) or _is_group_offload_enabled(unet)


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
