"""Checks before mtu reads or replaces parameters, and access to values that are not in the parameters.

Offloading keeps values in a map or on disk, layerwise casting keeps them in another dtype, and adapters and quantizers
put other modules around them. The private attributes by which this is found out live in
`mtu.compat.private_interfaces`.

Each check takes the model and the name of the operation that needs it, which its message begins with.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mtu.compat import private_interfaces
from mtu.compat.plain_linear import has_replaced_forward
from mtu.compat.private_interfaces import (
    accelerate_offloaded_weight_maps,
    disk_locations_of_group_offloaded_tensors,
    does_hook_removal_restore_weights,
    has_accelerate_hook,
    has_diffusers_hook,
    has_group_offloading_hook,
    is_adapter_parameter,
    is_peft_wrapper,
)

__all__ = [
    "call_with_whole_parameters",
    "check_has_values",
    "check_loadable",
    "check_not_group_offloaded",
    "check_not_offloaded",
    "check_plain_layers",
    "check_saveable",
    "check_trainable",
    "copy_unless_in_memory",
    "is_group_offloaded_to_disk",
    "named_parameters_without_adapters",
    "state_dict_with_offloaded_values",
    "uses_layerwise_casting",
]

Model = TypeVar("Model", bound=UNet2DConditionModel)


def check_not_offloaded(module: nn.Module, action: str) -> None:
    """Raise a ValueError if a module is offloaded, because its calls would not use values written to its parameters."""
    offloaded = [m for m in module.modules() if any(True for _ in accelerate_offloaded_weight_maps(m))]
    if offloaded:
        way_back = "call accelerate.hooks.remove_hook_from_module(unet, recurse=True) first"
        if not all(map(does_hook_removal_restore_weights, offloaded)):
            way_back = "load the model without a device_map"
        raise ValueError(
            f"{action} needs a model that is wholly in memory, but accelerate offloads {len(offloaded)} modules: call "
            f"it before offloading, or {way_back}."
        )
    check_not_group_offloaded(module, action)


def check_not_group_offloaded(module: nn.Module, action: str) -> None:
    """Raise a ValueError if a module is under group offloading, which keeps lists of the module's old parameters."""
    grouped = sum(has_group_offloading_hook(m) for m in module.modules())
    if grouped:
        raise ValueError(
            f"{action} needs a model that is wholly in memory, but {grouped} modules are under group offloading, which "
            "diffusers cannot undo: call it before enable_group_offload."
        )


def check_loadable(module: nn.Module, values: Mapping[str, Tensor], action: str, *, assign: bool) -> None:
    """Raise a ValueError if values would be lost when they are loaded into a model.

    Args:
        module: the model; values for tensors in memory, such as those of new adapters, are fine in an offloaded one.
        values: the values to load, by the names of the tensors.
        action: the name of the operation, for the message.
        assign: whether the values replace the tensors, or are written to them.
    """
    elsewhere = disk_locations_of_group_offloaded_tensors(module)
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
            f"{action} needs a model that is wholly in memory, but {lost} of these tensors are offloaded: "
            "call it before offloading."
        )


def check_trainable(module: nn.Module, action: str) -> None:
    """Raise a ValueError if calls would not use, or would round, the values that an optimizer writes to parameters."""
    check_not_offloaded(module, action)
    if uses_layerwise_casting(module):
        raise ValueError(
            f"{action} needs weights in the dtype that layers compute in, but this model is under layerwise casting, "
            "which diffusers cannot undo: call it before enable_layerwise_casting."
        )


def check_plain_layers(module: nn.Module, action: str) -> None:
    """Raise a ValueError if layers are wrapped or replaced (adapters), or hold no plain tensors (quantization)."""
    for name, layer in module.named_modules():
        if is_peft_wrapper(layer):
            raise ValueError(
                f"Unload adapters, or fuse and then unload them, before {action}: {name} is a {type(layer).__name__} "
                "of peft."
            )
        if has_replaced_forward(layer) and not (has_accelerate_hook(layer) or has_diffusers_hook(layer)):
            raise ValueError(
                f"Unload adapters before {action}: the forward of {name or 'the model'} is not that of its "
                f"{type(layer).__name__}."
            )
        if getattr(layer, "has_integer_parameters", False):
            continue  # The integers of routing tables are no sign of quantization.
        for key, parameter in layer.named_parameters(recurse=False):
            if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
                kind = "sharded or quantized" if is_traceable_wrapper_subclass(parameter) else "quantized"
                raise ValueError(
                    f"{action} needs plain tensors, but {name}.{key} is a {kind} {type(parameter).__name__} of "
                    f"{parameter.dtype}: use the model as it was before that."
                )


