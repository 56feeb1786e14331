"""CUDA graphs of a UNet's calls, and how it is seen that a model is no longer what they were made from."""

import gc
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mtu.compat.plain_linear import has_replaced_forward
from mtu.compat.private_interfaces import is_peft_wrapper
from mtu.models.router import Router
from mtu.models.unet import MTUUNet2DConditionModel

__all__ = ["CapturedCall", "CudaGraphCapture", "GraphCapture", "ModelSnapshot", "UNetCall", "UNetInputs"]

# Plain attributes by which attention processors, backends, and FreeU's strengths are chosen.
_CHOSEN, _FREEU = {"backend", "processor"}, ("b1", "b2", "s1", "s2")
# Calls before a capture: the first compiles, the others let libraries choose algorithms and make workspaces.
_CALLS_BEFORE_CAPTURE = 3

UNetInputs = dict[str, Any]
UNetCall = Callable[[UNetInputs], Tensor]


class GraphCapture(Protocol):
    """Makes graphs that share memory."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run a step on tensors that stay where they are; return what runs it again, and the tensor that it writes."""
        ...

    def exclusive_use(self) -> AbstractContextManager[None]:
        """What a caller does within has the graphs' memory to itself, whatever other callers' streams still do."""
        ...

    def synchronize(self) -> None:
        """Have the host wait for all turns that ended, so that memory may be given back."""
        ...


class CapturedCall:
    """A UNet call captured in a graph, which reads and writes tensors of its own.

    Run it within `GraphCapture.exclusive_use`.
    """

    def __init__(self, step: UNetCall, inputs: UNetInputs, capture: GraphCapture) -> None:
        self._inputs = tree_map_only(Tensor, torch.clone, inputs)
        self._tensors = _tensors(self._inputs)
        # Kept, as a graph does not own the code that compiled kernels are loaded from.
        self._step = step
        self._replay, self._output = capture(self._run)

    def __call__(self, inputs: UNetInputs) -> Tensor:
        for to, tensor in zip(self._tensors, _tensors(inputs), strict=True):
            to.copy_(tensor)
        self._replay()
        return self._output.clone()

    def _run(self) -> Tensor:
        # Lists of its own each time: the stock forward takes out what it has used (of residuals of adapters).
        return self._step(tree_map(lambda leaf: leaf, self._inputs))


class ModelSnapshot:
    """What compiled code and graphs were made from, to be told apart from what the model holds now.

    A graph reads memory by address: a parameter that was replaced, or a module, must not go unseen. It is looked at
    before each call, so the loops over thousands of parts are those of built-in functions.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.routers: list[Router] = unet.routers() if isinstance(unet, MTUUNet2DConditionModel) else []
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._hooks: list[dict] = []
        modules = list(unet.modules())
        for module in modules:
            attributes = vars(module)
            # Offloading, casting and caching replace it.
            self._watch(attributes, ("forward",))
            self._watch(attributes, _CHOSEN & attributes.keys())
            for owner in (module._parameters, module._buffers, module._modules):
                self._watch(owner, owner)
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        for block in unet.up_blocks:
            self._watch(vars(block), _FREEU)
        self._why_not_compilable = _why_not_compilable(modules)
        # Kept alive here, so that no other part can get the identity of one that is gone.
        self._parts = self._found()
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = self._found_addresses()

    def why_not_compilable(self) -> str | None:
        """What neither graphs nor compiled code would heed, as a clause; None if there is nothing."""
        return "hooks are Python code" if any(self._hooks) else self._why_not_compilable

    def matches_model(self) -> bool:
        """Whether the model holds them still, and their memory is where it was."""
        return all(map(operator.is_, self._found(), self._parts)) and self._found_addresses() == self._addresses

    def _watch(self, owner: dict[str, Any], names: Iterable[str]) -> None:
        names = sorted(names)
        self._owners += [owner] * len(names)
        self._names += names

    def _found(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def _found_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))


def _why_not_compilable(modules: Sequence[nn.Module]) -> str | None:
    for module in modules:
        if has_replaced_forward(module):
            return f"the forward of a {type(module).__name__} was replaced, as offloading and caching do"
        # An adapter's strength, and that of an image prompt, is a Python number, which may change at any time.
        if is_peft_wrapper(module):
            return "an adapter's strength is no tensor: fuse the adapter, then unload it"
        if hasattr(vars(module).get("processor"), "scale"):
            return "the scale of an attention processor is no tensor"
    return None


class CudaGraphCapture:
    """Makes CUDA graphs that share their memory: they run one after the other, and their results are copied out.

    Args:
        device: of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Graphs share memory if they were captured on one stream. Workspaces that calls beforehand make are theirs.
        self._before, self._stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    @contextmanager
    def exclusive_use(self) -> Iterator[None]:
        """What the current stream does within comes after all earlier turns, on whatever streams those were.

        A lock keeps callers apart on the host only, which is ahead of the device.
        """
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            # Of a call that failed, too, a part may be under way.
            stream.record_event(self._done)

    def synchronize(self) -> None:
        """Have the host wait for all turns that ended."""
        self._done.synchronize()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs a step, and records it; returns the graph's replay, and the tensor that it writes."""
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        with torch.cuda.device(self._device):
            self._before.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._before):
                for _ in range(_CALLS_BEFORE_CAPTURE):
                    step()
            torch.cuda.current_stream().wait_stream(self._before)
            # Collecting a CUDA object breaks the capture that it happens in.
            gc.collect()
            gc.disable()
            try:
                # What other threads do on the device is no part of it.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    output = step()
            finally:
                if collects:
                    gc.enable()
        return graph.replay, output


def _tensors(inputs: UNetInputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
