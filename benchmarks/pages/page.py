"""`python -m benchmarks.pages.page`: writes the tables of `docs/performance.md` from the CSV files.

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of the page is left as it is. With
`--check` nothing is written, and a page that differs from the files is an error.
"""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.commands import exit_on_usage_errors, make_parser, parse_arguments
from benchmarks.harness.provenance import RESULTS, ROOT
from benchmarks.pages import tables_ffn, tables_models, tables_training

MODULE = "benchmarks.pages.page"
PAGE = ROOT / "docs" / "performance.md"
_MARKED = re.compile(r"(<!-- table: (\S*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:table: \S*|end) -->")


class PageTable(NamedTuple):
    """One of the tables between two markers.

    Attributes:
        make_lines: folder of the CSV files → lines; ValueError where they have no rows for it.
        command: measures the rows.
        picture_name: stands above the lines, where it has been drawn.
    """

    make_lines: Callable[[Path], list[str]]
    command: str
    picture_name: str | None = None


def _of_devices(make: Callable[..., list[str]], module: str, picture: str = "") -> tuple[PageTable, ...]:
    return tuple(
        PageTable(
            functools.partial(make, device=device),
            f"python -m benchmarks.{module} --device {device}",
            f"{picture}_{device}.png" if picture else None,
        )
        for device in ("cpu", "cuda")
    )


BLOCKS: dict[str, tuple[PageTable, ...]] = {
    "targets": (PageTable(tables_models.targets_table, "python -m benchmarks.models.unet"),),
    "imports": (PageTable(tables_models.imports_table, "python -m benchmarks.models.import_time"),),
    "sizes": (PageTable(tables_ffn.sizes_table, "python -m benchmarks.models.model_sizes"),),
    "unet": _of_devices(tables_models.unet_tables, "models.unet", "unet"),
    "settings": _of_devices(tables_models.settings_table, "models.unet"),
    "pipeline": _of_devices(tables_models.pipeline_tables, "pipelines.pipeline"),
    "image_psnr": _of_devices(tables_models.image_psnr_table, "pipelines.image_psnr"),
    "training_memory": (PageTable(tables_training.step_memory_table, "python -m benchmarks.training.memory"),),
    "training_step": _of_devices(tables_training.step_ratio_table, "training.step_ratio"),
    "training_resume": (PageTable(tables_training.resume_table, "python -m benchmarks.training.resume"),),
    "training_data": (PageTable(tables_training.data_time_table, "python -m benchmarks.training.data_time"),),
    "ffn": _of_devices(tables_ffn.feed_forward_table, "ffn.moe_ffn", "moe_ffn"),
    "roofline": _of_devices(tables_ffn.roofline_table, "ffn.machine", "roofline"),
    "scaling": _of_devices(tables_ffn.scaling_table, "ffn.scaling", "scaling"),
}


def render_page(text: str, results: Path, images: Path) -> str:
    """The text of a page with its tables made anew. The pictures lie beside the page.

    Raises:
        ValueError: a marker names no table, or has no other one.
    """
    matches = list(_MARKED.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(matches) or any(_MARKER.search(match[3]) for match in matches):
        raise ValueError("Each <!-- table: NAME --> must be followed by its <!-- end -->, but some stand alone.")
    for match in matches:
        if match[2] not in BLOCKS:
            raise ValueError(f"A marker must name one of the tables {', '.join(BLOCKS)}, got {match[2]!r}.")
    return _MARKED.sub(lambda match: match[1] + _block(BLOCKS[match[2]], results, images) + match[4], text)


def _block(parts: Sequence[PageTable], results: Path, images: Path) -> str:
    made, missing = [], []
    for part in parts:
        try:
            lines = part.make_lines(results)
        except ValueError:
            # Nothing was measured, or the benchmark has other columns now.
            missing.append(f"`{part.command}`")
            continue
        if part.picture_name and (images / part.picture_name).exists():
            name = part.picture_name.removesuffix(".png")
            lines = [f"![{name}]({images.name}/{part.picture_name})", "", *lines]
        made += [*lines, ""]
    if missing:
        # This line joins the paragraph of the last provenance line, if there is one.
        made[-1:] = [f"*Not measured yet: {', '.join(missing)}.*"]
    return "\n".join(made).rstrip("\n") + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if the check finds a page that differs from the files."""
    parser = make_parser(MODULE, "Writes the tables of docs/performance.md from the CSV files.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the page would change")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    _, options = parse_arguments(parser, argv)
    if not options.page.exists():
        parser.error(f"There is no {options.page} with markers to write tables between.")
    text = options.page.read_text(encoding="utf-8")
    with exit_on_usage_errors(parser):
        new = render_page(text, options.results, options.page.parent / "images")
    if not options.check:
        options.page.write_text(new, encoding="utf-8")
        print(options.page)
    elif new != text:
        print(f"{options.page} differs from {options.results}: {_difference(text, new)}.", file=sys.stderr)
        return 1
    return 0


def _difference(text: str, new: str) -> str:
    """The first table that differs; a page and its rewriting differ nowhere else."""
    pairs = zip(_MARKED.finditer(text), _MARKED.finditer(new), strict=True)
    name = next(old[2] for old, made in pairs if old[3] != made[3])
    return f"python -m {MODULE} would change the table {name!r}"


if __name__ == "__main__":
    sys.exit(main())
