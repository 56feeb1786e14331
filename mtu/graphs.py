"""CUDA graphs of a UNet's calls, and how it is seen that a model is no longer what they were made from."""

import functools
import gc
import operator
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mtu.router import Router
from mtu.unet import MTUUNet2DConditionModel

__all__ = ["Capture", "Inputs", "Parts", "Replay", "Step", "cuda_graphs"]

# Calls before a capture: the first compiles, the others let libraries choose algorithms and make workspaces.
_CALLS_BEFORE_CAPTURE = 3

Inputs = dict[str, Any]
Step = Callable[[Inputs], Tensor]
# Runs a step on tensors that stay where they are; returns what runs it again, and the tensor that it writes.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class Replay:
    """A step in a graph, which reads from and writes to tensors of its own."""

    def __init__(self, step: Step, inputs: Inputs, capture: Capture) -> None:
        self._inputs = tree_map_only(Tensor, torch.clone, inputs)
        self._tensors = _tensors(self._inputs)
        self._replay, self._output = capture(functools.partial(step, self._inputs))

    def __call__(self, inputs: Inputs) -> Tensor:
        for to, tensor in zip(self._tensors, _tensors(inputs), strict=True):
            to.copy_(tensor)
        self._replay()
        return self._output.clone()


class Parts:
    """What compiled code and graphs were made from, to be told apart from what the model holds now.

    A graph reads memory by address: a parameter that was replaced, or a module (by an adapter), must not go unseen. It
    is looked at before each call, so the loops over a thousand parts are those of built-in functions.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.routers: list[Router] = unet.routers() if isinstance(unet, MTUUNet2DConditionModel) else []
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        for module in unet.modules():
            # Attention processors and backends are chosen by plain attributes.
            chosen = {name: value for name, value in vars(module).items() if name in ("processor", "backend")}
            for owner, names in (
                (module._parameters, module._parameters),
                (module._buffers, module._buffers),
                (module._modules, module._modules),
                (vars(module), chosen),
            ):
                self._owners += [owner] * len(names)
                self._names += names
        # Kept alive here, so that no other part can get the identity of one that is gone.
        self._parts = self._found()
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = self._found_addresses()

    def are_current(self) -> bool:
        """Whether the model holds them still, and their memory is where it was."""
        return all(map(operator.is_, self._found(), self._parts)) and self._found_addresses() == self._addresses

    def _found(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def _found_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))


def cuda_graphs(device: torch.device) -> Capture:
    """Makes CUDA graphs that share their memory: they run one after the other, and their results are copied out."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_CALLS_BEFORE_CAPTURE):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            # Collecting a CUDA object breaks the capture that it happens in.
            gc.collect()
            gc.disable()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    output = step()
            finally:
                gc.enable()
        return graph.replay, output

    return capture


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
