"""`python -m benchmarks.training.kill_and_resume`: whether a training that is ended early and resumed loses anything.

For each case, one training runs unbroken. The others are ended at random moments and resumed: by three SIGKILLs one
after the other, by a SIGKILL after which the newest checkpoint is cut off, and by a SIGTERM. A signal goes to one
process at random, and the others must end by themselves. In the end, weights, average, optimizer and losses must have
the SHA-256 of the unbroken training.
"""

import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.harness.arguments import names_parser, parse_count
from benchmarks.harness.commands import exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.rows import append_cells, check_header
from benchmarks.training.kill_cases import CASES, Case, Digests, digests_of_training, logged_step, train_case
from benchmarks.training.processes import start_processes
from mtu.training.checkpoints import checkpoint_steps

MODULE = "benchmarks.training.kill_and_resume"
_SECONDS_TO_END = 60
_ATTEMPTS = 5


class Ending(NamedTuple):
    """How a training is ended early.

    Attributes:
        signal_number: what one of its processes gets.
        times: how many times, each after a resume.
        tears: whether the newest checkpoint is cut off afterwards.
    """

    signal_number: int
    times: int = 1
    tears: bool = False


ENDINGS = {
    "3 SIGKILLs": Ending(signal.SIGKILL, times=3),
    "torn checkpoint": Ending(signal.SIGKILL, tears=True),
    "SIGTERM": Ending(signal.SIGTERM),
}


class Outcome(NamedTuple):
    """A training that was ended early and resumed.

    Attributes:
        ended_at: the last step in the log at each end.
        resumed_from: the step of the newest whole checkpoint at each resume; 0: there was none.
        digests: of what the training left.
    """

    ended_at: tuple[int, ...]
    resumed_from: tuple[int, ...]
    digests: Digests


class _TooLateError(Exception):
    """The training was over before the signal."""


_STORES = itertools.count()


def run_unbroken(case: Case, steps: int, directory: Path) -> Digests:
    """Train without an interruption."""
    directory.mkdir()
    _finish(_start(case, steps, directory, resume=False), directory)
    return digests_of_training(directory, steps)


def run_interrupted(case: Case, ending: Ending, steps: int, directory: Path, rng: random.Random) -> Outcome:
    """Train, end the training early at random moments and resume it.

    Raises:
        RuntimeError: a process ended as it should not, or not at all.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _run_interrupted(case, ending, steps, directory / str(attempt), rng)
        except _TooLateError:
            continue
    raise RuntimeError(f"{_ATTEMPTS} trainings of {steps} steps were over before a signal: take more steps.")


def _run_interrupted(case: Case, ending: Ending, steps: int, directory: Path, rng: random.Random) -> Outcome:
    directory.mkdir(parents=True)
    ended_at, resumed_from = [], []
    # An older checkpoint than the torn one must be there.
    first = 5 if ending.tears else 0
    for number, step in enumerate(sorted(rng.sample(range(first, steps - 1), ending.times))):
        if number:
            resumed_from.append(_newest_step(directory))
        processes = _start(case, steps, directory, resume=number > 0)
        _end_early(processes, ending.signal_number, directory, step, rng)
        ended_at.append(logged_step(directory))
    resumed_from.append(_newest_step(directory))
    if ending.tears:
        _tear_newest_checkpoint(directory, rng)
        resumed_from[-1] = checkpoint_steps(directory)[-2]
    _finish(_start(case, steps, directory, resume=True), directory)
    return Outcome(tuple(ended_at), tuple(resumed_from), digests_of_training(directory, steps))


def _start(case: Case, steps: int, directory: Path, resume: bool) -> list[ForkServerProcess]:
    store = directory / f"store-{next(_STORES)}"
    return start_processes(train_case, store, [(case, steps, directory, resume)] * case.processes)


def _end_early(
    processes: Sequence[ForkServerProcess], number: int, directory: Path, step: int, rng: random.Random
) -> None:
    """Send a signal to one process some time after a step, and wait until all processes have ended."""
    while logged_step(directory) < step and all(process.exitcode is None for process in processes):
        time.sleep(0.005)
    # A step takes some tenths of a second, and what precedes the first one takes a second or two.
    time.sleep(rng.uniform(0, 0.3 if step else 2))
    victim = rng.choice(processes)
    if victim.exitcode is not None or victim.pid is None:
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"A training failed before it was ended:\n{_output(directory)}")
        raise _TooLateError
    os.kill(victim.pid, number)
    _join(processes, directory)
    codes = [process.exitcode for process in processes]
    if not any(codes):
        raise _TooLateError
    expected = [-number if process is victim else 1 for process in processes]
    if number == signal.SIGTERM:
        # Before the first step, nothing handles the signal, and the other processes fail.
        handled = [128 + number] * len(processes)
        expected = handled if logged_step(directory) or codes[processes.index(victim)] == 128 + number else expected
    if codes != expected:
        raise RuntimeError(f"Processes must end with {expected}, but ended with {codes}:\n{_output(directory)}")


def _finish(processes: Sequence[ForkServerProcess], directory: Path) -> None:
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"Processes must end with 0, but ended with {codes}:\n{_output(directory)}")


def _join(processes: Sequence[ForkServerProcess], directory: Path) -> None:
    until = time.monotonic() + _SECONDS_TO_END
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
        process.join()
    if hanging:
        raise RuntimeError(f"{len(hanging)} processes waited for one that had ended:\n{_output(directory)}")


def _newest_step(directory: Path) -> int:
    return max(checkpoint_steps(directory), default=0)


def _tear_newest_checkpoint(directory: Path, rng: random.Random) -> None:
    """Cut the newest checkpoint's file of tensors off at a random length."""
    [path] = (directory / "checkpoints").glob(f"step-{_newest_step(directory):08d}.*.safetensors")
    with path.open("rb+") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def _output(directory: Path) -> str:
    """The end of what the processes of a training wrote."""
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(directory.glob("output-*.txt")))


