"""Example arguments for one call of a UNet, for warm-up, FLOP counts and exports."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

__all__ = [
    "CLIP_TEXT_TOKENS",
    "default_latent_height_and_width",
    "fill_in_height_and_width",
    "make_example_inputs",
]

# The tokens of a prompt, as the CLIP text encoders of Stable Diffusion pad them.
CLIP_TEXT_TOKENS = 77

# SDXL embeds the original size, the crop and the target size, two numbers each.
_TIME_IDS = 6


def make_example_inputs(
    unet: UNet2DConditionModel,
    batch_size: int = 1,
    *,
    height: int | None = None,
    width: int | None = None,
    channels: int | None = None,
    text_tokens: int = CLIP_TEXT_TOKENS,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Make the arguments of one call of a UNet: zeros in the shapes and dtypes that its configuration asks for.

    Args:
        unet: a stock or an upcycled UNet of the families of SD 1.5, SDXL, and latent consistency models (LCM).
        batch_size: B.
        height, width: the size of the latents; None: the model's own.
        channels: the channels of `sample`; None: those of the latents alone.
        text_tokens: L, the tokens of a prompt.
        device: the device of the tensors; None: that of the UNet.

    Returns:
        The arguments by name: `sample` (B, channels, height, width), `timestep` () and `encoder_hidden_states`
        (B, L, D). LCM also gets `timestep_cond`, and SDXL gets `added_cond_kwargs` with the pooled text and the sizes.
        `timestep` is float32, and the other tensors have the dtype of the UNet.

    Raises:
        ValueError: the UNet takes other inputs, or neither the UNet nor the call gives a size.

    Example:
        >>> unet(**make_example_inputs(unet, batch_size=2, height=64, width=64))
    """
    config = unet.config
    _check_family(config)
    height, width = fill_in_height_and_width(unet, height, width)
    device = unet.device if device is None else torch.device(device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=unet.dtype, device=device)

    inputs: dict[str, Any] = {
        "sample": zeros(batch_size, config.in_channels if channels is None else channels, height, width),
        "timestep": torch.zeros((), device=device),
        "encoder_hidden_states": zeros(batch_size, text_tokens, _text_width(config)),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = zeros(batch_size, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        time_ids = zeros(batch_size, _TIME_IDS)
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(batch_size, pooled), "time_ids": time_ids}
    return inputs


def default_latent_height_and_width(unet: UNet2DConditionModel) -> tuple[int, int] | None:
    """The height and width of the latents that a UNet was made for; None if its configuration has no `sample_size`."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])


def fill_in_height_and_width(
    unet: UNet2DConditionModel, height: int | None, width: int | None, pixels_per_latent: int = 1
) -> tuple[int, int]:
    """The given height and width, with the UNet's own in the place of None.

    Args:
        unet: the UNet.
        height, width: in latents times `pixels_per_latent`, or None.
        pixels_per_latent: the factor of the VAE, for sizes in pixels.

    Raises:
        ValueError: an edge is missing, and the UNet's configuration has no `sample_size`.
    """
    if height is not None and width is not None:
        return height, width
    own = default_latent_height_and_width(unet)
    if own is None:
        raise ValueError("This UNet has no default size (sample_size is None): pass height and width.")
    own_height, own_width = (edge * pixels_per_latent for edge in own)
    return own_height if height is None else height, own_width if width is None else width


def _check_family(config: Any) -> None:
    others = {name: config[name] for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")}
    if config.addition_embed_type not in ("text", "text_time"):  # the former reads the text alone
        others["addition_embed_type"] = config.addition_embed_type
    unknown = [f"{name}={value!r}" for name, value in others.items() if value is not None]
    if unknown:
        raise ValueError(f"Expected a UNet that takes text (and sizes, as SDXL does) alone, but got {unknown[0]}.")


def _text_width(config: Any) -> int:
    width = config.cross_attention_dim
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) > 1:
        raise ValueError(f"Expected a UNet whose blocks all read one text, but its cross_attention_dim is {width}.")
    return widths.pop()
