"""What every benchmark knows of a contender: decisions are made by these fields, and a name is no more than a key."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.harness.workloads import DENSE, Setting

ALL = ("E", "K", "tasks")


class Run(NamedTuple):
    """How a contender is run, where it is not run as it is.

    Attributes:
        name: appended to that of the contender.
        about: in words.
        mode: of torch.compile, or of `mtu.compile`.
        graphs: whether CUDA graphs are replayed.
    """

    name: str
    about: str
    mode: str
    graphs: bool = False


class Contender(NamedTuple):
    """One of several ways to compute the same thing, which are measured beside each other.

    Attributes:
        about: what it is, in a line.
        implementation: what computes it; each benchmark has a class of its own for that.
        depends_on: fields of `Setting` that make a difference to it; K without E: the share of active experts.
        run: None: as it is.
        family: name of the contender that it is, apart from its run and its variant.
        variant: what it does otherwise than its family does; "": nothing.
    """

    about: str
    implementation: Any
    depends_on: tuple[str, ...] = ()
    run: Run | None = None
    family: str = ""
    variant: str = ""

    @property
    def compiles(self) -> bool:
        return self.run is not None and self.run.mode != "eager"

    @property
    def graphs(self) -> bool:
        return self.run is not None and self.run.graphs

    def relevant(self, setting: Setting) -> Setting:
        """The part of a setting that makes a difference to the contender: the rest takes its default.

        It keeps a contender from being measured twice, and finds the row to compare with.
        """
        K = setting.K if "K" in self.depends_on else DENSE
        E = setting.E if "E" in self.depends_on or K is not DENSE else 1
        return Setting(E, K, setting.tasks if "tasks" in self.depends_on else 1)
