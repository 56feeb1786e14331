"""`python -m benchmarks.training.resume`: the first step after a resume at step 10,000, beside the first step of all.

Each measurement is a process of its own: the icons model trains on a folder of edits until one step has ended
(`first_step`). Two times are taken of it: from the start of the process, imports included, and from the call of the
trainer, which reads the checkpoint. With --peer, diffusers' train_instruct_pix2pix.py makes the same step on the same
folder with the same base model, timed in the same ways (`peer_first_step`): its loop begins after its models are
loaded, and before it reads the checkpoint. All processes run interleaved.

The folder has more rows than the steps before the resume visit, so that the resume is within the first epoch. Caches
are full, also at step 0. No training makes 10,000 steps here: the checkpoint is that of the first step under another
number. Everything of a step follows from its number, or from what the checkpoint holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.harness.arguments import parse_count
from benchmarks.harness.commands import add_commit_option, exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, ROOT, collect_provenance, command_line
from benchmarks.harness.recording import new_run_name
from benchmarks.harness.rows import TIMES, CsvTable, Row
from benchmarks.harness.timing import summarize_times
from benchmarks.harness.workloads import Workload
from benchmarks.training.icon_folder import EDGE, write_icon_folder
from mtu.recipes.icons.demo import SHIPPED_BASE_MODEL

TABLE = CsvTable(
    "benchmarks.training.resume",
    ("group", "contender", "part", "resumed_at", *TIMES, "rounds"),
    time_format=".0f",
    field_of_column={"resumed_at": "steps"},
)
FILE = "training_resume.csv"
PEER = "train_instruct_pix2pix"
PARTS = ("process", "loop")
# The most that the first step after a resume may take, relative to the first step of all.
MOST = 1.1
_ROUNDS = 3
_RESUMED_AT = 10_000
# Rows beyond those that are visited before the resume.
_SPARE_ROWS = 100
_IMAGES = 64


class Case(NamedTuple):
    """A training that is timed: its name, and its arguments besides the folders.

    Attributes:
        name: the contender.
        arguments: of `first_step`, or of the peer's script.
        is_peer: whether it is the peer's.
    """

    name: str
    arguments: tuple[str, ...]
    is_peer: bool = False


CASES = (
    Case("mtu, cached", ()),
    Case("mtu, cached, 2 workers", ("--workers", "2")),
    Case("mtu, uncached", ("--cache", "none")),
    Case(PEER, (), is_peer=True),
)


class FirstStepTimes(NamedTuple):
    """Seconds until the end of the first step, from the start of the process and from that of the loop."""

    process: float
    loop: float


class Trainings:
    """The trainings in a folder, and how to start each of them in a process.

    Args:
        folder: an empty folder.
        resumed_at: the step of the checkpoints.
        peer, site: the peer's script and the folder of its libraries; None: there is no peer.
    """

    def __init__(self, folder: Path, resumed_at: int, peer: Path | None, site: Path | None) -> None:
        self._folder, self._resumed_at, self._peer, self._site = folder, resumed_at, peer, site
        self.cases = [case for case in CASES if peer is not None or not case.is_peer]

    def prepare(self) -> None:
        """Write the data, fill the cache, and make the checkpoints."""
        write_icon_folder(self._folder / "few", _IMAGES, _IMAGES)
        write_icon_folder(self._folder / "data", self._resumed_at + _SPARE_ROWS, _IMAGES)
        own, peer = (self._run_folder(is_peer, is_resumed=True) for is_peer in (False, True))
        # Images have the same keys in both folders. The first one has few rows, and is encoded sooner.
        self._start(self._own_arguments(own, "few"))
        # Neither the cache nor the workers make another training, so one checkpoint serves all cases.
        self._start([*self._own_arguments(own, "data"), "--checkpoint-at", str(self._resumed_at)])
        if self._peer is not None:
            last = [*self._peer_arguments(peer), "--max_train_steps=1", "--checkpointing_steps=1"]
            self._start(last, is_peer=True, keeps_going=True)
            (peer / "checkpoint-1").rename(peer / f"checkpoint-{self._resumed_at}")

    def measure(self, number: int, is_resumed: bool) -> FirstStepTimes:
        """Times of a case, by its number: resumed, or from step 0."""
        case = self.cases[number]
        run = self._run_folder(case.is_peer, is_resumed)
        if case.is_peer:
            arguments = [*self._peer_arguments(run), f"--max_train_steps={10 * self._resumed_at}", *case.arguments]
            resume = ["--resume_from_checkpoint=latest"]
        else:
            arguments, resume = [*self._own_arguments(run, "data"), *case.arguments], ["--resume"]
        return self._start([*arguments, *(resume if is_resumed else [])], case.is_peer)

    def _run_folder(self, is_peer: bool, is_resumed: bool) -> Path:
        return self._folder / f"{'peer' if is_peer else 'mtu'}-{'resumed' if is_resumed else 'new'}"

    def _own_arguments(self, run: Path, data: str) -> list[str]:
        return ["--run", str(run), "--data", str(self._folder / data), "--cache-folder", str(self._folder / "cache")]

    def _peer_arguments(self, run: Path) -> list[str]:
        options: dict[str, Any] = {
            "pretrained_model_name_or_path": SHIPPED_BASE_MODEL,
            "train_data_dir": self._folder / "data",
            "original_image_column": "condition",
            "edited_image_column": "target",
            "edit_prompt_column": "prompt",
            "resolution": EDGE,
            "train_batch_size": 1,
            "conditioning_dropout_prob": 0.05,
            "output_dir": run,
            "seed": 0,
        }
        return [f"--{name}={value}" for name, value in options.items()]

    def _start(self, arguments: list[str], is_peer: bool = False, keeps_going: bool = False) -> FirstStepTimes:
        module = "benchmarks.training.first_step"
        if is_peer:
            module = "benchmarks.training.peer_first_step"
            own = ["--script", str(self._peer), "--site", str(self._site), *(["--keep-going"] if keeps_going else [])]
            arguments = [*own, "--", *arguments]
        # The peer's data set library keeps its tables in this folder, and none of them asks a server.
        environment = {**os.environ, "HF_HOME": str(self._folder / "hub"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", module, *arguments]
        start = time.time()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise RuntimeError(f"A training to time must run, but {module} ended with {done.returncode}: {last}")
        times = json.loads(lines[0])
        return FirstStepTimes(times["end"] - start, times["loop"])


def measure_rows(trainings: Trainings, resumed_at: int, rounds: int, source: dict[str, str]) -> list[Row]:
    """Times all cases interleaved. Preparing them has filled the caches of files."""
    turns = [(number, is_resumed) for number in range(len(trainings.cases)) for is_resumed in (False, True)]
    times: dict[tuple[int, bool], list[FirstStepTimes]] = {turn: [] for turn in turns}
    for turn in tqdm(turns * rounds, unit="process", file=sys.stderr):
        times[turn].append(trainings.measure(*turn))
    group, rows = new_run_name(), []
    for (number, is_resumed), measured in times.items():
        workload = Workload(steps=resumed_at if is_resumed else 0)
        for part in PARTS:
            timing = summarize_times([getattr(one, part) * 1e6 for one in measured], graph=False)._asdict()
            name = trainings.cases[number].name
            rows.append(Row(group=group, contender=name, part=part, workload=workload, source=source, **timing))
    return rows


class Comparison(NamedTuple):
    """The median times in µs of a contender's first step: of all, and after the resume."""

    contender: str
    part: str
    first_us: float
    resumed_us: float

    @property
    def ratio(self) -> float:
        """The resumed one over the first."""
        return self.resumed_us / self.first_us


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Each contender of the last run in each part."""
    rows = [row for row in rows if row.group == rows[-1].group]
    medians = {(row.contender, row.part, row.workload.steps > 0): row.median_us for row in rows}
    return [
        Comparison(name, part, first, medians[name, part, True])
        for (name, part, is_resumed), first in medians.items()
        if not is_resumed and (name, part, True) in medians
    ]


def report_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each contender and part. The target is of ours, for the process."""
    lines = []
    for contender, part, first, resumed in (comparison for comparison in compare(rows)):
        ratio = resumed / first
        line = f"{contender}, {part}: resumed {resumed / 1e6:.2f} s / first {first / 1e6:.2f} s = {ratio:.3f}"
        if part == "process" and not contender.startswith(PEER):
            line += f" (at most {MOST:.2f}{'' if ratio <= MOST else ', missed'})"
        lines.append(line)
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(TABLE.module, "The first step after a resume, beside the first step of all.")
    add = parser.add_argument
    add("--rounds", type=parse_count, default=_ROUNDS, help="timed processes of each (default: %(default)s)")
    add("--resume-at", type=parse_count, default=_RESUMED_AT, help="step of the checkpoint (default: %(default)s)")
    add("--peer", type=Path, help="diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py")
    add("--peer-site", type=Path, help="folder that `pip install --target` made of datasets and tensorboard")
    add("--quick", action="store_true", help="two rounds, and a resume at step 20")
    add("--output", type=Path, default=RESULTS / FILE, help="CSV to add rows to (default: %(default)s)")
    add_commit_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = _parser()
    argv, options = parse_arguments(parser, argv)
    if options.quick:
        options.rounds, options.resume_at = 2, 20
    if options.rounds < 2:
        parser.error(f"--rounds must be 2 at least, got {options.rounds}.")
    if (options.peer is None) != (options.peer_site is None):
        parser.error("--peer and --peer-site go together: the script, and the folder of its libraries.")
    source = collect_provenance(command_line(TABLE.module, argv), commit=options.commit)
    with exit_on_usage_errors(parser):
        TABLE.check_columns(options.output, source)
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), options.resume_at, options.peer, options.peer_site)
        trainings.prepare()
        rows = measure_rows(trainings, options.resume_at, options.rounds, source)
    for row in rows:
        TABLE.append_row(options.output, row)
    print(f"{len(rows)} rows added to {options.output}")
    print("\n".join(report_lines(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
