"""`python -m benchmarks.models.import_time`: times of imports, each in a fresh interpreter.

`import mtu` imports torch and diffusers only on first use. That use is measured beside it: every public name of mtu,
against diffusers with the stock pipeline. Times are those of whole processes, which run interleaved.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.harness.arguments import parse_rounds
from benchmarks.harness.commands import exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, ROOT, collect_provenance, command_line
from benchmarks.harness.recording import new_run_name
from benchmarks.harness.rows import TIMES, CsvTable, Row
from benchmarks.harness.timing import summarize_times

_ROUNDS = 20
_WARM_ROUNDS = 1
_DIFFUSERS = "import torch; import diffusers"


class StatementPair(NamedTuple):
    """Two statements: the time of ours is divided by that of theirs, and compared with the target, if there is one."""

    part: str
    ours: str
    theirs: str
    target_ratio: float | None


PAIRS = (
    StatementPair("import", "import mtu", _DIFFUSERS, 1.1),
    StatementPair("first use", "from mtu import *", f"{_DIFFUSERS}; diffusers.StableDiffusionPipeline", 1.1),
    StatementPair("kernels", "import mtu_kernels", "import torch", None),
)


# A contender is a statement that a fresh interpreter runs; its part is that of its pair.
_COLUMNS = ("group", "part", "statement", *TIMES, "rounds")
TABLE = CsvTable(
    "benchmarks.models.import_time", _COLUMNS, time_format=".0f", field_of_column={"statement": "contender"}
)


def measure_process_us(statement: str) -> float:
    """Time of `python -c statement`, from its start to its end, in µs. Raises RuntimeError if it fails."""
    # It runs in the checkout's root, whose packages are then found whether they are installed or not.
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False)
    taken = (time.perf_counter() - start) * 1e6
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"A statement to time must run, but {statement!r} ended with {done.returncode}: {last}")
    return taken


def measure_statements(rounds: int, source: dict[str, str]) -> list[Row]:
    """Times all statements interleaved, after a round that fills the caches of files and of bytecode."""
    place = {"group": new_run_name(), "source": source}
    contenders = [(pair.part, statement) for pair in PAIRS for statement in (pair.ours, pair.theirs)]
    times = []
    for _ in tqdm(range(_WARM_ROUNDS + rounds), unit="round", file=sys.stderr):
        times.append([measure_process_us(statement) for _, statement in contenders])
    timings = [summarize_times(column, graph=False)._asdict() for column in zip(*times[_WARM_ROUNDS:], strict=True)]
    pairs = zip(contenders, timings, strict=True)
    return [Row(part=part, contender=statement, **place, **timing) for (part, statement), timing in pairs]


def report_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each pair: both medians, their ratio, and its target."""
    medians = {(row.part, row.contender): row.median_us for row in rows}
    lines = []
    for part, ours, theirs, at_most in PAIRS:
        mine, other = medians[part, ours], medians[part, theirs]
        line = f"{part}: {ours} {mine / 1e6:.2f} s / {theirs} {other / 1e6:.2f} s = {mine / other:.3f}"
        if at_most is not None:
            line += f" (at most {at_most:.2f}{'' if mine <= at_most * other else ', missed'})"
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = make_parser(TABLE.module, "Times of imports, each in a fresh interpreter.")
    parser.add_argument(
        "--rounds", type=parse_rounds, default=_ROUNDS, help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "import_time.csv", help="CSV to add rows to")
    argv, options = parse_arguments(parser, argv)
    source = collect_provenance(command_line(TABLE.module, argv))
    with exit_on_usage_errors(parser):
        TABLE.check_columns(options.output, source)
    rows = measure_statements(options.rounds, source)
    for row in rows:
        TABLE.append_row(options.output, row)
    print(f"{len(rows)} rows added to {options.output}")
    print("\n".join(report_lines(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
