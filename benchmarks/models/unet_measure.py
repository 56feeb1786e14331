"""Measures one group of whole UNets: builds, checks and warms them up, and times them interleaved."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.harness.memory import measure_peak_bytes
from benchmarks.harness.recording import Figures, Log
from benchmarks.harness.timing import Call, Timing, synchronize, time_interleaved, time_repeatedly
from benchmarks.harness.workloads import DENSE, Entry, Group, Setting, Workload
from benchmarks.models.deployments import Deployment
from benchmarks.models.unet_catalogue import CONTENDERS
from benchmarks.models.unet_contenders import build_deployment
from benchmarks.models.unet_models import ReferenceOutputs, UNetFamily, draw_batch, task_specs_of

# Pictures on which contenders that are not compiled for a size are checked: small enough for a wider dtype on a CPU.
_CHECKED_SIZE = 64
# Mixes of tasks, which calls take turns at.
_MIXES = 3
_SWITCHES = 20


class Recompiled(Exception):
    """Compiled code was compiled again when the tasks changed."""


class MeasurementPlan(NamedTuple):
    """How groups are measured.

    Attributes:
        runs: least number of rounds.
        seconds: for each contender.
        compiles_without_caches: whether the compiler's caches are off; otherwise the time of compiling means nothing.
        before_timing: called when a group is built, compiled and checked; may wait for its turn on the device.
        after_timing: called with each entry and one of its steps, when a group's rows are written.
    """

    runs: int
    seconds: float
    compiles_without_caches: bool
    before_timing: Call = lambda: None
    after_timing: Callable[[Workload, Entry, Call], None] = lambda workload, entry, step: None


def make_group(workload: Workload, names: Sequence[str], settings: Sequence[Setting]) -> Group:
    """Contenders in settings, each once. A batch has no more tasks than pictures."""
    settings = [setting._replace(tasks=min(setting.tasks, workload.B)) for setting in settings]
    pairs = [Entry(name, CONTENDERS[name].relevant_setting(setting)) for name in names for setting in settings]
    return Group(workload, tuple(dict.fromkeys(pairs)))


class WarmUpCost(NamedTuple):
    """Seconds of compiling and capturing, the first calls included, and the most bytes that were held meanwhile."""

    seconds: float = 0.0
    peak_bytes: int = 0


class PreparedEntry(NamedTuple):
    """An entry that passed its check and is ready to be timed.

    Attributes:
        step_calls: one for each mix of tasks.
        warm_up_cost: of its contender so far; None where nothing is compiled.
    """

    entry: Entry
    deployment: Deployment
    step_calls: list[Call]
    warm_up_cost: WarmUpCost | None


class GroupMeasurement:
    """The measurement of one group. Each contender is built once, even if it is run in several settings.

    `reference` gives the outputs that a setting is checked against, for one picture's workload.
    """

    def __init__(
        self,
        group: Group,
        log: Log,
        family: UNetFamily,
        plan: MeasurementPlan,
        reference: Callable[[Workload, Setting], ReferenceOutputs],
    ) -> None:
        self._workload, self._entries = group
        self._family, self._plan, self._log = family, plan, log
        self._device = family.device
        self._deployments: dict[Entry, Deployment] = {}
        self._warm_ups: dict[Entry, WarmUpCost] = {}
        self._reference = reference

    def measure(self) -> Figures:
        """Yields the entries that could be measured: timed interleaved, then memory and switching one by one."""
        ready = []
        for entry in self._entries:
            self._log.bar.set_description(f"{entry.contender} at {self._workload}")
            with self._log.report_errors(entry, self._workload):
                ready.append(self._prepare(entry))
        for after_check in dict.fromkeys(prepared.deployment.after_check for prepared in ready):
            if after_check is not None:
                after_check()
        self._plan.before_timing()
        self._log.bar.set_description(f"rounds of {self._workload}")
        for prepared, timing in zip(ready, self._times(ready), strict=True):
            yield prepared.entry, self._row(prepared, timing)
        for prepared in ready:
            self._plan.after_timing(self._workload, prepared.entry, prepared.step_calls[0])

    def _prepare(self, entry: Entry) -> PreparedEntry:
        contender = CONTENDERS[entry.contender]
        built = entry._replace(setting=entry.setting._replace(tasks=1))
        if built not in self._deployments:
            self._deployments[built] = build_deployment(contender, self._family, entry.setting)
        deployment, warm_up = self._deployments[built], None
        draw = functools.partial(draw_batch, device=self._device, tasks=entry.setting.tasks)
        mixes = range(_MIXES if entry.setting.tasks > 1 else 1)
        steps = [deployment.make_step(draw(self._workload, first=first)) for first in mixes]
        checked = self._workload
        if not contender.is_compiled:
            checked = checked._replace(size=min(_CHECKED_SIZE, checked.size))
        else:
            # In another setting of the same contender only sizes are new.
            before, more = self._warm_ups.get(built, WarmUpCost()), self._warm_up(deployment, steps)
            warm_up = WarmUpCost(before.seconds + more.seconds, max(before.peak_bytes, more.peak_bytes))
            self._warm_ups[built] = warm_up
        output = deployment.predict(draw(checked))
        self._reference_for(entry.setting, checked).check_output(output, checked.branches)
        return PreparedEntry(entry, deployment, steps, warm_up)

    def _reference_for(self, setting: Setting, workload: Workload) -> ReferenceOutputs:
        # With dense routing all are checked against the original; outputs of top-k routing differ by task.
        return self._reference(workload._replace(B=1, branches=1), Setting() if setting.K is DENSE else setting)

    def _warm_up(self, deployment: Deployment, steps: Sequence[Call]) -> WarmUpCost:
        # Contenders whose sizes do not depend on the mix are not warmed up with the other mixes.
        known = steps if deployment.call_sizes_depend_on_tasks else steps[:1]

        def first_calls() -> None:
            # A user's CUDA graphs run at the first call, are captured at the second, and replayed from then on.
            for step in [*known] * 3:
                step()
            synchronize(self._device)

        start, peak = time.perf_counter(), 0
        if self._device.type == "cuda":
            peak = measure_peak_bytes(first_calls, self._device)
        else:
            first_calls()
        warm_up = WarmUpCost(time.perf_counter() - start, peak)
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                for step in steps:
                    step()
                synchronize(self._device)
        except RuntimeError as error:
            raise Recompiled(str(error).partition("\n")[0]) from error
        return warm_up

    def _times(self, ready: Sequence[PreparedEntry]) -> list[Timing]:
        if not ready:
            return []
        steps, plan = [prepared.step_calls for prepared in ready], self._plan
        # Nothing is captured here: launches are part of an eager step's time, and contenders replay their own graphs.
        eager, replaying = (
            [False] * len(ready),
            [CONTENDERS[prepared.entry.contender].uses_cuda_graphs for prepared in ready],
        )
        after_round = functools.partial(self._log.bar.update, 1)
        with torch.compiler.set_stance("fail_on_recompile"):
            return time_interleaved(steps, eager, self._device, plan.seconds, plan.runs, after_round, replaying)

    def _row(self, prepared: PreparedEntry, timing: Timing) -> dict[str, Any]:
        graphs, deployment, warm_up = (
            CONTENDERS[prepared.entry.contender].uses_cuda_graphs,
            prepared.deployment,
            prepared.warm_up_cost,
        )
        steps = task_specs_of(self._workload.model)[0].num_inference_steps
        # A replay allocates nothing, so the memory of graphs is that of their capture.
        captured = warm_up if graphs else None
        peak = captured.peak_bytes if captured else measure_peak_bytes(prepared.step_calls[0], self._device)
        switch = deployment.switch_tasks
        return timing._asdict() | {
            "peak_bytes": peak,
            "weight_bytes": deployment.count_weight_bytes(self._device),
            "warmup_s": warm_up.seconds if warm_up is not None and self._plan.compiles_without_caches else None,
            "switch_us": None if switch is None else time_repeatedly(switch, self._device, _SWITCHES).median_us,
            "images_per_s": self._workload.B * 1e6 / (timing.median_us * steps),
        }
