"""Counting parameters and FLOPs of a model on the meta device."""

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtu.example_inputs import make_example_inputs
from mtu.models.router import Router, routing_table_parameter_ids

__all__ = ["Flops", "count_flops", "count_parameters"]


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
