"""Tiny stock and upcycled UNets of both families, and their inputs."""

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import mtu

SD = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SDXL = {
    **SD,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,  # 6 · 4 + a pooled text embedding of 16
}
FAMILIES = {"sd": SD, "sdxl": SDXL}
# Values of the parameters `settings` (of an upcycled UNet) and `dropped` (whether its routers are).
TOP_2 = {"top_k": 2, "norm": "task_expert"}
WITH_AND_WITHOUT_ROUTERS = [
    pytest.param({}, False, id="dense"),
    pytest.param(TOP_2, False, id="top2"),
    pytest.param({}, True, id="dense-dropped"),
    pytest.param(TOP_2, True, id="top2-dropped"),
]


def stock_unet(config: dict[str, Any] = SD, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A stock UNet in eval mode, every parameter random: fresh norms are 1 and 0, and hide a forgotten copy."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**{**config, **changes}).eval()
    randomise_(list(unet.parameters()), seed)
    return unet


# Upcycling takes four times as long as copying its result, and the tests ask for the same few models again and again.
_UPCYCLED: dict[str, mtu.MTUUNet2DConditionModel] = {}


def upcycled_unet(config: dict[str, Any] = SD, randomised: bool = True, **settings: Any) -> mtu.MTUUNet2DConditionModel:
    """An upcycled UNet in eval mode; `randomised`: as if trained, so that no two tasks or experts are alike."""
    key = repr((config, randomised, settings))
    if key not in _UPCYCLED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # top-k initialisations say what they cannot preserve
            unet = mtu.upcycle(stock_unet(config), **settings)
        if randomised:
            randomise_(unet.trainable_parameters(), seed=1)
        unet.clear_routing_cache()
        _UPCYCLED[key] = unet
    return copy.deepcopy(_UPCYCLED[key])


@torch.no_grad()
def randomise_(parameters: list[Tensor], seed: int) -> None:
    """Add noise that is small against what the parameter is usually initialised to, but far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        scale = 0.1 if parameter.dim() < 2 else 0.5 * parameter[0].numel() ** -0.5
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def inputs(unet: UNet2DConditionModel, batch: int = 5, channels: int = 8, seed: int = 2) -> dict[str, Any]:
    """Keyword arguments of `unet.forward` for a batch, not square, each sample at its own timestep."""
    generator = torch.Generator().manual_seed(seed)
    like = next(unet.parameters())

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    given = {
        "sample": random(batch, channels, 8, 12),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": random(batch, 5, 16),
    }
    if unet.config.addition_embed_type == "text_time":
        given["added_cond_kwargs"] = {"text_embeds": random(batch, 16), "time_ids": random(batch, 6)}
    return given
