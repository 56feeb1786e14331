"""A stand-in for CUDA graphs, by which their use is tested on a CPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class RecordedGraphs:
    """Records a step's operators with the tensors that they read, and runs those again, as a CUDA graph would.

    Attributes:
        count: how many steps were recorded.
        order: what happened to the memory that graphs share.
    """

    def __init__(self) -> None:
        self.count = 0
        self.order: list[str] = []

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.count += 1
        with _Recording() as recording:
            result = step()
        # A graph that was captured has computed nothing yet.
        output = torch.full_like(result, float("nan"))
        run = recording.program(result)

        def replay() -> None:
            self.order.append("replay")
            output.copy_(run())

        return replay, output

    @contextlib.contextmanager
    def exclusive_use(self) -> Iterator[None]:
        self.order.append("wait")
        try:
            yield
        finally:
            self.order.append("record")

    def synchronize(self) -> None:
        self.order.append("host waits")


class _Slot(int):
    """The place of a tensor that an operator of the recording makes."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[int | None]]] = []
        self._slots: dict[int, _Slot] = {}
        # Kept alive, or others could get their identities.
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_map(self._place_of, (args, kwargs or {}))
        output = func(*args, **(kwargs or {}))
        places: list[int | None] = []
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf) not in self._slots:
                self._slots[id(leaf)] = _Slot(len(self._slots))
                self._made.append(leaf)
            places.append(self._slots[id(leaf)] if isinstance(leaf, Tensor) else None)
        self._calls.append((func, *given, places))
        return output

    def program(self, result: Tensor) -> Callable[[], Tensor]:
        """What runs the operators again and returns the tensor in the place of `result`."""
        place = self._slots[id(result)]
        self._made.clear()

        def run() -> Tensor:
            values: dict[int, Tensor] = {}

            def value_of(leaf: Any) -> Any:
                return values[leaf] if isinstance(leaf, _Slot) else leaf

            for func, args, kwargs, places in self._calls:
                output = func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
                for leaf, at in zip(tree_leaves(output), places, strict=True):
                    if at is not None:
                        values[at] = leaf
            return values[place]

        return run

    def _place_of(self, leaf: Any) -> Any:
        return self._slots.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf
