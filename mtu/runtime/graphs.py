"""CUDA graphs of UNet calls, and the snapshot of a model that tells when its graphs are out of date.

`mtu.runtime.compiling` decides which calls are captured, and keeps the captured calls by size.
"""

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

# These plain attributes choose attention processors and backends, and hold the strengths of FreeU.
_CHOSEN, _FREEU = {"backend", "processor"}, ("b1", "b2", "s1", "s2")
# The first call before a capture compiles. In the others, libraries choose algorithms and allocate workspaces.
_CALLS_BEFORE_CAPTURE = 3

UNetInputs = dict[str, Any]
UNetCall = Callable[[UNetInputs], Tensor]


class GraphCapture(Protocol):
    """Captures calls in graphs that share memory."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run a call once and capture it.

        Args:
            step: a call without arguments, which reads tensors at fixed addresses.

        Returns:
            A function that replays the call, and the tensor that each replay writes.
        """
        ...

    def exclusive_use(self) -> AbstractContextManager[None]:
        """Give the code within this context the graphs' memory to itself, also on other callers' streams."""
        ...

    def synchronize(self) -> None:
        """Make the host wait for all earlier uses of the graphs' memory, so that it may be freed."""
        ...


class CapturedCall:
    """A UNet call captured in a graph, which reads and writes tensors of its own.

    Run it within `GraphCapture.exclusive_use`.
    """

    def __init__(self, step: UNetCall, inputs: UNetInputs, capture: GraphCapture) -> None:
        self._inputs = tree_map_only(Tensor, torch.clone, inputs)
        self._tensors = _tensors(self._inputs)
        # The graph does not own the code that its compiled kernels were loaded from, so this reference keeps it.
        self._step = step
        self._replay, self._output = capture(self._run)

    def __call__(self, inputs: UNetInputs) -> Tensor:
        for to, tensor in zip(self._tensors, _tensors(inputs), strict=True):
            to.copy_(tensor)
        self._replay()
        return self._output.clone()

    def _run(self) -> Tensor:
        # Each call gets new lists, because the stock forward pops the adapters' residuals that it has used.
        return self._step(tree_map(lambda leaf: leaf, self._inputs))


class ModelSnapshot:
    """The parameters, modules and attributes that compiled code and graphs were made from.

    A graph reads memory by address, so a replaced parameter or module must be noticed. The comparison runs before each
    call: built-in functions loop over the thousands of objects.

    Args:
        unet: the UNet to record.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.routers: list[Router] = unet.routers() if isinstance(unet, MTUUNet2DConditionModel) else []
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._hooks: list[dict] = []
        modules = list(unet.modules())
        for module in modules:
            attributes = vars(module)
            # Offloading, casting and caching replace `forward`.
            self._watch(attributes, ("forward",))
            self._watch(attributes, _CHOSEN & attributes.keys())
            for owner in (module._parameters, module._buffers, module._modules):
                self._watch(owner, owner)
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        for block in unet.up_blocks:
            self._watch(vars(block), _FREEU)
        self._why_not_compilable = _why_not_compilable(modules)
        # These references keep the objects alive, so that no new object can take the identity of a deleted one.
        self._parts = self._found()
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = self._found_addresses()

    def why_not_compilable(self) -> str | None:
        """The reason why compiled code and graphs would ignore a part of this model, as a clause; None without one."""
        return "hooks are Python code" if any(self._hooks) else self._why_not_compilable

    def matches_model(self) -> bool:
        """Whether the model still has the same objects, at the same addresses in memory."""
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
        # The strength of an adapter or of an image prompt is a Python number, which may change at any time.
        if is_peft_wrapper(module):
            return "an adapter's strength is no tensor: fuse the adapter, then unload it"
        if hasattr(vars(module).get("processor"), "scale"):
            return "the scale of an attention processor is no tensor"
    return None


class CudaGraphCapture:
    """Captures CUDA graphs that share memory. They run one after the other, and callers copy the results out.

    Args:
        device: the CUDA device that the graphs run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Graphs share memory if they are captured on one stream. They also use the workspaces of the calls before.
        self._before, self._stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    @contextmanager
    def exclusive_use(self) -> Iterator[None]:
        """Order the current stream's work within this context after all earlier uses, on any stream.

        A lock separates callers on the host only, and the host runs ahead of the device.
        """
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            # After an exception, a part of the call may still be running on the device.
            stream.record_event(self._done)

    def synchronize(self) -> None:
        """Make the host wait for all earlier uses of the graphs' memory."""
        self._done.synchronize()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run and capture a call; see `GraphCapture`."""
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        with torch.cuda.device(self._device):
            self._before.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._before):
                for _ in range(_CALLS_BEFORE_CAPTURE):
                    step()
            torch.cuda.current_stream().wait_stream(self._before)
            # A garbage collection that frees a CUDA object would break the capture.
            gc.collect()
            gc.disable()
            try:
                # The capture must not include the work of other threads.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    output = step()
            finally:
                if collects:
                    gc.enable()
        return graph.replay, output


def _tensors(inputs: UNetInputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
