"""The fields of a contender that all benchmarks decide by. Its name is a key and says nothing to the code."""

from typing import Any, NamedTuple

from benchmarks.harness.workloads import DENSE, Setting

ALL = ("E", "K", "tasks")


class RunMode(NamedTuple):
    """A way to run a contender other than eagerly.

    Attributes:
        name: appended to that of the contender.
        description: in words.
        compile_mode: of `torch.compile` or `mtu.compile`.
        uses_cuda_graphs: whether CUDA graphs are replayed.
    """

    name: str
    description: str
    compile_mode: str
    uses_cuda_graphs: bool = False


class Contender(NamedTuple):
    """One of several ways to compute the same thing, which are measured beside each other.

    Attributes:
        description: one line for people.
        implementation: computes it; each benchmark has a class of its own for that.
        depends_on: fields of `Setting` that make a difference to it; K without E: the share of active experts.
        run_mode: None where it runs eagerly.
        family: name of the same contender without run and variant.
        variant: the way in which it differs from its family; "" where it does not.
    """

    description: str
    implementation: Any
    depends_on: tuple[str, ...] = ()
    run_mode: RunMode | None = None
    family: str = ""
    variant: str = ""

    @property
    def is_compiled(self) -> bool:
        return self.run_mode is not None and self.run_mode.compile_mode != "eager"

    @property
    def uses_cuda_graphs(self) -> bool:
        return self.run_mode is not None and self.run_mode.uses_cuda_graphs

    def relevant_setting(self, setting: Setting) -> Setting:
        """The fields of a setting that make a difference to the contender; the others take their defaults.

        So no contender is measured twice, and the row to compare with is found.
        """
        K = setting.K if "K" in self.depends_on else DENSE
        E = setting.E if "E" in self.depends_on or K is not DENSE else 1
        return Setting(E, K, setting.tasks if "tasks" in self.depends_on else 1)
