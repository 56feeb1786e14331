"""Kernels of compiled blocks and UNets, counted without a GPU: an upcycled block launches no more than a stock one."""

import pytest
import torch

from benchmarks import launch_count
from benchmarks.fake_gpu import Generated, Operator
from benchmarks.launch_count import Subject, count, launches_of, recorded

# Kernels are interpreted where there is no GPU, and bfloat16 is not served there. Inductor fuses both alike.
DTYPE = "fp16"


def counts(part):
    return [count(Subject(part, contender, DTYPE, 640, 1024)) for contender in ("stock", "triton")]


def test_the_feed_forward():
    stock, upcycled = counts("feed-forward")
    # LayerNorm, product, GEGLU, product, residual.
    assert [len(kernels) for kernels in stock] == [3, 2, 0]
    # The gather of the routing weights, LayerNorm with those of γ and β, residual; the second product; all of GEGLU.
    assert [len(kernels) for kernels in upcycled] == [3, 1, 1]
    assert upcycled.ours[0].startswith("expert_in")
    assert len([name for name in upcycled.generated if "native_layer_norm" in name and "_per_" in name]) == 1


def test_the_block():
    stock, upcycled = counts("block")
    # Six products and one attention in each attention layer, two products in the feed-forward.
    assert len(stock.library) == 2 * 6 - 2 + 2 == len(upcycled.library) + 1
    assert stock.total == 17 >= upcycled.total
    # The residual of attention is part of the LayerNorm behind it, in both.
    for launches in (stock, upcycled):
        norms = [name for name in launches.generated if "native_layer_norm" in name and "_per_" in name]
        assert len(norms) == 3
        assert [("add" in name) for name in norms] == [False, True, True]