def check_has_values(module: nn.Module, action: str) -> None:
    """Raise a ValueError if parameters are on the meta device and no offloading keeps their values."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta and _offloaded_value(module, name) is None:
            raise ValueError(f"{action} needs parameters with values, but {name} is on the meta device: load it first.")


def uses_layerwise_casting(module: nn.Module) -> bool:
    """Whether layerwise casting stores weights of a model in another dtype than the layers compute in."""
    return any(map(private_interfaces.has_layerwise_casting_hook, module.modules()))


def is_group_offloaded_to_disk(module: nn.Module) -> bool:
    """Whether group offloading keeps values of a model on disk, and none in its parameters between calls."""
    return bool(disk_locations_of_group_offloaded_tensors(module))


def state_dict_with_offloaded_values(module: nn.Module, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Read the state dict, also values that offloading keeps elsewhere, in the dtypes that they are stored in.

    Args:
        module: the model.
        names: the tensors to read; None: all.

    Returns:
        The tensors, by name.
    """
    on_disk, files = disk_locations_of_group_offloaded_tensors(module), {}
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


def copy_unless_in_memory(unet: Model, *, in_compute_dtype: bool = False) -> Model:
    """Return the model itself if its values are in its parameters, else a copy with values.

    The copy has no hooks, and shares memory with the tensors that are in memory. A model on the meta device that is not
    offloaded is returned as it is.

    Args:
        unet: the model.
        in_compute_dtype: return the weights in the dtype that layers compute in, not in that of layerwise casting.

    Returns:
        The model or its copy.

    Raises:
        ValueError: the offloaded model has adapters or fused projections.
    """
    is_offloaded = is_group_offloaded_to_disk(unet) or any(
        True for module in unet.modules() for _ in accelerate_offloaded_weight_maps(module)
    )
    to_cast = in_compute_dtype and uses_layerwise_casting(unet)
    if not (is_offloaded or to_cast):
        return unet
    with init_empty_weights():
        copy = type(unet)(**{key: value for key, value in unet.config.items() if not key.startswith("_")})
    tensors = state_dict_with_offloaded_values(unet)
    different = copy.state_dict().keys() ^ tensors.keys()
    if different:
        raise ValueError(
            f"Unload adapters and unfuse projections before reading an offloaded model: {len(different)} tensors are "
            f"not those of its configuration, for example {min(different)!r}."
        )
    copy.load_state_dict(tensors, assign=True)
    copy.train(unet.training)
    return copy.to(unet.dtype) if to_cast else copy


def call_with_whole_parameters(module: nn.Module, *arguments: Any) -> Any:
    """Call a module of a model that `fully_shard` may have sharded, outside the call of the module that gathers it.

    If the model is sharded, all processes must call this.

    Args:
        module: the module.
        *arguments: the arguments of its forward.

    Returns:
        What the module returns.
    """
    sharded = {name: p.full_tensor() for name, p in module.named_parameters() if hasattr(p, "full_tensor")}
    return functional_call(module, sharded, arguments) if sharded else module(*arguments)


def named_parameters_without_adapters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the names and parameters of a model, without those that adapters add."""
    adapters = [name for name, m in module.named_modules() if is_peft_wrapper(m)]
    for name, parameter in module.named_parameters():
        if not any(is_adapter_parameter(name, adapter) for adapter in adapters):
            yield name, parameter


def check_saveable(unet: UNet2DConditionModel, action: str) -> None:
    """Raise a ValueError if no saved file of a model could be loaded.

    That is so if layers are wrapped, have no values, or were quantized without a quantizer of diffusers.

    Args:
        unet: the model.
        action: the name of the operation, for the message.
    """
    if getattr(unet, "hf_quantizer", None) is None:
        check_plain_layers(unet, action)
    check_has_values(unet, action)


def _offloaded_value(module: nn.Module, name: str) -> Tensor | None:
    """The value of a tensor that accelerate offloads; None if it offloads no such tensor."""
    parts = name.split(".")
    # The hook is on the module of the tensor, or on a module around that.
    for depth in reversed(range(len(parts))):
        for weights in accelerate_offloaded_weight_maps(module.get_submodule(".".join(parts[:depth]))):
            try:
                return weights[".".join(parts[depth:])]
            except KeyError:
                continue
    return None
