"""Exported programs are told from compiled ones, on every version of torch."""

import pytest
import torch

from mtu_kernels import available_backends, moe_ffn
from mtu_kernels.exporting import is_exporting

from .moe_ffn_cases import Sizes, make_problem


class Asks(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x


def test_compiled_code_is_not_exported():
    module, x = Asks(), torch.zeros(2)
    assert not is_exporting()
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), x)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_is(strict):
    module, x = Asks(), torch.zeros(2)
    program = torch.export.export(module, (x,), strict=strict)
    assert torch.equal(program.module()(x), x + 1)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the extension is not built")
def test_compiled_code_takes_the_fused_operator_by_itself(monkeypatch):
    monkeypatch.setattr("mtu_kernels.cpp.why_slow", lambda: None)  # on any processor
    # One by one: the compiler of torch 2.10 unpacks no property.
    (x, norm, experts, routing), targets = make_problem(sizes=Sizes(L=32)).arguments, []

    def keep(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(lambda: moe_ffn(x, norm, experts, routing), backend=keep, fullgraph=True)()
    assert [target for target in targets if "moe_ffn" in target] == ["mtu_kernels.moe_ffn_cpp.default"]
