"""Whether a model is in memory as plain tensors, and its tensors where it is not.

Offloading keeps parameters in a map or on disk, layerwise casting in another dtype, adapters and quantizers behind
other modules: who reads or replaces parameters asks here first.
"""

from collections.abc import Container, Iterator, Mapping
from typing import TypeVar

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mtu.compat import private_interfaces
from mtu.compat.plain_linear import is_replaced
from mtu.compat.private_interfaces import (
    has_accelerate_hook,
    has_diffusers_hook,
    is_adapter,
    is_grouped,
    is_own_of_adapter,
    tensors_on_disk,
    weight_maps,
    weights_return,
)

__all__ = [
    "check_loadable",
    "check_no_group_hooks",
    "check_no_hooks",
    "check_plain",
    "check_saveable",
    "check_trainable",
    "check_values",
    "in_memory",
    "is_cast",
    "is_grouped_on_disk",
    "read_tensors",
    "without_adapters",
]

Model = TypeVar("Model", bound=UNet2DConditionModel)


def check_no_hooks(module: nn.Module, action: str) -> None:
    """Raise a ValueError if a module is offloaded: what is written to its parameters would not reach its calls.

    Args:
        action: what is about to be done, the subject of the message.
    """
    offloaded = [m for m in module.modules() if any(True for _ in weight_maps(m))]
    if offloaded:
        way_back = "call accelerate.hooks.remove_hook_from_module(unet, recurse=True) first"
        if not all(map(weights_return, offloaded)):
            way_back = "load the model without a device_map"
        raise ValueError(
            f"{action} needs a model that is wholly in memory, but {len(offloaded)} modules are offloaded by "
            f"accelerate: do it beforehand, or {way_back}."
        )
    check_no_group_hooks(module, action)


def check_no_group_hooks(module: nn.Module, action: str) -> None:
    """Raise a ValueError if a module is under group offloading, which keeps lists of the parameters that it had."""
    grouped = sum(is_grouped(m) for m in module.modules())
    if grouped:
        raise ValueError(
            f"{action} needs a model that is wholly in memory, but {grouped} modules are under group offloading, which "
            "diffusers does not take back: do it before enable_group_offload."
        )


def check_loadable(module: nn.Module, values: Mapping[str, Tensor], action: str, *, assign: bool) -> None:
    """Raise a ValueError if values that are loaded into the tensors of these names would be lost.

    Args:
        values: those to load; an offloaded model takes them for what is in memory (new adapters).
        action: the subject of the message.
        assign: whether tensors are replaced, not written to.
    """
    elsewhere = tensors_on_disk(module)
    lost = 0
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in values:
            continue
        if id(tensor) in elsewhere or (tensor.is_meta and _offloaded_value(module, name) is not None):
            lost += 1
        elif tensor.is_meta and not values[name].is_meta and not assign:
            raise ValueError(
                f"{action} needs parameters with values, but {name} is on the meta device: pass assign=True."
            )
    if lost:
        raise ValueError(
            f"{action} needs a model that is wholly in memory, but {lost} of these tensors are offloaded: do "
            "it beforehand."
        )


def check_trainable(module: nn.Module, action: str) -> None:
    """Raise a ValueError if what an optimizer writes to parameters would not reach calls, or be rounded each time."""
    check_no_hooks(module, action)
    if is_cast(module):
        raise ValueError(
            f"{action} needs weights in the dtype that they are computed in, but this model is under layerwise "
            "casting, which diffusers does not take back: do it before enable_layerwise_casting."
        )


def check_plain(module: nn.Module, action: str) -> None:
    """Raise a ValueError if layers are wrapped or replaced (adapters), or hold no plain tensors (quantization)."""
    for name, layer in module.named_modules():
        if is_adapter(layer):
            raise ValueError(
                f"Unload adapters, or fuse and then unload them, before {action}: {name} is a {type(layer).__name__} "
                "of peft."
            )
        if is_replaced(layer) and not (has_accelerate_hook(layer) or has_diffusers_hook(layer)):
            raise ValueError(
                f"Unload adapters before {action}: the forward of {name or 'the model'} is not that of its "
                f"{type(layer).__name__}."
            )
        if getattr(layer, "has_integer_parameters", False):
            continue  # as routing tables have by nature, and not by quantization
        for key, parameter in layer.named_parameters(recurse=False):
            if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
                kind = "sharded or quantized" if is_traceable_wrapper_subclass(parameter) else "quantized"
                raise ValueError(
                    f"{action} needs plain tensors, but {name}.{key} is a {kind} {type(parameter).__name__} of "
                    f"{parameter.dtype}: do it with the model as it was before."
                )


