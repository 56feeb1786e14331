"""When the tensors of a layer may be read directly, instead of calling the layer."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["is_plain_linear", "is_replaced"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is `x Wᵀ + b` with its own `weight` and `bias`, and nothing else.

    What changes the meaning of a call shows as another type (PEFT, bitsandbytes), a hook, a replaced forward
    (offloading, LyCORIS), another dtype (layerwise casting), a tensor subclass (torchao), or as tensors that are not
    there: then the layer itself is called.
    """
    own = vars(module)
    # Sharding keeps them as plain attributes; what wraps a layer may have taken them away altogether.
    weight, bias = (own["_parameters"].get(name, own.get(name)) for name in ("weight", "bias"))
    return (
        type(module) is nn.Linear
        and weight is not None
        and bias is not None
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and not is_replaced(module)
        and weight.dtype in _DTYPES
        and not is_traceable_wrapper_subclass(weight)
    )


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is another than that of its class."""
    forward = vars(module).get("forward")
    # Taking a hook off leaves the class's own behind.
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
