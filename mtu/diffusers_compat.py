"""What mtu relies on beyond the public interfaces of diffusers and accelerate: the one place that names it.

Each entry of `PRIVATE_WAYS` says what is used and why; `tests/mtu/test_diffusers_compat.py` has a test of that name,
which fails when another version of diffusers does it otherwise. Seen in diffusers 0.42.1 and accelerate 1.15.0.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

__all__ = ["PRIVATE_WAYS", "expand_block_scales", "with_stock_signature"]

PRIVATE_WAYS = {
    "block_scales": (
        "UNets' adapter scales by block are spread over their layers by `_maybe_expand_lora_scales`, which "
        "`set_adapters` looks up by the name of the UNet's class: a subclass has to call it by itself."
    ),
    "constructor_signature": (
        "The keys of a model's configuration are read off the signature of its constructor, where `**stock` must be "
        "spelled out."
    ),
}


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
