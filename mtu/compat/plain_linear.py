"""The linear layers of routers, and when the tensors of a linear layer may be read directly, instead of calling it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["RouterLinear", "has_replaced_forward", "has_unmodified_call", "is_plain_linear", "skip_8bit_casts"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RouterLinear(nn.Module):
    """A linear layer `x Wᵀ + b` of a router, computed in the dtype of its weight; starts as `nn.Linear` does.

    It is no `nn.Linear`, and so quantizers, layerwise casting and adapters for "all linear layers" leave it alone: what
    is rounded in a router changes what every token of a task gets, or with top-k which experts, and saves next to
    nothing. Quantizers by the largest magnitude also divide by it, which is zero in the last layer of a new router.

    Args:
        in_features: of the input.
        out_features: of the output.

    Parameters: weight (out_features, in_features), bias (out_features).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The product with each row of `x` (..., in_features): (..., out_features)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(skip_8bit_casts(fn), recurse)


def skip_8bit_casts(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply`, but for casts to eight bits, as which layerwise casting stores whole models.

    Routing weights from such routers pick other experts with top-k.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype.itemsize > 1 else tensor.to(result.device)

    return moved


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
    """Whether calling a module runs the forward of its class, here, and nothing before or after it."""
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own.get("_compiled_call_impl") is not None
        or has_replaced_forward(module)
    )


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether a module's forward is another than that of its class."""
    forward = vars(module).get("forward")
    # Taking a hook off leaves the class's own behind.
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
