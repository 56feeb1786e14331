"""`python -m benchmarks.gpu_run`: all measurements for a GPU that is available for a few minutes.

The most valuable steps run first, each in processes of its own and within a budget: a step that hangs or crashes loses
its own result alone. The output folder has all results after each step. A call that is cut off loses nothing: the next
one with the same state folder goes on.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from benchmarks.gpu.collect import place_results_and_redraw
from benchmarks.gpu.output import PackedOutput, make_writable_folder
from benchmarks.gpu.stages import (
    MARGIN_SECONDS,
    RESERVE_SECONDS,
    GPURun,
    RunInterrupted,
    group_into_stages,
    steps_that_fit,
)
from benchmarks.gpu.state import ENDED, FAILED, State, folder_of_commit
from benchmarks.gpu.steps import DIAGNOSIS, STEPS, Step, StepContext
from benchmarks.harness.arguments import names_parser
from benchmarks.harness.commands import add_commit_option, make_parser
from benchmarks.harness.provenance import collect_provenance


def schedule(steps: Sequence[Step], minutes: float, quick: bool, commit: str, state: Path) -> Iterator[str]:
    """Lines with the steps of a run, their commands, and the latest time that each begins."""
    now, end = 0.0, 60 * minutes - RESERVE_SECONDS
    cuda, folder = torch.cuda.is_available(), folder_of_commit(state, commit + "+quick" * quick) / "steps"
    for stage in group_into_stages(steps):
        begun = steps_that_fit(stage, end - now)
        timed = sum(step.seconds_alone for step in begun)
        for step in stage:
            when = f"{now:4.0f} s" if step in begun else "  late"
            alone = f"beside others, then {step.seconds_alone:.0f} s alone" if step.seconds_alone else "beside others"
            seconds = min(step.budget_seconds, end - now - timed)
            place = StepContext(folder / step.name, commit, quick, cuda, max(1.0, seconds - MARGIN_SECONDS))
            alone = "alone" if step.runs_alone else alone
            budget = f"{step.least_seconds:.0f} to {step.budget_seconds:.0f} s"
            yield f"{when}  {step.name}: {budget}, {alone}: {step.results_in_words}"
            yield f"        {shlex.join(step.make_command(place))}"
        now += min(max((step.budget_seconds for step in begun), default=0.0), end - now - timed) + timed
    yield f"{now:.0f} s at most, of {60 * minutes:.0f}; {RESERVE_SECONDS:.0f} s are kept for the end."


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.gpu_run", "All measurements for a GPU that is available for a few minutes.")
    parser.epilog = "steps: " + ", ".join(step.name for step in STEPS)
    add, names = parser.add_argument, names_parser([step.name for step in STEPS], "step")
    add("--minutes", type=float, default=9.0, help="that the call may take (default: 9)")
    add("--output", type=Path, default=Path("gpu-output"), help="folder for the results (default: %(default)s)")
    later = "folder that a later call goes on from (default: %(default)s)"
    add("--state", type=Path, default=Path("gpu-state"), help=later)
    add_commit_option(parser)
    add("--only", type=names, default=(), help="steps to run")
    add("--skip", type=names, default=(), help="steps not to run")
    add(
        "--collect", type=Path, metavar="DIR", help="run nothing: put the results in DIR into their places; draw, write"
    )
    add("--dry-run", action="store_true", help="run nothing: print steps, commands, budgets, and when each begins")
    add("--quick", action="store_true", help="a smoke test of all steps on the tiny model, also without a GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a step failed."""
    until = time.monotonic()
    parser = _parser()
    options = parser.parse_args(argv)
    until += 60 * options.minutes
    steps = [s for s in STEPS if (not options.only or s.name in options.only) and s.name not in options.skip]
    commit = options.commit or collect_provenance("")["commit"]
    # The steps of a smoke test do not count for a run.
    steps_of = commit + "+quick" * options.quick
    try:
        if options.commit is not None and not options.commit.strip():
            raise ValueError(f"--commit must name a commit, got {options.commit!r}.")
        if options.collect is not None:
            return place_results_and_redraw(options.collect)
        if not 60 * options.minutes > RESERVE_SECONDS:
            raise ValueError(
                f"--minutes must be more than the {RESERVE_SECONDS:.0f} s at the end, got {options.minutes}."
            )
        if options.dry_run:
            print("\n".join(schedule(steps, options.minutes, options.quick, commit, options.state)))
            return 0
        make_writable_folder(options.output)
        state = State(options.state, steps_of)
    except ValueError as error:
        parser.error(str(error))
    try:
        output = PackedOutput(options.output, state, [step.name for step in (*STEPS, DIAGNOSIS)], commit, options.quick)
    except ValueError as error:
        state.release()
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    for name in state.kill_leftovers():
        print(f"{name}: an earlier call left it running, and it was ended.", flush=True)
    try:
        try:
            state.copy_source_tree()
        except OSError as error:
            print(f"The copy of the tree cannot be written: {error}", file=sys.stderr)
            return 1
        GPURun(state, output, until, commit, options.quick).run_steps(steps)
    except RunInterrupted:
        print("The run was told to end.")
    finally:
        # A step may have begun in the moment of an interruption.
        state.kill_leftovers()
        state.release()
    print(output.summary_text())
    ended = state.read_outcomes(step.name for step in steps).values()
    return int(any(outcome.status in (FAILED, ENDED) for outcome in ended))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise RunInterrupted


if __name__ == "__main__":
    sys.exit(main())
