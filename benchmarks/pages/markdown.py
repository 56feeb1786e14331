"""Markdown of the tables in `docs/performance.md`: cells, numbers, and the line that says where they come from."""

import re
from collections.abc import Iterable, Mapping, Sequence

MISSING = "–"
_MOST_COMMANDS = 2
_MODULE = re.compile(r".*?(python -m [\w.]+).*")


def table_lines(header: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """A Markdown table whose first columns, so many as are `words`, are aligned left; numbers are aligned right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]


def provenance_line(sources: Iterable[Mapping[str, str]], *files: str) -> str:
    """Processor, threads, commit, torch and commands of rows, each value once, and links to their CSV files.

    `files` are names in `benchmarks/results`.
    """
    sources = list(sources)

    def values(name: str) -> list[str]:
        return list(dict.fromkeys(source[name] for source in sources if source.get(name)))

    places = [", ".join(values("processor")) or ", ".join(values("machine"))]
    places += [f"{', '.join(values('threads'))} threads"] if values("threads") else []
    versions = [f"{name} {', '.join(values(name))}" for name in ("commit", "torch") if values(name)]
    commands = values("command")
    if len(commands) > _MOST_COMMANDS:
        # Their arguments stand in the file.
        commands = list(dict.fromkeys(_MODULE.sub(r"\1", command) for command in commands))
    named = ", ".join(f"`{command}`" for command in commands)
    links = ", ".join(f"[{file}](../benchmarks/results/{file})" for file in files)
    return f"<sub>{', '.join([*places, *versions])}: {named} → {links}</sub>"


def format_digits(value: float) -> str:
    """Three digits of a positive number, all of those before the point."""
    # 9.996 has as many digits as 10.0.
    rounded = float(f"{value:.3g}")
    if rounded >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if rounded >= 10 else f"{value:.2f}" if rounded >= 1 else f"{value:#.3g}"


def format_duration(us: float) -> str:
    """A time in µs, ms or s."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        # Times that round to the unit have it, too.
        if us >= 0.9995 * size:
            return f"{format_digits(us / size)} {unit}"
    return f"{format_digits(us)} µs"


def format_gigabytes(count: float) -> str:
    return f"{format_digits(count / 1e9)} GB"


def format_ratio(value: float) -> str:
    return f"{value:.2f}"


def format_small_ratio(value: float) -> str:
    """A ratio that may be far below one: three places from a tenth on, or else two digits."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}" if value >= 1e-4 else "< 0.0001"
