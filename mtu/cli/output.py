"""Writing reports and errors to the terminal, a file or a pipe.

The library's reports are plain text, which files and pipes get unchanged. Only a terminal gets colours, and tables that
fit its width.
"""

import sys
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    # Reports are imported with PyTorch, for which `mtu --help` does not wait.
    from mtu.inspection import Report

__all__ = ["print_error", "print_report"]

_UNBOUNDED = 10_000


def print_report(report: "Report") -> None:
    """Print a report: its summary, its table and its notes."""
    console = Console()
    if not console.is_terminal:
        print(report)
        return
    console.print(Text(report.summary, style="bold"), soft_wrap=True)
    table = _rich_table(report)
    if Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum <= console.width:
        console.print(table)
    else:
        # Numbers that wrap inside narrow cells cannot be read, so the lines of the plain table stay whole.
        print(f"\n{report.format_table()}\n")
    console.print(Text(report.footer), soft_wrap=True)


def _rich_table(report: "Report") -> Table:
    header, *lines = report.table
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index < report.num_left_aligned_columns else "right")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def print_error(message: str) -> None:
    """Print one line on stderr, red where stderr is a terminal."""
    Console(file=sys.stderr).print(Text(" ".join(message.split()), style="red"), soft_wrap=True)
