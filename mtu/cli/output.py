"""Writing reports and errors to the terminal, a file or a pipe.

The library's reports are plain text, which files and pipes get unchanged. Only a terminal gets colours, and tables that
fit its width.
"""

import re
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["print_error", "print_report"]

_UNBOUNDED = 10_000


def print_report(report: str, left_aligned_columns: int = 0) -> None:
    """Print a report whose second paragraph is an aligned table, as `mtu.inspection` formats it.

    Args:
        report: The paragraphs, separated by blank lines. The first line of the table is its header.
        left_aligned_columns: Number of the table's first columns that are aligned to the left. The others are aligned
            to the right.
    """
    console = Console()
    if not console.is_terminal:
        print(report)
        return
    summary, table, notes = report.split("\n\n", 2)
    console.print(Text(summary, style="bold"), soft_wrap=True)
    drawn = _draw(_split_columns(table), left_aligned_columns)
    if Measurement.get(console, console.options.update(width=_UNBOUNDED), drawn).maximum <= console.width:
        console.print(drawn)
    else:
        # Numbers that wrap inside narrow cells cannot be read, so the lines of the plain table stay whole.
        print(f"\n{table}\n")
    console.print(Text(notes), soft_wrap=True)


def _split_columns(table: str) -> list[list[str]]:
    """Split an aligned table into cells. Columns lie at least two spaces apart in all lines."""
    lines = table.splitlines()
    width = max(map(len, lines))
    lines = [line.ljust(width) for line in lines]
    blank = "".join(" " if all(line[i] == " " for line in lines) else "x" for i in range(width))
    columns = [match.span() for match in re.finditer(r"x+(?: x+)*", blank)]
    return [[line[start:end] for start, end in columns] for line in lines]


def _draw(rows: list[list[str]], left_aligned_columns: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(Text(name.strip()), justify="left" if index < left_aligned_columns else "right")
    for row in rows[1:]:
        table.add_row(
            *(Text(cell.rstrip() if index < left_aligned_columns else cell.strip()) for index, cell in enumerate(row))
        )
    return table


def print_error(message: str) -> None:
    """Print one line on stderr, red where stderr is a terminal."""
    Console(file=sys.stderr).print(Text(" ".join(message.split()), style="red"), soft_wrap=True)
