"""When the tensors of a layer may be read directly, instead of calling the layer."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["is_plain_linear", "is_replaced"]

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is `x Wᵀ + b` with its own `weight` and `bias`, and nothing else.

    What changes the meaning of a call shows as another type (PEFT, bitsandbytes), a hook, a replaced forward
    (offloading), another dtype (layerwise casting) or a tensor subclass (torchao): then the layer itself is called.
    """
    return (
        type(module) is nn.Linear
        and module.bias is not None
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOK_DICTS)
        and module.weight.dtype in _DTYPES
        and not is_traceable_wrapper_subclass(module.weight)
    )


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is another than that of its class."""
    forward = vars(module).get("forward")
    # Taking a hook off leaves the class's own behind.
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
