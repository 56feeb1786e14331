"""UNets whose calls go through `CompiledUNetCalls`, and what they compute without."""

import pytest

from mtu.runtime.compiling import CompiledUNetCalls, ExecutionPlan

from ..outputs import predict
from ..recorded_graphs import RecordedGraphs
from ..tiny import randomise_

NAMES = ("remove", "text-to-image", "edit", "super-resolution", "edit")
MIXES = (NAMES, ("edit",) * 5, ("text-to-image",) * 5, ("text-to-image", "remove", "remove", "edit", "edit"))
# Traced like by the shipped plans, without the minutes that generating code takes.
TRACED, GRAPHS, BOTH = (
    ExecutionPlan({"backend": "eager"}, False),
    ExecutionPlan(None, True),
    ExecutionPlan({"backend": "eager"}, True),
)
SETTINGS = [
    pytest.param("sd", {}, id="sd-dense"),
    pytest.param("sd", {"num_experts": 4, "top_k": 2, "norm": "task_expert"}, id="sd-top2-expert_norms"),
    pytest.param("sdxl", {"num_experts": 1}, id="sdxl-dense"),
]


def compiled(unet, plan, max_cached_sizes=8):
    """The UNet through `CompiledUNetCalls`, and what counts its captures."""
    captures = RecordedGraphs()
    unet._compiled_call_impl = CompiledUNetCalls(unet, plan, max_cached_sizes, captures)
    return unet, captures


def plain(unet, given, *names, **more):
    """The output without `mtu.compile`."""
    calls, unet._compiled_call_impl = unet._compiled_call_impl, None
    try:
        return predict(unet, given, *names, **more)
    finally:
        unet._compiled_call_impl = calls


def update_routers(unet):
    randomise_([router.linear_2.weight for router in unet.routers()], seed=9)


def replace_data(unet):
    unet.conv_out.weight.data = unet.conv_out.weight.data * 2
