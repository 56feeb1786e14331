"""The options that commands share, and the device, the file and the provenance that they begin with."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness.contenders import Contender
from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.provenance import RESULTS, collect_provenance, command_line
from benchmarks.harness.rows import CsvTable, Row


class CommandContext(NamedTuple):
    """The device that a command measures on, and the file of its rows with their columns and their provenance."""

    table: CsvTable
    device: torch.device
    output_file: Path
    source: dict[str, str]

    def append_row(self, row: Row) -> None:
        """Adds a row to the file."""
        self.table.append_row(self.output_file, row)


def make_parser(
    module: str, description: str | None, contenders: Mapping[str, Contender] | None = None, noun: str = "contenders"
) -> argparse.ArgumentParser:
    """The parser of a command. Its help ends with the names of the contenders and a line about each."""
    lines = [f"  {name:24} {contender.description}" for name, contender in (contenders or {}).items()]
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"{noun}:\n" + "\n".join(lines) if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter if lines else argparse.HelpFormatter,
    )


def add_common_options(parser: argparse.ArgumentParser, output: str, *, dtype: bool = True) -> None:
    """Adds --device, --output and --commit, and --dtype where the command measures a single dtype."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    if dtype:
        parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--output", type=Path, help=f"CSV to add rows to (default: results/{output})")
    add_commit_option(parser)


def add_commit_option(parser: argparse.ArgumentParser) -> None:
    """Adds --commit."""
    parser.add_argument("--commit", help="for the provenance, in a copy of the tree without its git directory")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --minutes, --resume and --report, for commands that measure many groups and report ratios."""
    parser.add_argument("--minutes", type=float, help="no group is begun after these (default: all are)")
    parser.add_argument("--resume", action="store_true", help="leave out groups that the files have of this commit")
    parser.add_argument("--report", type=Path, metavar="CSV", help="measure nothing: print the ratios of these rows")


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[Sequence[str], argparse.Namespace]:
    """The arguments, by default those of the process, and the options that they stand for."""
    # Otherwise the profiler, which counts memory on a CPU, writes two lines for each row. It reads this when it starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    argv = sys.argv[1:] if argv is None else argv
    return argv, parser.parse_args(argv)


@contextmanager
def exit_on_usage_errors(parser: argparse.ArgumentParser, *others: type[Exception]) -> Iterator[None]:
    """Ends the command with the message of a ValueError, as for a wrong argument."""
    try:
        yield
    except (ValueError, *others) as error:
        parser.error(str(error))


def choose_device(name: str) -> torch.device:
    """The device of the option --device. Raises ValueError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch finds none.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def start_command(table: CsvTable, options: argparse.Namespace, argv: Sequence[str], output: str) -> CommandContext:
    """Chooses the device and checks the file before anything is measured.

    Args:
        table: the columns of the rows.
        options: those of `add_common_options`.
        argv: the arguments, for the provenance.
        output: name of the default file; "{device}" in it stands for the kind of device.

    Raises:
        ValueError: there is no such device, or the file has other columns.
    """
    device = choose_device(options.device)
    path = options.output or RESULTS / output.format(device=device.type)
    source = collect_provenance(command_line(table.module, argv), device, options.commit)
    table.check_columns(path, source)
    return CommandContext(table, device, path, source)
