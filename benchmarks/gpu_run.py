"""`python -m benchmarks.gpu_run`: everything that is worth measuring on a GPU that is at hand for a few minutes.

Steps run in the order of what they are worth, each in processes of its own and within a budget: one that hangs or
crashes costs its own result and no other. What they yield is in the output folder after each of them. A call that is
cut off, in whatever way, loses nothing: the next one with the same state folder goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from benchmarks.gpu_output import Output
from benchmarks.gpu_process import GRACE_SECONDS, Group, wait
from benchmarks.gpu_state import CUT, DONE, ENDED, FAILED, LATE, Outcome, State
from benchmarks.gpu_steps import DIAGNOSIS, GO, STEPS, Place, Step
from benchmarks.provenance import provenance
from benchmarks.sweeps import parse_choices

# For the last results to be packed, and for what is still running to end.
_RESERVE_SECONDS = 2 * GRACE_SECONDS
# A step that stops by itself does so before it is ended.
_MARGIN_SECONDS = 5.0
_PACK_SECONDS = 15.0


class Interrupted(Exception):
    """The run was told to end."""


class Run:
    """One call.

    Args:
        state: of this call and earlier ones.
        output: where results go.
        minutes: that the call may take.
        commit: for the rows.
        quick: on the tiny model.
    """

    def __init__(self, state: State, output: Output, minutes: float, commit: str, quick: bool) -> None:
        self._state, self._output, self._commit, self._quick = state, output, commit, quick
        self._until = time.monotonic() + 60 * minutes - _RESERVE_SECONDS
        self._cuda = torch.cuda.is_available()
        self._packed = -1e9

    @property
    def _left(self) -> float:
        return self._until - time.monotonic()

    def steps(self, steps: Sequence[Step]) -> None:
        """Runs steps as long as there is time. What ended in an earlier call is skipped; what failed comes last."""
        before = {step.name: self._state.outcome(step.name) for step in steps}
        again = [step for step in steps if (o := before[step.name]) and o.status in (FAILED, ENDED)]
        todo = [step for step in steps if not before[step.name] or before[step.name].status in (CUT, LATE)]
        deciding = [step for step in again if step.decides]
        for stage in stages([*deciding, *todo, *(step for step in again if not step.decides)]):
            self._stage(stage)
            for step in stage:
                outcome = self._state.outcome(step.name)
                if step.decides and outcome is not None and outcome.status != DONE:
                    if self._cuda:
                        self._stage([DIAGNOSIS])
                    self._say("The rest of the time is kept: nothing else is worth measuring before this is right.")
                    return

    def _stage(self, stage: Sequence[Step]) -> None:
        tuned = self._state.use_tuned_table()
        self._rows_of = f"{self._commit}+tuned-tiles" if tuned else self._commit
        running: dict[str, tuple[Step, Group, float]] = {}
        try:
            for step in stage:
                if self._left < step.least + step.timed:
                    self._end(
                        step, None, LATE, f"{max(0, self._left):.0f} s were left, of which it needs {step.least:g}."
                    )
                    continue
                self._start(step, running)
            self._wait(running)
            for step, group, _ in list(running.values()):
                # These are prepared and hold on: now each has the device to itself.
                (self._state.step(step.name) / GO).touch()
                running[step.name] = step, group, time.monotonic() + min(step.timed, self._left)
                self._wait(running, only=step.name)
        except Interrupted:
            for step, group, _ in running.values():
                self._end(step, group, CUT, "The run was ended.")
            raise
        finally:
            for _, group, _ in running.values():
                group.end(grace=0)

    def _start(self, step: Step, running: dict[str, tuple[Step, Group, float]]) -> None:
        folder, seconds = self._state.step(step.name), min(step.seconds, self._left)
        for name in (GO, f"{GO}.ready"):
            (folder / name).unlink(missing_ok=True)
        place = Place(folder, self._rows_of, self._quick, self._cuda, max(1.0, seconds - _MARGIN_SECONDS))
        command = step.command(place)
        self._say(f"{step.name}: begins, {seconds:.0f} s at most")
        try:
            group = Group(
                command, self._state.note(step.name), folder / "log.txt", self._state.tree, self._environment()
            )
        except OSError as error:
            self._end(step, None, FAILED, f"It could not be started: {error.strerror}.")
            return
        running[step.name] = step, group, time.monotonic() + seconds

    def _wait(self, running: dict[str, tuple[Step, Group, float]], only: str | None = None) -> None:
        """Until all have ended, or hold on; with `only`, until that one has ended."""

        def settled() -> bool:
            for step, group, until in list(running.values()):
                waits = step.timed and step.name != only and (self._state.step(step.name) / f"{GO}.ready").exists()
                if group.code is not None:
                    self._end(running.pop(step.name)[0], group, *self._verdict(step, group.code))
                elif time.monotonic() > until and not waits:
                    cut = self._left <= 0
                    sentence = "The run's time was over." if cut else f"It still ran after {group.seconds:.0f} s."
                    self._end(running.pop(step.name)[0], group, CUT if cut else ENDED, sentence)
            if time.monotonic() > self._packed + _PACK_SECONDS:
                self._pack()
            if only is not None:
                return only not in running
            ready = (self._state.step(name) / f"{GO}.ready" for name, (step, *_) in running.items() if step.timed)
            return all(step.timed for step, *_ in running.values()) and all(file.exists() for file in ready)

        wait(settled, 1e9)

    def _verdict(self, step: Step, code: int) -> tuple[str, str]:
        if code == 0:
            return DONE, ""
        lines = (self._state.step(step.name) / "log.txt").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        how = f"Signal {signal.Signals(-code).name} ended it" if code < 0 else f"It returned {code}"
        return FAILED, f"{how}: {last[-300:]}"

    def _end(self, step: Step, group: Group | None, status: str, sentence: str) -> None:
        seconds = 0.0
        if group is not None:
            group.end(step.stop)
            seconds = group.seconds
        outcome = Outcome(status, round(seconds, 1), sentence)
        self._say(f"{step.name}: {status}, {seconds:.0f} s. {sentence}")
        try:
            self._state.keep(step.name, outcome)
        except OSError as error:
            self._say(f"The state folder cannot be written, and the next call will run {step.name} again: {error}")
        self._pack()

    def _pack(self) -> None:
        self._packed = time.monotonic()
        try:
            self._output.pack()
        except OSError as error:
            self._say(f"The results cannot be copied out now, and stay in the state folder: {error}")

    def _environment(self) -> dict[str, str]:
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        caches = {name: str(self._state.caches / folder) for name, folder in caches.items()}
        interpreter = {} if self._cuda else {"TRITON_INTERPRET": "1"}
        return os.environ | caches | interpreter | {"PYTHONUNBUFFERED": "1"}

    def _say(self, line: str) -> None:
        print(line, flush=True)


def stages(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that follow each other and need not be alone run together."""
    stage: list[Step] = []
    for step in steps:
        if stage and (step.alone or stage[-1].alone):
            yield stage
            stage = []
        stage.append(step)
    if stage:
        yield stage


