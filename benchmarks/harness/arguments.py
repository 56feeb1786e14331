"""Parsers of arguments that several commands take."""

import argparse
import functools
from collections.abc import Callable, Iterable

from benchmarks.harness.workloads import DENSE

# D×L: width and tokens of the transformer blocks.
SHAPE_SETS: dict[str, tuple[tuple[int, int], ...]] = {
    "sd15": ((320, 4096), (640, 1024), (1280, 256), (1280, 64)),
    "sdxl": ((640, 4096), (1280, 1024)),
    # Batches of SD 1.5, flattened to the token counts that the CPU targets are stated for.
    "cpu": ((320, 8192), (640, 2048), (1280, 512), (1280, 128)),
}


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Parses shapes DxL and names of shape sets, separated by commas."""
    shapes: list[tuple[int, int]] = []
    for name in text.split(","):
        width, _, tokens = name.partition("x")
        if name in SHAPE_SETS:
            shapes += SHAPE_SETS[name]
        elif width.isdecimal() and tokens.isdecimal() and int(width) and int(tokens):
            shapes.append((int(width), int(tokens)))
        else:
            sets = ", ".join(SHAPE_SETS)
            raise argparse.ArgumentTypeError(f"unknown shape {name!r}: expected DxL as in 320x4096, or one of {sets}.")
    return tuple(shapes)


def names_parser(known: Iterable[str], noun: str) -> Callable[[str], tuple[str, ...]]:
    """A parser of names that are separated by commas; "all" stands for all known names."""
    known = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        names = known if text == "all" else tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {noun} {name!r}: expected some of {', '.join(known)}.")
        return names

    return parse


def parse_counts(text: str, most: int | None = None) -> tuple[int, ...]:
    """Parses positive whole numbers, separated by commas."""
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"expected positive whole numbers such as 1,8, got {text!r}.")
    if most is not None and max(map(int, counts)) > most:
        raise argparse.ArgumentTypeError(f"expected whole numbers up to {most}, got {text!r}.")
    return tuple(map(int, counts))


def parse_count(text: str, least: int = 1) -> int:
    """Parses one whole number."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}.")
    return int(text)


# A percentile needs two times.
parse_rounds = functools.partial(parse_count, least=2)


def parse_top_k(text: str) -> tuple[int | None, ...]:
    """Parses numbers of active experts, separated by commas; "dense" stands for all experts."""
    return tuple(DENSE if name == "dense" else parse_counts(name)[0] for name in text.split(","))
