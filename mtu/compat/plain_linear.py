"""The linear layers of routers, and the conditions under which reading a layer's tensors may replace calling it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["RouterLinear", "has_replaced_forward", "has_unmodified_call", "is_plain_linear", "wrap_to_skip_8bit_casts"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RouterLinear(nn.Module):
    """A linear layer `x Wᵀ + b` of a router, computed in the dtype of its weight; starts as `nn.Linear` does.

    It is no `nn.Linear`, so that quantizers, layerwise casting and adapters for "all linear layers" leave it alone.
    Rounding a router changes the result for every token of a task, or with top-k the choice of experts, and saves
    almost no memory. Some quantizers also divide by the largest magnitude of a weight, which is zero in the last layer
    of a new router.

    Args:
        in_features: the width of the input.
        out_features: the width of the output.

    Parameters: weight (out_features, in_features), bias (out_features).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (..., in_features); returns (..., out_features)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(wrap_to_skip_8bit_casts(fn), recurse)


def wrap_to_skip_8bit_casts(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap an argument of `nn.Module._apply` so that it does not cast to dtypes of eight bits.

    Layerwise casting can store whole models in eight bits. Routers that are rounded so pick other experts with top-k.

    Args:
        fn: the function that `_apply` calls for each tensor.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype.itemsize > 1 else tensor.to(result.device)

    return moved


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` computes `x Wᵀ + b` with its own `weight` and `bias`, and does nothing else.

    Otherwise the layer must be called. Libraries change the meaning of a call by another type (PEFT, bitsandbytes), a
    hook, a replaced forward (offloading, LyCORIS), another dtype (layerwise casting), a tensor subclass (torchao), or
    by removing the tensors.
    """
    own = vars(module)
    # Sharding keeps them as plain attributes, and a wrapper may have removed them.
    weight, bias = (own["_parameters"].get(name, own.get(name)) for name in ("weight", "bias"))
    return (
        type(module) in (nn.Linear, RouterLinear)
        and weight is not None
        and bias is not None
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and not has_replaced_forward(module)
        and weight.dtype in _DTYPES
        and not is_traceable_wrapper_subclass(weight)
    )


def has_unmodified_call(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class, uncompiled and without hooks."""
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own.get("_compiled_call_impl") is not None
        or has_replaced_forward(module)
    )


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own in the place of that of its class."""
    forward = vars(module).get("forward")
    # Removing a hook of accelerate leaves the class's own forward as an attribute of the module.
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