def schedule(steps: Sequence[Step], minutes: float, quick: bool, commit: str, state: Path) -> Iterator[str]:
    """Lines that say what a run would do, and when at the latest."""
    now, left = 0.0, 60 * minutes - _RESERVE_SECONDS
    cuda = torch.cuda.is_available()
    for stage in stages(steps):
        begun = [step for step in stage if now + step.least + step.timed <= left]
        for step in stage:
            when = f"{now:4.0f} s" if step in begun else "  late"
            alone = (
                "alone" if step.alone else f"beside others, then {step.timed:.0f} s alone" if step.timed else "beside"
            )
            place = Place(state / "steps" / step.name, commit, quick, cuda, min(step.seconds, left) - _MARGIN_SECONDS)
            yield f"{when}  {step.name}: {step.least:.0f} to {step.seconds:.0f} s, {alone}: {step.yields}"
            yield f"        {' '.join(step.command(place))}"
        now += min(left, max((step.seconds for step in begun), default=0)) + sum(step.timed for step in begun)
    yield f"{now:.0f} s at most, of {60 * minutes:.0f}; {_RESERVE_SECONDS:.0f} s are kept for the end."


def _names(text: str) -> tuple[str, ...]:
    return parse_choices(text, [step.name for step in STEPS], "step")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run",
        description="Everything that is worth measuring on a GPU that is at hand for a few minutes.",
        epilog="steps: " + ", ".join(step.name for step in STEPS),
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="that the call may take (default: 9)")
    add("--output", type=Path, default=Path("gpu-output"), help="folder for the results (default: %(default)s)")
    add(
        "--state",
        type=Path,
        default=Path("gpu-state"),
        help="folder that a later call goes on from (default: %(default)s)",
    )
    add("--commit", help="for the rows, in a copy of the tree without its git directory")
    add("--only", type=_names, default=(), help="steps to run")
    add("--skip", type=_names, default=(), help="steps not to run")
    add("--dry-run", action="store_true", help="run nothing: print steps, commands, budgets, and when each begins")
    add("--quick", action="store_true", help="a smoke test of all steps on the tiny model, also without a GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a step failed."""
    parser = _parser()
    options = parser.parse_args(argv)
    steps = [s for s in STEPS if (not options.only or s.name in options.only) and s.name not in options.skip]
    commit = options.commit or provenance("")["commit"]
    if options.dry_run:
        print("\n".join(schedule(steps, options.minutes, options.quick, commit, options.state)))
        return 0
    try:
        state = State(options.state, commit)
        output = Output(options.output, state, [step.name for step in (*STEPS, DIAGNOSIS)], commit)
    except ValueError as error:
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for name in state.end_leftovers():
        print(f"{name}: an earlier call left it running; it was ended.")
    run = Run(state, output, options.minutes, commit, options.quick)
    try:
        state.copy_tree()
        run.steps(steps)
    except Interrupted:
        print("The run was told to end.")
    finally:
        state.close()
    print(output.summary())
    outcomes = state.outcomes(step.name for step in steps)
    return int(any(outcome.status in (FAILED, ENDED) for outcome in outcomes.values()))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


if __name__ == "__main__":
    sys.exit(main())
