"""Sweeps over the workloads and settings of one feed-forward, and those that are run by default."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.ffn.peers import CONTENDERS
from benchmarks.harness.arguments import SHAPE_SETS
from benchmarks.harness.workloads import DENSE, Entry, Group, Setting, Workload

PASSES = ("forward", "backward", "forward+backward")


class Sweep(NamedTuple):
    """All combinations of the listed values, without K > E and without several tasks in one sample."""

    contenders: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...] = SHAPE_SETS["sd15"] + SHAPE_SETS["sdxl"]
    batches: tuple[int, ...] = (8,)
    experts: tuple[int, ...] = (4,)
    top_k: tuple[int | None, ...] = (DENSE,)
    tasks: tuple[int, ...] = (1,)
    passes: tuple[str, ...] = ("forward",)

    def groups(self, dtype: str) -> Iterator[Group]:
        """The groups of the sweep, in each of them every entry once."""
        settings = [
            Setting(*values)
            for values in itertools.product(self.experts, self.top_k, self.tasks)
            if values[1] is None or values[1] <= values[0]
        ]
        for direction, (D, L), B in itertools.product(self.passes, self.shapes, self.batches):
            wanted = [setting for setting in settings if B > 1 or setting.tasks == 1]
            pairs = itertools.product(wanted, self.contenders)
            entries = dict.fromkeys(Entry(name, CONTENDERS[name].relevant_setting(setting)) for setting, name in pairs)
            if entries:
                yield Group(Workload(D, L, B, dtype, direction), tuple(entries))


_CUDA = (
    # The op at every shape, beside the original and the bare products.
    Sweep(("products", "eager", "mtu-triton"), batches=(1, 2, 8, 32), experts=(1, 4)),
    # Top-k routing beside dense routing.
    Sweep(("products", "loop", "mtu-eager", "mtu-triton"), experts=(8,), top_k=(DENSE, 1, 2)),
    # Mixes of tasks beside one task.
    Sweep(("mtu-triton",), batches=(8, 32), tasks=(1, 4, 64)),
    Sweep(("mtu-triton",), experts=(8,), top_k=(2,), batches=(8, 32), tasks=(1, 4, 64)),
    # Training: time, memory.
    Sweep(
        ("products", "eager", "loop", "mtu-eager", "mtu-triton", "mtu-triton-recompute"), passes=("forward+backward",)
    ),
    Sweep(("products", "eager", "mtu-triton"), shapes=SHAPE_SETS["sd15"], passes=("backward",)),
    # Compilers last, the slowest at the end: each shape is compiled anew.
    Sweep(("products", "eager", "loop", "mtu-eager", "mtu-triton", "compile-routed", "compile-folded")),
    Sweep(
        ("products", "eager", "mtu-eager", "mtu-triton", "compile-routed", "compile-folded"),
        shapes=((320, 4096), (1280, 1024)),
        passes=("forward+backward",),
    ),
    Sweep(("products", "eager", "mtu-triton", "compile-folded-max"), shapes=(*SHAPE_SETS["sd15"][:3], (1280, 1024))),
    Sweep(("products", "mtu-triton", "compile-routed-max"), shapes=((320, 4096),)),
)
_CPU_FORWARD = ("products", "eager", "loop", "mtu-eager", "mtu-cpp", "compile-routed", "compile-folded")
_CPU = (
    Sweep(_CPU_FORWARD, shapes=SHAPE_SETS["cpu"], batches=(1,)),
    Sweep(("products", "mtu-eager", "mtu-cpp"), SHAPE_SETS["cpu"], (1,), experts=(8,), top_k=(DENSE, 2)),
    Sweep(("products", "eager", "mtu-eager", "mtu-cpp"), SHAPE_SETS["cpu"], (1,), passes=("forward+backward",)),
)
# By device, for `python -m benchmarks.ffn.moe_ffn` without options.
DEFAULT_SWEEPS: dict[str, tuple[Sweep, ...]] = {"cuda": _CUDA, "cpu": _CPU}
# A smoke test, which runs every path of the harness; its times mean nothing.
QUICK = Sweep(
    ("products", "eager", "loop", "mtu-eager", "mtu-triton", "mtu-cpp"),
    shapes=((32, 16),),
    batches=(2,),
    top_k=(DENSE, 2),
    passes=PASSES,
)