def rows_of_case(name: str, steps: int, folder: Path, seed: int) -> list[dict[str, object]]:
    """Run a case unbroken and with each ending, and return a row for each ending."""
    case, rows = CASES[name], []
    expected = run_unbroken(case, steps, folder / "unbroken")
    for ending_name, ending in ENDINGS.items():
        rng = random.Random(f"{seed} {name} {ending_name}")
        outcome = run_interrupted(case, ending, steps, folder / ending_name.replace(" ", "-"), rng)
        rows.append(
            {
                "case": name,
                "ending": ending_name,
                **case._asdict(),
                "steps": steps,
                "ended_at": " ".join(map(str, outcome.ended_at)),
                "resumed_from": " ".join(map(str, outcome.resumed_from)),
                **{f"{kind}_sha256": digest for kind, digest in outcome.digests._asdict().items()},
                "unequal": sum(a != b for a, b in zip(outcome.digests, expected, strict=True)),
            }
        )
    return rows


COLUMNS = (
    *("case", "ending", *Case._fields, "steps", "ended_at", "resumed_from"),
    *(f"{kind}_sha256" for kind in Digests._fields),
    "unequal",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. The exit code is 1 if a resumed training differs from the unbroken one."""
    parser = make_parser(MODULE, "Whether a training that is ended early and resumed loses anything.")
    parser.add_argument("--cases", type=names_parser(CASES, "case"), default=tuple(CASES), help="(default: all)")
    parser.add_argument("--steps", type=lambda text: parse_count(text, 10), default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill_and_resume.csv", help="CSV to add rows to")
    argv, options = parse_arguments(parser, argv)
    source = collect_provenance(command_line(MODULE, argv))
    with exit_on_usage_errors(parser):
        check_header(options.output, [*COLUMNS, *source])
    unequal = 0
    for name in tqdm(options.cases, unit="case", file=sys.stderr):
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of_case(name, options.steps, Path(folder), options.seed)
        for row in rows:
            append_cells(options.output, {**{key: str(value) for key, value in row.items()}, **source})
            unequal += bool(row["unequal"])
            tqdm.write(
                f"{name:16} {row['ending']:16} ended at {row['ended_at']}, resumed from {row['resumed_from']}: "
                + ("UNEQUAL" if row["unequal"] else "equal")
            )
    print(f"{unequal} resumed trainings differ from the unbroken one; rows added to {options.output}")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
