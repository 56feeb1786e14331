"""Tiny stock UNets of both families, their inputs, and how outputs are compared."""

import copy
import warnings
from typing import Any

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

# Relative to the largest output. These networks chain some 40 layers, each of which may round by about 2 ulp
# (eps = 1.2e-7) of its largest output: 40 · 2 · 1.2e-7 = 1e-5, the bound that DESIGN §2 names, too.
TOLERANCE = 1e-5


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
        unet.invalidate_routing_cache()
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


def rows(given: dict[str, Any], index: Any, channels: int | None = None) -> dict[str, Any]:
    """The samples `index` of a batch, with `channels` of their channels."""
    taken = {k: rows(v, index) if isinstance(v, dict) else v[index] for k, v in given.items()}
    if channels is not None:
        taken["sample"] = taken["sample"][:, :channels]
    return taken


@torch.no_grad()
def predict(unet: UNet2DConditionModel, given: dict[str, Any], *names: str, **more: Any) -> Tensor:
    """The output for a batch whose samples belong to the tasks `names`; none named: as a stock UNet is called."""
    if names:
        more["task_ids"] = unet.task_ids(names)
    return unet(**given, **more).sample


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise unless the largest difference is within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.3g} of {scale:.3g}, allowed {tolerance:.3g}"


def assert_differ(first: Tensor, second: Tensor) -> None:
    """Raise unless two outputs are so different that a test that they are close means something."""
    assert (first - second).abs().max() > 1000 * TOLERANCE * second.abs().max()


def snapshot(unet: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A copy of what an operation that fails must not change: the state dict and the configuration."""
    return {k: v.clone() for k, v in unet.state_dict().items()}, dict(unet.config.items())


def assert_unchanged(unet: torch.nn.Module, before: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Raise unless `unet` is bit for bit what it was at `snapshot`."""
    state, config = before
    assert dict(unet.config) == config
    assert unet.state_dict().keys() == state.keys()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, state[name]), name
