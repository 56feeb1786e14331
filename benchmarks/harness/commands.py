"""What the commands have in common: their options, the device that they choose, where rows go and come from."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.dtypes import DTYPES
from benchmarks.harness.provenance import RESULTS, command_line, provenance
from benchmarks.harness.rows import Table


class CommandContext(NamedTuple):
    """What a command knows before it measures.

    Attributes:
        device: where contenders run.
        output: file of the rows.
        source: their provenance.
    """

    device: torch.device
    output: Path
    source: dict[str, str]


def make_parser(
    module: str, description: str, contenders: Mapping[str, Any] | None = None, noun: str = "contenders"
) -> argparse.ArgumentParser:
    """The parser of a command, whose help ends with what there is to choose from: names, and what each is about."""
    lines = [f"  {name:24} {contender.about}" for name, contender in (contenders or {}).items()]
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"{noun}:\n" + "\n".join(lines) if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter if lines else argparse.HelpFormatter,
    )


def add_common_options(parser: argparse.ArgumentParser, output: str, *, dtype: bool = True) -> None:
    """Adds --device, --dtype where one is chosen, --output and --commit.

    Args:
        parser: of the command.
        output: the default file, for readers.
        dtype: whether the command measures a single dtype.
    """
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    if dtype:
        parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--output", type=Path, help=f"CSV to add rows to (default: results/{output})")
    parser.add_argument("--commit", help="for the provenance, in a copy of the tree without its git directory")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[Sequence[str], argparse.Namespace]:
    """The arguments, those of the process by default, and what they mean."""
    # Or else the profiler, which counts memory on a CPU, writes two lines for each row. Read when it starts first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    argv = sys.argv[1:] if argv is None else argv
    return argv, parser.parse_args(argv)


def choose_device(name: str) -> torch.device:
    """The device of the option --device.

    Raises:
        ValueError: there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch finds none.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def start(table: Table, options: argparse.Namespace, argv: Sequence[str], output: str) -> CommandContext:
    """Device, file and provenance of a command.

    Args:
        table: the kind of its rows.
        options: with those of `add_common_options`.
        argv: the arguments as they were given.
        output: name of the default file; "{device}" in it stands for the kind of device.

    Raises:
        ValueError: there is no such device, or the file has other columns.
    """
    device = choose_device(options.device)
    path = options.output or RESULTS / output.format(device=device.type)
    source = provenance(command_line(table.module, argv), device, options.commit)
    table.check(path, source)
    return CommandContext(device, path, source)
