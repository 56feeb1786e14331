"""Runs steps on a GPU one after another, or beside each other, each within its budget, all within that of the run."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.output import LOG, PackedOutput
from benchmarks.gpu.process import GRACE_SECONDS, CommandGroup, sleep_briefly
from benchmarks.gpu.state import CUT, DONE, ENDED, FAILED, LATE, Outcome, State
from benchmarks.gpu.steps import DIAGNOSIS, GO, TUNE, Step, StepContext

# At the end the last results are packed, and running steps end.
RESERVE_SECONDS = 2 * GRACE_SECONDS
# A step must stop by itself before it is ended; its imports, and the group that it is in, take time besides.
MARGIN_SECONDS = 12.0
# How often results are packed while steps run: the run may be killed at any time.
_PACK_SECONDS = 15.0
# Beginnings of the lines of a log that report an error.
_SKIPPED = "skipped "
_TELLING = ("FAILED", _SKIPPED)
_MOST_LETTERS = 300


class RunInterrupted(Exception):
    """The run was told to end."""


@dataclasses.dataclass
class _Running:
    """A step that was begun.

    Attributes:
        until: time by `time.monotonic` at which it is ended, unless it waits for its turn.
        said: bytes of its log that are of earlier calls.
        short: whether the run had less time left than its budget, or than its time alone.
        released: whether it has its turn on the device.
    """

    step: Step
    group: CommandGroup
    until: float
    said: int
    short: bool
    released: bool = False


class GPURun:
    """One call of a run, which must have ended at the time `until` by `time.monotonic`."""

    def __init__(self, state: State, output: PackedOutput, until: float, commit: str, quick: bool) -> None:
        self._state, self._output, self._commit, self._quick = state, output, commit, quick
        self._until = until - RESERVE_SECONDS
        self._cuda = torch.cuda.is_available()
        self._packed = time.monotonic()

    def run_steps(self, steps: Sequence[Step]) -> None:
        """Runs steps as long as there is time. Steps that are done are skipped; those that failed before come later.

        Interrupted means that the run was told to end; its steps are ended and noted then.
        """
        for stage in group_into_stages(order_steps(steps, self._state.read_outcomes(step.name for step in steps))):
            self._stage(stage)
            for outcome in (self._state.read_outcome(step.name) for step in stage if step.decides_run):
                if outcome is None or outcome.status != DONE:
                    if self._cuda and outcome is not None and outcome.status in (FAILED, ENDED):
                        self._stage([DIAGNOSIS])
                    _say("The rest of the time is kept: nothing else is worth measuring before this is right.")
                    return

    def _stage(self, stage: Sequence[Step]) -> None:
        running: dict[str, _Running] = {}
        rows_of = self._commit_of_rows()
        try:
            left = self._until - time.monotonic()
            chosen = list(stage) if self._quick else steps_that_fit(stage, left)
            for step in stage:
                if step in chosen:
                    # Steps that compile must leave time for those that are then timed.
                    begun = self._begin(step, rows_of, left - sum(one.seconds_alone for one in chosen), len(chosen))
                    running |= {} if begun is None else {step.name: begun}
                else:
                    needed = step.least_seconds + step.seconds_alone
                    self._note(step, Outcome(LATE, 0, f"{max(0.0, left):.0f} s were left, and it needs {needed:.0f}."))
            while not all(self._waits(begun) for begun in running.values()):
                self._look_after(running)
            for name in list(running):
                # These are prepared and wait: now each has the device to itself.
                self._release(running[name])
                while name in running:
                    self._look_after(running)
        except RunInterrupted:
            for begun in running.values():
                begun.group.ask_to_stop(begun.step.stop_signal)
            for begun in running.values():
                self._end(begun, CUT, "The run was told to end.")
            raise

    def _commit_of_rows(self) -> str:
        """The commit for the rows, which names the tuned tiles once they are in their place."""
        try:
            return f"{self._commit}+tuned-tiles" if self._state.copy_tuned_table() else self._commit
        except OSError as error:
            _say(f"The tuned tiles cannot be put into the copy of the tree, and are not used: {error}")
            return self._commit

    def _begin(self, step: Step, commit: str, left: float, beside: int) -> _Running | None:
        # A smoke test is of commands, not of budgets, which are a GPU's.
        seconds = left if self._quick else min(step.budget_seconds, left)
        _say(f"{step.name}: begins, {seconds:.0f} s at most")
        try:
            folder = self._state.step_folder(step.name)
            for name in (GO, f"{GO}.ready"):
                (folder / name).unlink(missing_ok=True)
            place = StepContext(folder, commit, self._quick, self._cuda, max(1.0, seconds - MARGIN_SECONDS))
            log, note = folder / LOG, self._state.note_file(step.name)
            said = log.stat().st_size if log.exists() else 0
            group = CommandGroup(step.make_command(place), note, log, self._state.tree, self._environment(beside))
        except OSError as error:
            self._note(step, Outcome(FAILED, 0, f"It could not be started: {error}."))
            return None
        return _Running(step, group, time.monotonic() + seconds, said, short=seconds < step.budget_seconds)

    def _waits(self, begun: _Running) -> bool:
        ready = self._state.step_folder(begun.step.name) / f"{GO}.ready"
        return bool(begun.step.seconds_alone) and not begun.released and ready.exists()

    def _release(self, begun: _Running) -> None:
        begun.released = True
        until = time.monotonic() + begun.step.seconds_alone
        begun.short, begun.until = self._until < until, min(self._until, until)
        try:
            (self._state.step_folder(begun.step.name) / GO).touch()
        except OSError as error:
            _say(f"{begun.step.name} cannot be told to go on: {error}")

    def _look_after(self, running: dict[str, _Running]) -> None:
        """Ends the steps that must end, notes those that ended, and packs from time to time."""
        sleep_briefly()
        now = time.monotonic()
        late = {
            name
            for name, begun in running.items()
            if begun.group.exit_status is None and now > begun.until and not self._waits(begun)
        }
        for name in late:
            running[name].group.ask_to_stop(running[name].step.stop_signal)
        for name, begun in list(running.items()):
            if begun.group.exit_status is None and name not in late:
                continue
            if name not in late:
                ended = self._verdict(begun)
            elif running[name].short or now > self._until:
                # The step is not at fault, and the next call begins with it.
                ended = CUT, "The time of the run was over."
            else:
                ended = ENDED, f"It still ran after {begun.group.seconds_since_start:.0f} s."
            # First, so that an interruption from here on does not count it among the cut steps.
            del running[name]
            self._end(begun, *ended)
        if time.monotonic() > self._packed + _PACK_SECONDS:
            self._pack()

    def _verdict(self, begun: _Running) -> tuple[str, str]:
        code, log = begun.group.exit_status or 0, self._state.step_folder(begun.step.name) / LOG
        # The log has the output of earlier calls, too.
        text = log.read_bytes()[begun.said :].decode(errors="replace")
        lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
        telling = [line for line in lines if line.startswith(_TELLING)]
        if code == 0:
            # A contender that lacked memory beside others may have it at the next try.
            skipped = [line for line in telling if line.startswith(_SKIPPED)]
            if skipped:
                return FAILED, f"Something is missing: {skipped[-1][:_MOST_LETTERS]}"
            return DONE, "".join(telling[-1:])[:_MOST_LETTERS]
        last = [line for line in lines if line][-1:] or ["it said nothing"]
        how = f"Signal {signal.Signals(-code).name} ended it" if code < 0 else f"It returned {code}"
        return FAILED, f"{how}: {(telling or last)[-1][:_MOST_LETTERS]}"

    def _end(self, begun: _Running, status: str, sentence: str) -> None:
        begun.group.stop_or_kill(begun.step.stop_signal)
        self._note(begun.step, Outcome(status, round(begun.group.seconds_since_start, 1), sentence))

    def _note(self, step: Step, outcome: Outcome) -> None:
        _say(f"{step.name}: {outcome.status}, {outcome.seconds:.0f} s. {outcome.sentence}")
        try:
            self._state.write_outcome(step.name, outcome)
        except OSError as error:
            _say(f"The state folder cannot be written, so that the next call will run {step.name} again: {error}")
        self._pack()

    def _pack(self) -> None:
        self._packed = time.monotonic()
        try:
            self._output.write_files()
        except OSError as error:
            _say(f"The results cannot be copied out now, and stay in the state folder: {error}")

    def _environment(self, beside: int) -> dict[str, str]:
        folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        caches = {name: str(self._state.caches / folder) for name, folder in folders.items()}
        interpreter = {} if self._cuda else {"TRITON_INTERPRET": "1"}
        # As many steps compile at once.
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // beside))}
        # Steps run in a copy of the tree.
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = {"PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in given if path)}
        return os.environ | caches | interpreter | threads | paths | {"PYTHONUNBUFFERED": "1"}


def order_steps(steps: Sequence[Step], before: Mapping[str, Outcome]) -> list[Step]:
    """The steps that are not done: failed ones after the others, and last those that fill the time.

    Of the failed ones the tiles are tuned last: that takes long, and the other steps can do without them.
    """

    def place(step: Step) -> tuple[bool, bool, bool]:
        failed = step.name in before and before[step.name].status in (FAILED, ENDED) and not step.decides_run
        return step.fills_time, failed, failed and step.name == TUNE

    todo = [step for step in steps if step.name not in before or before[step.name].status != DONE]
    return sorted(todo, key=place)


def group_into_stages(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that follow each other and need not be alone run together."""
    stage: list[Step] = []
    for step in steps:
        if stage and (step.runs_alone or stage[-1].runs_alone):
            yield stage
            stage = []
        stage.append(step)
    if stage:
        yield stage


def steps_that_fit(stage: Sequence[Step], left: float) -> list[Step]:
    """The steps of a stage for which so many seconds are enough, the first ones first.

    They run beside each other, but the times that some of them need alone add up.
    """
    chosen: list[Step] = []
    for step in stage:
        timed = sum(one.seconds_alone for one in (*chosen, step))
        if all(one.least_seconds + timed <= left for one in (*chosen, step)):
            chosen.append(step)
    return chosen


def _say(line: str) -> None:
    print(line, flush=True)
