"""Where backends run in tests: each on the CPU (Triton in its interpreter), and on a GPU under `-m gpu`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mtu_kernels import available_backends, moe_ffn, triton

from .moe_ffn_cases import DENSE, Problem, Sizes, make_problem


class Place(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    @property
    def is_interpreter(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def adds_residual(self) -> bool:
        """Whether the backend's operators add the residual themselves. To the others' results PyTorch adds it."""
        return self.backend in ("cpp", "reference")

    @property
    def low(self) -> torch.dtype:
        """The low precision to test: bfloat16, which Triton's interpreter computes wrongly."""
        return torch.float16 if self.is_interpreter else torch.bfloat16

    @property
    def exact(self) -> torch.dtype:
        """The highest precision that the backend computes in."""
        return torch.float32 if self.backend in ("triton", "cpp") else torch.float64

    @property
    def seeds(self) -> range:
        """A maximum over few numbers is luck (routing weights are 6 in a problem), and so is one over heavy tails:
        hence uniform numbers, and as many seeds as time allows. Two are enough in the
        interpreter: of the seeds 0 to 5, any two neighbours keep all errors below 0.7 of their bounds."""
        return range(2 if self.is_interpreter else 12)

    @property
    def op(self) -> Callable[..., Tensor]:
        """`moe_ffn` for tensors on the CPU, computed here."""
        if self.device == "cpu":
            return functools.partial(moe_ffn, backend=self.backend)
        return functools.partial(_elsewhere, device=self.device, backend=self.backend)

    def problems(self, sizes: Sizes = DENSE, **options) -> list[Problem]:
        return [make_problem(seed, sizes, **options) for seed in self.seeds]

    def move(self, problem: Problem) -> Problem:
        """The problem on this place's device; gradients are asked of the moved tensors."""
        moved = problem.map(lambda t: t.detach().to(self.device).requires_grad_(t.requires_grad))
        indices = problem.routing.indices
        return moved._replace(
            routing=moved.routing._replace(indices=None if indices is None else indices.to(self.device))
        )


def _elsewhere(x, norm, experts, routing, *, device, **options):
    def move(tensors):
        return type(tensors)(*(t.to(device) if isinstance(t, Tensor) else t for t in tensors))

    return moe_ffn(x.to(device), move(norm), move(experts), move(routing), **options).cpu()


def _places(device: str) -> list[Place]:
    if device == "cuda":
        return [Place("eager", "cuda"), Place("triton", "cuda")]
    interpreted = triton.why_unsupported(torch.device("cpu"), torch.float32) is None
    return [Place(name, "cpu") for name in available_backends() if name != "triton" or interpreted]


def _params(places: list[Place], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(place, id="-".join(place), marks=marks) for place in places]


PLACES = [*_params(_places("cpu")), *_params(_places("cuda"), pytest.mark.gpu)]
# The same, where the interpreter takes seconds.
SLOW_IF_INTERPRETED = [
    pytest.param(*param.values, id=param.id, marks=(*param.marks, *[pytest.mark.slow] * param.values[0].is_interpreter))
    for param in PLACES
]
# Those that are operators of their own.
OP_PLACES = [param for param in PLACES if param.values[0].backend != "eager"]
# Those whose operators add the residual.
ADDING_PLACES = [param for param in PLACES if param.values[0].adds_residual]


def cases(*precisions, places=SLOW_IF_INTERPRETED, halved=False):
    """Parameters place, dtype and expert_norm: all combinations, but for what takes the interpreter too long.

    The fast tests run the first precision of the fused backends, in the interpreter with one form of the norm. Other
    cases rarely find a fault of their own. The backend "eager" is fast where `places` are PLACES.

    Args:
        precisions: names of dtypes, or "low" for that of the place.
        places: parameters like PLACES.
        halved: in the interpreter test one form of the norm in the first precision, the other in the others.
    """
    params = []
    for param in places:
        place = param.values[0]
        dtypes = dict.fromkeys(place.low if name == "low" else getattr(torch, name) for name in precisions)
        for (i, dtype), expert_norm in itertools.product(enumerate(dtypes), (False, True)):
            if halved and place.is_interpreter and expert_norm != (i > 0):
                continue
            name = f"{param.id}-{str(dtype).removeprefix('torch.')}-{'expert_norm' if expert_norm else 'norm'}"
            is_slow = i > 0 or place.backend == "reference" or (place.is_interpreter and expert_norm)
            is_slow = is_slow or (place.backend == "eager" and places is not PLACES)
            marks = (*param.marks, *[pytest.mark.slow] * is_slow)
            params.append(pytest.param(place, dtype, expert_norm, id=name, marks=marks))
    return pytest.mark.parametrize(("place", "dtype", "expert_norm"), params)


def why_not_most_of_a_gpu(workers: str, memory: Callable[[], tuple[int, int]]) -> str | None:
    """What keeps a test from taking 32 GiB of a GPU, as a sentence; or None.

    Args:
        workers: how many workers of pytest-xdist there are, which share the GPU.
        memory: gives the free and the whole memory of the GPU in bytes; only one worker asks.
    """
    if workers != "1":
        return f"It takes 32 GiB of a GPU, which {workers} workers share: run it without -n."
    free, _ = memory()
    return None if free >= 32 * 2**30 else f"It takes 32 GiB of a GPU, of which {free / 2**30:.0f} GiB are free."
