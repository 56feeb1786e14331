"""Counting parameters and FLOPs of a model on the meta device, and formatting the numbers for reports."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtu.example_inputs import CLIP_TEXT_TOKENS, make_example_inputs
from mtu.models.router import Router, routing_table_parameter_ids

__all__ = [
    "Flops",
    "count_flops",
    "count_parameters",
    "describe_flop_count",
    "format_count",
    "format_flops",
    "format_table",
]


class Flops(NamedTuple):
    """FLOPs of one forward by kind of operation. A multiply-add counts as two.

    Attributes:
        layers: FLOPs of convolutions and linear layers, without the routers.
        attention: FLOPs of the two matrix products inside attention.
        routers: FLOPs of all routers, which run once per call at any batch size.
        ffn: the share of `layers` in feed-forward networks.
    """

    layers: int
    attention: int
    routers: int
    ffn: int


def count_flops(unet: UNet2DConditionModel, channels: int, latent_size: int) -> Flops:
    """Count the FLOPs of one forward of a UNet at batch 1, as `torch.utils.flop_counter` counts them.

    Args:
        unet: a UNet on the meta device.
        channels: channels of its sample.
        latent_size: height and width of its sample.

    Returns:
        The FLOPs by kind of operation.

    Raises:
        ValueError: the UNet takes other inputs than text and the sizes of SDXL.
    """
    inputs = make_example_inputs(unet, height=latent_size, width=latent_size, channels=channels)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    root = type(unet).__name__
    total = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    parts: dict[type, int] = dict.fromkeys((Attention, FeedForward, Router), 0)
    for name, module in unet.named_modules():
        count = total.get(f"{root}.{name}", 0)
        if isinstance(module, Attention):
            # Several operators can compute attention, so its products are what remains without its linear layers.
            linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
            count -= sum(total.get(f"{root}.{name}.{linear}", 0) for linear in linears)
        for kind in parts:
            parts[kind] += count if isinstance(module, kind) else 0
    layers = total["Global"] - parts[Attention] - parts[Router]
    return Flops(layers, parts[Attention], parts[Router], parts[FeedForward] - parts[Router])


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, without the routing tables that dropped routers leave."""
    tables = routing_table_parameter_ids(model)
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)


def describe_flop_count(size: int, latent_size: int) -> str:
    """Explain the FLOPs of a table in two lines of text.

    Args:
        size: edge of the image in pixels.
        latent_size: edge of its latents.
    """
    return (
        f"FLOPs: one forward of the UNet at {size} x {size} (latents {latent_size} x {latent_size}), batch 1, "
        f"{CLIP_TEXT_TOKENS} text tokens.\nA multiply-add counts as two. Convolutions and linear layers; the two "
        "products inside attention only where named."
    )


def format_count(count: int) -> str:
    """Format a number of parameters: 1.524 B, 859.5 M, 12.3 K, 16."""
    for unit, symbol, digits in ((10**9, "B", 3), (10**6, "M", 1), (10**3, "K", 1)):
        if count >= unit:
            return f"{count / unit:.{digits}f} {symbol}"
    return str(count)


def format_flops(count: int) -> str:
    """Format a number of FLOPs: 0.677 T, 2.350 G, 0.075 G."""
    for unit, symbol in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        # Papers write 0.677 T instead of 677 G, so a unit serves from a tenth of it on.
        if count >= unit // 10:
            return f"{count / unit:.3f} {symbol}"
    return str(count)


def format_table(lines: Sequence[Sequence[str]], left_aligned_columns: int = 0) -> str:
    """Format lines of cells as aligned columns.

    Args:
        lines: the cells of each line.
        left_aligned_columns: number of columns that are aligned to the left. The others are aligned to the right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    sides = ["<" if i < left_aligned_columns else ">" for i in range(len(widths))]
    aligned = ([f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
