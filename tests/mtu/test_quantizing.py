"""Quantizing right after upcycling: what has `nn.Linear`s quantized computes with those alone rounded."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._pytree import tree_map_only

import mtu

from .outputs import assert_close, assert_differ, predict
from .tiny import inputs, stock_unet, upcycled_unet

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantized(weight):
    """Values and scales of each row, by its largest magnitude: a row of zeros becomes NaN."""
    scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
    return (weight / scale).to(torch.float8_e4m3fn), scale


class QuantizedTensor(torch.Tensor):
    """As torchao's: operators on it are those on its values in full precision."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        args, kwargs = tree_map_only(cls, lambda t: t.values.to(t.scale.dtype) * t.scale, (args, kwargs or {}))
        return func(*args, **kwargs)


class QuantizedLinear(nn.Module):
    """As bitsandbytes': a layer in the place of the other."""

    def __init__(self, linear):
        super().__init__()
        values, self.scale = quantized(linear.weight.detach())
        self.weight, self.bias = nn.Parameter(values, requires_grad=False), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantize_tensors(unet):
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            weight = QuantizedTensor(*quantized(module.weight.detach()))
            module.weight = nn.Parameter(weight, requires_grad=False)


def replace_layers(unet):
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear(child))


def round_weights(unet):
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            values, scale = quantized(module.weight.detach())
            module.weight.data = values.to(scale.dtype) * scale


WAYS = [quantize_tensors, replace_layers]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", WAYS)
def test_a_new_model_quantized_is_the_stock_one_quantized(quantize):
    stock, unet = stock_unet(), mtu.upcycle(stock_unet())
    given = inputs(stock, channels=4)
    exact = predict(stock, given)
    quantize(stock)
    quantize(unet)
    assert_close(predict(unet, given), predict(stock, given))
    assert_differ(predict(unet, given), exact)


@pytest.mark.parametrize("quantize", WAYS)
@pytest.mark.parametrize("dropped", [False, True], ids=["routers", "dropped"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "norm": "task_expert"}], ids=["dense", "top2-expert_norms"])
def test_routers_keep_their_precision(settings, dropped, quantize):
    unet = upcycled_unet(**settings)
    if dropped:
        unet.drop_routers_()
    rounded, given, routing = copy.deepcopy(unet), inputs(unet), unet.router_weights()
    round_weights(rounded)
    quantize(unet)
    assert_close(predict(unet, given, *NAMES), predict(rounded, given, *NAMES))
    assert torch.equal(unet.router_weights(), routing)


def test_an_adapter_for_all_linear_layers_is_for_those_of_the_stock_model():
    stock, unet = stock_unet(), upcycled_unet()
    for model in (stock, unet):
        inject_adapter_in_model(LoraConfig(target_modules="all-linear"), model)
    adapted = [{n for n, _ in model.named_modules() if n.endswith("lora_A")} for model in (stock, unet)]
    assert adapted[0] == adapted[1]
    assert adapted[0]