def check_values(module: nn.Module, action: str) -> None:
    """Raise a ValueError if parameters are on the meta device and no offloading holds their values."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta and _offloaded_value(module, name) is None:
            raise ValueError(f"{action} needs parameters with values, but {name} is on the meta device: load it first.")


def is_cast(module: nn.Module) -> bool:
    """Whether layerwise casting stores weights in another dtype than they are computed in."""
    return any(map(private_interfaces.is_cast, module.modules()))


def is_grouped_on_disk(module: nn.Module) -> bool:
    """Whether group offloading keeps values on disk, and no values in the parameters between calls."""
    return bool(tensors_on_disk(module))


def read_tensors(module: nn.Module, names: Container[str] | None = None) -> dict[str, Tensor]:
    """The state dict, with values also where offloading keeps them elsewhere; what is stored rounded stays so.

    Args:
        names: those to read; None: all.
    """
    on_disk, files = tensors_on_disk(module), {}
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if names is not None and name not in names:
            continue
        if tensor.is_meta:
            value = _offloaded_value(module, name)
            tensor = tensor if value is None else value.to(tensor.dtype)
        elif id(tensor) in on_disk:
            path, key = on_disk[id(tensor)]
            if path not in files:
                files[path] = safe_open(path, framework="pt")
            tensor = files[path].get_tensor(key)
        tensors[name] = tensor.detach()
    return tensors


def in_memory(unet: Model, *, computed: bool = False) -> Model:
    """The model itself if its parameters are at hand, else a copy of it on real tensors.

    The copy has no hooks, and shares the memory of what is in memory. Without offloading, a model on the meta device is
    taken for what it is.

    Args:
        computed: whether weights are needed in the dtype that they are computed in, not in that of their storage.
    """
    is_offloaded = any(True for module in unet.modules() for _ in weight_maps(module)) or bool(tensors_on_disk(unet))
    to_cast = computed and is_cast(unet)
    if not (is_offloaded or to_cast):
        return unet
    with init_empty_weights():
        copy = type(unet)(**{key: value for key, value in unet.config.items() if not key.startswith("_")})
    tensors = read_tensors(unet)
    different = copy.state_dict().keys() ^ tensors.keys()
    if different:
        raise ValueError(
            f"Unload adapters and unfuse projections before reading an offloaded model: {len(different)} tensors are "
            f"not those of its configuration, for example {min(different)!r}."
        )
    copy.load_state_dict(tensors, assign=True)
    copy.train(unet.training)
    return copy.to(unet.dtype) if to_cast else copy


def without_adapters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters, without those that adapters add."""
    adapters = [name for name, m in module.named_modules() if is_adapter(m)]
    for name, parameter in module.named_parameters():
        if not any(is_own_of_adapter(name, adapter) for adapter in adapters):
            yield name, parameter


def check_saveable(unet: UNet2DConditionModel, action: str) -> None:
    """Raise a ValueError if layers are wrapped, quantized by hand, or without values: no file of it could be loaded."""
    if getattr(unet, "hf_quantizer", None) is None:
        check_plain(unet, action)
    check_values(unet, action)


def _offloaded_value(module: nn.Module, name: str) -> Tensor | None:
    """The value of a tensor that accelerate offloads; None if it is not known."""
    parts = name.split(".")
    # The hook is on the tensor's own module, or on one around it.
    for depth in reversed(range(len(parts))):
        for weights in weight_maps(module.get_submodule(".".join(parts[:depth]))):
            try:
                return weights[".".join(parts[depth:])]
            except KeyError:
                continue
    return None
