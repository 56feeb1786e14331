"""The settings of a UNet besides its weights: they are copied to the UNet that is made from it, or refused.

Weights are moved by `mtu.upcycling` and `mtu.models.folding`.
"""

import copy
import inspect
import types
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import Tensor, nn

from mtu.compat.private_interfaces import (
    CONFIG_METADATA_KEYS,
    FEED_FORWARD_CHUNK_ATTRIBUTES,
    FUSED_PROJECTION_ATTRIBUTES,
    FUSED_PROJECTION_NAMES,
    MODEL_CLASS_ATTRIBUTES,
    RUNTIME_ATTRIBUTES,
    feed_forward_chunk_size_and_dim,
)
from mtu.models.conv_in import TaskConvIn
from mtu.models.ffn import RoutedFeedForward, RoutedTransformerBlock
from mtu.models.norm import TaskAffineTable

__all__ = ["copy_settings_", "unfused_state_dict"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# These attributes belong to the classes or widths in which upcycled and stock modules differ. They are no settings.
_OF_CLASS = {"num_experts", "backend", "_consecutive_blocks", "in_features", "out_features"}
_IGNORED = {
    *vars(nn.Module()),
    *RUNTIME_ATTRIBUTES,
    *FUSED_PROJECTION_ATTRIBUTES,
    *MODEL_CLASS_ATTRIBUTES,
    *FEED_FORWARD_CHUNK_ATTRIBUTES,
    *_OF_CLASS,
}
# The stock class that each upcycled module replaces.
_STOCK = {
    RoutedTransformerBlock: BasicTransformerBlock,
    RoutedFeedForward: FeedForward,
    TaskAffineTable: nn.LayerNorm,
    TaskConvIn: nn.Conv2d,
}


def copy_settings_(source: UNet2DConditionModel, target: UNet2DConditionModel) -> None:
    """Copy the settings of `source` to `target`, of which one is an upcycled UNet and the other a stock one.

    The settings are attention processors (with their backends), FreeU, gradient checkpointing with its function, chunks
    of the feed-forward networks, the training mode of each module, entries of the configuration, and other attributes.
    Settings that cannot be copied raise an error before anything changes. Compiled code and offloading are no settings:
    apply them to the new UNet again.

    Args:
        source: the UNet with the settings.
        target: the UNet that gets them; changed in place.

    Raises:
        ValueError: the source has hooks, replaced methods or modules, fused projections, chunks of the batch, or an
            input convolution with other padding.
    """
    if any(isinstance(processor, FusedAttnProcessor2_0) for processor in source.attn_processors.values()):
        raise ValueError("Fused projections cannot be carried over: call unfuse_qkv_projections first.")
    ours, theirs = dict(source.named_modules()), dict(target.named_modules())
    changes = []
    for name, module in ours.items():
        _check_hooks(name, module)
        other = theirs.get(name)
        if other is not None:
            changes += [(other, key, value) for key, value in _changed(name, module, other)]
            if isinstance(other, TaskAffineTable):
                # The feed-forward network beside the norm computes the normalisation.
                changes.append((theirs[f"{name.rpartition('.')[0]}.ff"], "eps", module.eps))
    chunks = {name: _chunk_size(name, m) for name, m in ours.items() if isinstance(m, BasicTransformerBlock)}

    for module, key, value in changes:
        setattr(module, key, value)
    for name, size in chunks.items():
        if size is not None:
            theirs[name].set_chunk_feed_forward(size, dim=1)
    processors = source.attn_processors
    if not _is_routed(target):
        # Copies keep the two UNets independent: a backend that is chosen later for one must not apply to the other.
        processors = {name: copy.copy(processor) for name, processor in processors.items()}
    target.set_attn_processor(processors)
    for name, module in target.named_modules():
        while name not in ours:
            name = name.rpartition(".")[0]
        module.training = ours[name].training
    known = {*inspect.signature(type(source).__init__).parameters, *target.config, *CONFIG_METADATA_KEYS}
    target.register_to_config(**{key: value for key, value in source.config.items() if key not in known})


def unfused_state_dict(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The state dict without the fused copies of attention projections, which diffusers keeps after unfusing."""
    return {k: tensor for k, tensor in unet.state_dict().items() if not any(p in k for p in FUSED_PROJECTION_NAMES)}


def _check_hooks(name: str, module: nn.Module) -> None:
    where = name or type(module).__name__
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"Hooks cannot be carried over: remove those of {where} first, and add them afterwards.")
    for key, parameter in module.named_parameters(recurse=False):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"Hooks cannot be carried over: remove those of the parameter {where}.{key} first.")


def _changed(name: str, module: nn.Module, other: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module that differ from those of its counterpart in a new model."""
    expected = _STOCK.get(type(other), type(other))
    if name and type(module) is not expected and not _is_routed(module):
        # A subclass is refused, too, because its own behaviour would be lost.
        raise ValueError(f"{name} is a {type(module).__name__}, but the UNet's configuration says {expected.__name__}.")
    if isinstance(module, TaskAffineTable) or isinstance(other, TaskAffineTable):
        return [("eps", module.eps)]
    if isinstance(module, TaskConvIn):
        return []
    if isinstance(other, TaskConvIn):
        _check_conv_in(module)
        return []
    changed = []
    for key, value in vars(module).items():
        if key in _IGNORED or _are_equal(value, vars(other).get(key, _IGNORED)):
            continue
        if key == "eps" and _is_routed(module):
            continue  # The task LayerNorm has the same eps.
        is_method = isinstance(value, types.MethodType) and value.__self__ is module
        if is_method or (callable(value) and inspect.isroutine(getattr(type(module), key, None))):
            raise ValueError(f"{name or type(module).__name__}.{key} was replaced, which cannot be carried over.")
        changed.append((key, copy.copy(value) if isinstance(value, dict | list | set) else value))
    return changed


def _check_conv_in(conv: Any) -> None:
    """Raise a ValueError unless an input convolution keeps the size by padding with zeros, as `TaskConvIn` does."""
    padding = [size // 2 for size in conv.kernel_size]
    kept = nn.Conv2d(1, 1, conv.kernel_size, padding=padding, device="meta")
    for key in ("padding_mode", "padding", "stride", "dilation", "groups"):
        if getattr(conv, key) != getattr(kept, key):
            raise ValueError(
                f"conv_in cannot be one convolution per task: expected {key} = {getattr(kept, key)!r}, but got "
                f"{getattr(conv, key)!r}."
            )


def _is_routed(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "mtu"


def _are_equal(value: Any, other: Any) -> bool:
    comparable = type(value) is type(other) and not isinstance(value, Tensor)
    return value is other or (comparable and bool(value == other))


def _chunk_size(name: str, block: BasicTransformerBlock) -> int | None:
    """The number of tokens in each chunk that a block's feed-forward network runs on; None: all at once."""
    size, dim = feed_forward_chunk_size_and_dim(block)
    if size is not None and dim != 1:
        raise ValueError(
            f"A routed feed-forward network can be chunked over tokens (dim=1) only, but {name} has {dim}."
        )
    return size
