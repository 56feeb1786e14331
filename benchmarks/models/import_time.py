"""`python -m benchmarks.models.import_time`: what importing takes, each time in a fresh interpreter.

`import mtu` leaves what needs torch and diffusers to its first use. So that use is measured beside it: every public
name of mtu, against diffusers with the stock pipeline. Times are those of whole processes, run interleaved.
"""

from __future__ import annotations

import datetime
import functools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.harness.arguments import parse_count
from benchmarks.harness.commands import make_parser, parse
from benchmarks.harness.provenance import RESULTS, ROOT, command_line, provenance
from benchmarks.harness.rows import TIMES, Row, Table
from benchmarks.harness.timing import summary

_ROUNDS = 20
_WARM_ROUNDS = 1
_DIFFUSERS = "import torch; import diffusers"


class Pair(NamedTuple):
    """Two statements to compare.

    Attributes:
        part: what is compared.
        ours: a statement.
        theirs: the statement that its time is divided by.
        at_most: the target; None: there is none.
    """

    part: str
    ours: str
    theirs: str
    at_most: float | None


PAIRS = (
    Pair("import", "import mtu", _DIFFUSERS, 1.1),
    Pair("first use", "from mtu import *", f"{_DIFFUSERS}; diffusers.StableDiffusionPipeline", 1.1),
    Pair("kernels", "import mtu_kernels", "import torch", None),
)


# A contender is a statement that a fresh interpreter runs; its part is that of its pair.
TABLE = Table(
    "benchmarks.models.import_time",
    ("group", "part", "statement", *TIMES, "rounds"),
    times=".0f",
    fields={"statement": "contender"},
)


def process_us(statement: str) -> float:
    """Time of `python -c statement`, from its start to its end, in µs.

    Raises:
        RuntimeError: the statement fails.
    """
    # In the checkout's root, whose packages are then found whether they are installed or not.
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False)
    taken = (time.perf_counter() - start) * 1e6
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"A statement to time must run, but {statement!r} ended with {done.returncode}: {last}")
    return taken


def measure(rounds: int, source: dict[str, str]) -> list[Row]:
    """Times all statements interleaved, after a round that fills the caches of files and of bytecode."""
    group = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    contenders = [(pair.part, statement) for pair in PAIRS for statement in (pair.ours, pair.theirs)]
    times: list[list[float]] = []
    for _ in tqdm(range(_WARM_ROUNDS + rounds), unit="round", file=sys.stderr):
        times.append([process_us(statement) for _, statement in contenders])
    rows = []
    for contender, column in zip(contenders, zip(*times[_WARM_ROUNDS:], strict=True), strict=True):
        timing = summary(column, graph=False)
        part, statement = contender
        rows.append(Row(group=group, part=part, contender=statement, **timing._asdict(), source=source))
    return rows


def report(rows: Sequence[Row]) -> list[str]:
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
    parser = make_parser(TABLE.module, __doc__.split("\n")[0])
    at_least_two = functools.partial(parse_count, least=2)
    parser.add_argument(
        "--rounds", type=at_least_two, default=_ROUNDS, help="timed runs of each (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "import_time.csv", help="CSV to add rows to")
    argv, given = parse(parser, argv)
    source = provenance(command_line(TABLE.module, argv))
    try:
        TABLE.check(given.output, source)
    except ValueError as error:
        parser.error(str(error))
    rows = measure(given.rounds, source)
    for row in rows:
        TABLE.append(given.output, row)
    print(f"{len(rows)} rows added to {given.output}")
    print("\n".join(report(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
