"""Counting parameters and FLOPs of a model on the meta device, and writing such numbers down."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtu.models.router import Router, constants

__all__ = ["Flops", "count_flops", "count_parameters", "describe_flops", "format_count", "format_flops", "format_table"]

_TEXT_TOKENS = 77


class Flops(NamedTuple):
    """FLOPs of one forward, a multiply-add being two.

    Attributes:
        layers: convolutions and linear layers, without the routers.
        attention: the two matrix products inside attention.
        routers: all routers, once per call whatever the batch.
        ffn: the part of `layers` that lies in feed-forward networks.
    """

    layers: int
    attention: int
    routers: int
    ffn: int


def count_flops(unet: UNet2DConditionModel, channels: int, latent_size: int) -> Flops:
    """Run a UNet on the meta device at batch 1 and count.

    Args:
        unet: on the meta device.
        channels: of the sample.
        latent_size: its edge.

    Returns:
        The FLOPs, as `torch.utils.flop_counter` counts them: a multiply-add is two.

    Raises:
        ValueError: a UNet that takes other inputs than text and, as SDXL, sizes.
    """
    inputs = _inputs(unet, channels, latent_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    root = type(unet).__name__
    total = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    parts: dict[type, int] = dict.fromkeys((Attention, FeedForward, Router), 0)
    for name, module in unet.named_modules():
        count = total.get(f"{root}.{name}", 0)
        if isinstance(module, Attention):
            # Whatever operator computes attention: it is what its linear layers do not.
            linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
            count -= sum(total.get(f"{root}.{name}.{linear}", 0) for linear in linears)
        for kind in parts:
            parts[kind] += count if isinstance(module, kind) else 0
    layers = total["Global"] - parts[Attention] - parts[Router]
    return Flops(layers, parts[Attention], parts[Router], parts[FeedForward] - parts[Router])


def _inputs(unet: UNet2DConditionModel, channels: int, latent_size: int) -> dict[str, Any]:
    config = unet.config
    others = {"class_embed_type": config.class_embed_type, "num_class_embeds": config.num_class_embeds}
    others["encoder_hid_dim_type"] = config.encoder_hid_dim_type
    if config.addition_embed_type != "text_time":
        others["addition_embed_type"] = config.addition_embed_type
    unknown = [f"{key}={value!r}" for key, value in others.items() if value is not None]
    if unknown:
        raise ValueError(f"Only UNets that take text (and sizes, as SDXL) can be counted, but got {unknown[0]}.")
    width = config.cross_attention_dim
    width = max(width) if isinstance(width, list | tuple) else width
    inputs = {
        "sample": torch.empty(1, channels, latent_size, latent_size, device="meta"),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(1, _TEXT_TOKENS, width, device="meta"),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.empty(1, config.time_cond_proj_dim, device="meta")
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        embeds = {"text_embeds": torch.empty(1, pooled, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
        inputs["added_cond_kwargs"] = embeds
    return inputs


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model but the tables that dropped routers leave, which are constants."""
    tables = constants(model)
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)


def describe_flops(size: int, latent_size: int) -> str:
    """What the FLOPs in a table are."""
    return (
        f"FLOPs: one forward of the UNet at {size} x {size} (latents {latent_size} x {latent_size}), batch 1, "
        f"{_TEXT_TOKENS} text tokens.\nA multiply-add counts as two. Convolutions and linear layers; the two products "
        "inside attention only where named."
    )


def format_count(count: int) -> str:
    """A number of parameters: 1.524 B, 859.5 M, 12.3 K, 16."""
    for unit, symbol, digits in ((10**9, "B", 3), (10**6, "M", 1), (10**3, "K", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {symbol}"
    return str(count)


def format_flops(count: int) -> str:
    """A number of FLOPs: 0.677 T, 2.350 G, 0.075 G."""
    for unit, symbol in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        # 0.677 T, as papers write it, not 677 G.
        if count >= unit // 10:
            return f"{count / unit:.3f} {symbol}"
    return str(count)


def format_table(lines: Sequence[Sequence[str]], left: int = 0) -> str:
    """Aligned columns, the first `left` of them to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    aligned = ([f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
