"""The models to inspect: the configuration of a UNet, and the models that it describes, built on the meta device."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from mtu.experts import stock_config
from mtu.models.unet import MTUUNet2DConditionModel
from mtu.upcycling import upcycle

__all__ = ["BUILT_IN_UNET_CONFIGS", "InspectedModel", "load_inspected_model"]

# The UNets of the two published models, as arguments of UNet2DConditionModel.
BUILT_IN_UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

# Pixels per latent of a model without a VAE to ask.
_LATENT_FACTOR = 8

# The exceptions of diffusers for a configuration that it cannot build.
_CONFIG_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


class InspectedModel(NamedTuple):
    """A model to inspect.

    Attributes:
        name: name of the model in reports and messages.
        stock_config: configuration of the stock UNet.
        upcycled_unet: the upcycled model with its routers, on the meta device; None if the model is a stock one.
        vae_scale_factor: pixels per latent.
    """

    name: str
    stock_config: dict[str, Any]
    upcycled_unet: MTUUNet2DConditionModel | None
    vae_scale_factor: int

    def build_stock(self) -> UNet2DConditionModel:
        """Build the stock UNet on the meta device."""
        with torch.device("meta"):
            return UNet2DConditionModel(**self.stock_config).eval()

    def build_upcycled(self, **settings: Any) -> MTUUNet2DConditionModel:
        """Upcycle the stock UNet on the meta device, for the tasks of the model.

        Args:
            settings: arguments of `upcycle`.

        Raises:
            ValueError: `upcycle` refuses the arguments.
        """
        tasks = None if self.upcycled_unet is None else self.upcycled_unet.tasks
        # Meta tensors have no values to preserve, and only init="paper" does not warn of that.
        return upcycle(self.build_stock(), tasks, init="paper", backend="eager", **settings)

    def compute_latent_size(self, size: int, vae_scale_factor: int | None) -> int:
        """Compute the edge of the latents of an image.

        Args:
            size: edge of the image in pixels.
            vae_scale_factor: pixels per latent; None: those of the model.

        Raises:
            ValueError: the size is not a positive multiple of the pixels per latent.
        """
        factor = vae_scale_factor or self.vae_scale_factor
        if size < 1 or size % factor:
            raise ValueError(f"size must be a positive multiple of {factor}, the pixels per latent, but got {size}.")
        return size // factor


def load_inspected_model(model: str | os.PathLike | UNet2DConditionModel) -> InspectedModel:
    """Find the model to inspect, without reading weights.

    Args:
        model: a key of `BUILT_IN_UNET_CONFIGS`, a folder whose config.json is read, or a UNet.

    Raises:
        TypeError: the model is neither a UNet nor a name.
        ValueError: the folder does not exist, or does not hold a UNet or a pipeline.
    """
    if not isinstance(model, str | os.PathLike | UNet2DConditionModel):
        raise TypeError(f"A UNet or the folder of one is expected, but got a {type(model).__name__}.")
    if isinstance(model, str) and model in BUILT_IN_UNET_CONFIGS:
        return InspectedModel(model, BUILT_IN_UNET_CONFIGS[model], None, _LATENT_FACTOR)
    if isinstance(model, UNet2DConditionModel):
        name, config, factor = f"this {type(model).__name__}", dict(model.config), _LATENT_FACTOR
        is_upcycled = isinstance(model, MTUUNet2DConditionModel)
    else:
        name, config, factor = _read_folder(Path(model))
        is_upcycled = config["_class_name"] == MTUUNet2DConditionModel.__name__
    unet = _from_config(name, config, is_upcycled)
    return InspectedModel(name, stock_config(unet), unet if isinstance(unet, MTUUNet2DConditionModel) else None, factor)


def _from_config(name: str, config: dict[str, Any], is_upcycled: bool) -> UNet2DConditionModel:
    cls = MTUUNet2DConditionModel if is_upcycled else UNet2DConditionModel
    if is_upcycled:
        config = {**config, "routers_dropped": False}
    try:
        with torch.device("meta"):
            unet = cls.from_config(config).eval()
    except _CONFIG_ERRORS as error:
        raise ValueError(f"The configuration of {name} describes no {cls.__name__}: {_one_line(error)}.") from error
    if isinstance(unet, MTUUNet2DConditionModel):
        unet.set_backend("eager")
    return unet


def _read_folder(folder: Path) -> tuple[str, dict[str, Any], int]:
    """Name, configuration and latent factor of the UNet in a folder of its own or in that of a pipeline."""
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {str(folder)!r}: expected {', '.join(BUILT_IN_UNET_CONFIGS)} or the folder of a model."
        )
    path = next((p for p in (folder / "config.json", folder / "unet" / "config.json") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds neither config.json nor unet/config.json: expected a UNet or a pipeline.")
    config = _read_json(path)
    names = [UNet2DConditionModel.__name__, MTUUNet2DConditionModel.__name__]
    if config.get("_class_name") not in names:
        raise ValueError(f"{path} describes a {config.get('_class_name')}, but a {' or '.join(names)} is expected.")
    factor, vae = _LATENT_FACTOR, path.parent.parent / "vae" / "config.json"
    if path.parent.name == "unet" and vae.is_file():
        channels = _read_json(vae).get("block_out_channels")
        # Each level of the VAE but the last halves the picture.
        factor = 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else factor
    return str(folder), config, factor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {_one_line(error)}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(config).__name__}.")
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
