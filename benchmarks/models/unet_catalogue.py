"""The contenders of whole UNets as data: their UNets and their runs. `unet_contenders` builds them."""

from typing import NamedTuple

from benchmarks.harness.contenders import ALL, Contender, RunMode

ORIGINAL = "stock"
ONE_BY_ONE, ROUTERS = "each", "routers"
RUNS = {
    run.name: run
    for run in (
        RunMode("channels-last", "with channels-last weights", "eager"),
        RunMode("captured", "uncompiled, in CUDA graphs", "cudagraphs", uses_cuda_graphs=True),
        RunMode("compile", "compiled", "default"),
        RunMode("graphs", "compiled, in CUDA graphs", "reduce-overhead", uses_cuda_graphs=True),
        RunMode("max", "compiled and tuned, in CUDA graphs", "max-autotune", uses_cuda_graphs=True),
    )
}
# The runs of a user of torch, whose graphs are those of compiled code.
_COMPILED = ("compile", "graphs", "max")
_MULTITASK = ("tasks",)


class UNetImplementation(NamedTuple):
    """The UNets of a contender.

    Attributes:
        source: a key of `unet_contenders.BUILDERS`.
        backend: of upcycled ones.
        by_user: compiled by `torch.compile`, and not by `mtu.compile`.
    """

    source: str
    backend: str = ""
    by_user: bool = False


def _runs(family: str, contender: Contender, *runs: str) -> dict[str, Contender]:
    """A contender run eagerly, and in other ways. The variant, if there is one, ends the name."""
    variant = f"@{contender.variant}" * bool(contender.variant)
    ways = {family + variant: contender._replace(family=family)}
    for key in runs:
        about = f"{contender.description}, {RUNS[key].description}"
        ways[f"{family}+{key}{variant}"] = contender._replace(description=about, run_mode=RUNS[key], family=family)
    return ways


def _of_backend(name: str) -> dict[str, Contender]:
    about = f"upcycled, on the backend {name!r}"
    unets, family = UNetImplementation("upcycled", name), f"mtu-{name}"
    each = Contender(f"{about}, pictures one after another", unets, ALL, variant=ONE_BY_ONE)
    routers = Contender(f"{about}, with its routers", unets, ALL, variant=ROUTERS)
    return {
        **_runs(family, Contender(about, unets, ALL), *RUNS),
        **_runs(family, each, "graphs"),
        **_runs(family, routers, "compile", "graphs"),
    }


def _folded(backend: str) -> dict[str, Contender]:
    about = f"one task folded into plain layers, on the backend {backend!r}"
    return _runs(f"mtu-{backend}-folded", Contender(about, UNetImplementation("folded", backend)), "compile", "graphs")


_STOCK = Contender("the original UNet of diffusers", UNetImplementation("original"))
_RECIPE = Contender("the original by diffusers' recipe", UNetImplementation("recipe", by_user=True))
_FOUR = Contender("a UNet for each task, all resident", UNetImplementation("four"), _MULTITASK)
_SWAPPED = Contender("one resident UNet, weights swapped in", UNetImplementation("swapped"), _MULTITASK)
_HOTSWAP = Contender(
    "adapters of rank 16 swapped between tasks", UNetImplementation("hotswap", by_user=True), _MULTITASK
)
_PER_SAMPLE = Contender("adapters of rank 16 mixed in a batch", UNetImplementation("per-sample"), _MULTITASK)
CONTENDERS: dict[str, Contender] = {
    **_runs(ORIGINAL, _STOCK, *RUNS),
    **_runs("stock-recipe", _RECIPE, *_COMPILED),
    **_of_backend("eager"),
    **_of_backend("cpp"),
    **_folded("cpp"),
    **_of_backend("triton"),
    **_folded("triton"),
    **_runs("four-unets", _FOUR, "compile", "graphs"),
    **_runs("swapped-unets", _SWAPPED, "compile", "graphs"),
    **_runs("lora-hotswap", _HOTSWAP, "compile", "graphs"),
    **_runs("lora-per-sample", _PER_SAMPLE),
}


def find_contender(name: str) -> Contender:
    """The contender of a row. Rows may be of contenders that are not measured any more; their name is known alone."""
    return CONTENDERS.get(name) or Contender("not measured any more", UNetImplementation(""), family=name)


def sibling_name(name: str, *, run: str | None = None, variant: str = "") -> str:
    """Name of the contender of the same family that is run in another way; "" where there is none."""
    wanted = (find_contender(name).family, RUNS.get(run or ""), variant)
    return next((key for key, c in CONTENDERS.items() if (c.family, c.run_mode, c.variant) == wanted), "")


def default_contender_names(device: str) -> tuple[str, ...]:
    """The contenders that are measured by default; on a CPU, where compiling takes minutes, those that run without."""
    if device == "cpu":
        return ("stock", "stock+channels-last", "mtu-eager", "mtu-cpp", "mtu-cpp+channels-last")
    # Tuning takes minutes for each size.
    tuned = RUNS["max"]
    return tuple(name for name, c in CONTENDERS.items() if c.implementation.backend != "cpp" and c.run_mode != tuned)
