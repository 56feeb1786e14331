"""Checking image folders before a training: every bad row, with its line and a sentence that says what is wrong.

Nothing is written and nothing is changed. `mtu data check` prints what is found here.
"""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import PIL.Image
from tqdm import tqdm

from mtu.data.image_files import convert_to_rgb, fault_of_path, is_partly_transparent, open_image
from mtu.data.image_folder import read_metadata
from mtu.data.metadata_rows import METADATA_NAME, Variant, form_of_row, nonempty_lines, parse_row
from mtu.tasks import TaskSpec

__all__ = ["ImageFolderReport", "Problem", "check_image_folder", "report_on_image_folder"]

_FILES_AT_ONCE = 256
_LEAST_EDGE = 8  # the pixels of one latent
_PROMPT_TOKENS = 77  # of CLIP's text encoders


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row of `metadata.jsonl`, or with the whole file.

    Args:
        file: the path of `metadata.jsonl`.
        line: the number of the row's line, from 1; None: the whole file.
        message: a sentence.
        severity: an "error" keeps the row from being trained on; a "warning" does not.
    """

    file: str
    line: int | None
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{place}: {'warning: ' if self.severity == 'warning' else ''}{self.message}"


@dataclass
class ImageFolderReport:
    """The problems of an image folder, and the size of its contents.

    Attributes:
        problems: the problems, by line.
        rows: the number of rows, also of bad ones.
        variants: the number of variants of all good rows.
        prompts: the number of different prompts of all good rows.
        smallest, largest: width and height of the images of the fewest and of the most pixels; None before decoding.
    """

    problems: list[Problem] = field(default_factory=list)
    rows: int = 0
    variants: int = 0
    prompts: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    @property
    def bad_rows(self) -> int:
        """The number of rows with an error; a file that is bad as a whole counts as one."""
        return len({problem.line for problem in self.problems if problem.severity == "error"})


class _FileState(NamedTuple):
    """What an image file turned out to be; `size` is None where it was not decoded."""

    fault: str | None
    size: tuple[int, int] | None = None
    is_partly_transparent: bool = False


def check_image_folder(
    directory: str | os.PathLike, task: TaskSpec, *, decode: bool = True, resolution: int | None = None
) -> list[Problem]:
    """Find every problem of an image folder (see `report_on_image_folder`).

    Args:
        directory: the folder.
        task: the task that its rows are examples of.
        decode: whether to decode all images. Otherwise the check asks for their existence alone, which takes seconds.
        resolution: the edge in pixels that images are trained at; a smaller target is a warning.

    Returns:
        The problems by line; an empty list for a folder without any.
    """
    return report_on_image_folder(directory, task, decode=decode, resolution=resolution).problems


def report_on_image_folder(
    directory: str | os.PathLike,
    task: TaskSpec,
    *,
    decode: bool = True,
    resolution: int | None = None,
    num_threads: int | None = None,
    show_progress: bool = False,
) -> ImageFolderReport:
    """Find every problem of an image folder, and count what it holds.

    Errors are: a row that is not as `mtu.data.metadata_rows` describes, a file that is missing, corrupt or truncated,
    and a condition image whose aspect ratio is not that of its target. Warnings are: a row that repeats an earlier one,
    partly transparent images, targets smaller than the resolution, images with an edge of less than 8 pixels or with
    more pixels than Pillow expects, prompts of more than 77 words, and rows of several forms, which
    `datasets.load_dataset` does not read.

    Args:
        directory, task, decode, resolution: as in `check_image_folder`.
        num_threads: threads that decode; None: one a core.
        show_progress: whether to show a progress bar if stderr is a terminal.
    """
    folder, report = Path(directory), ImageFolderReport()
    try:
        contents = read_metadata(folder)
    except (ValueError, OSError) as error:
        report.problems.append(Problem(str(folder / METADATA_NAME), None, str(error)))
        return report
    states = _decode_all(folder, contents, task, num_threads, show_progress) if decode else _FoundFiles(folder)
    _check_rows(report, folder, contents, task, states, resolution)
    sizes = [state.size for state in states.values() if state.size is not None]
    report.smallest, report.largest = (
        pick(sizes, key=lambda size: size[0] * size[1], default=None) for pick in (min, max)
    )
    if not report.rows:
        report.problems.append(Problem(str(folder / METADATA_NAME), None, "The file has no rows."))
    return report


class _FoundFiles(dict[str, _FileState]):
    """The states of files that are only looked for, each at its first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> _FileState:
        self[name] = _FileState(fault_of_path(self._folder / name))
        return self[name]


def _decode_all(
    folder: Path, contents: bytes, task: TaskSpec, num_threads: int | None, show_progress: bool
) -> dict[str, _FileState]:
    """The state of each file that a row names, decoded once however many rows name it."""
    names = {name: None for _, _, variants, _ in _rows(contents, task) for name in _file_names(variants)}
    states: dict[str, _FileState] = {}
    with (
        warnings.catch_warnings(action="ignore", category=PIL.Image.DecompressionBombWarning),  # rows report it
        ThreadPoolExecutor(num_threads or os.cpu_count()) as pool,
        tqdm(total=len(names), desc=task.name, unit="image", disable=None if show_progress else True) as bar,
    ):
        remaining = iter(names)
        while batch := list(itertools.islice(remaining, _FILES_AT_ONCE)):
            states.update(zip(batch, pool.map(_decode, [folder / name for name in batch]), strict=True))
            bar.update(len(batch))
    return states


def _check_rows(
    report: ImageFolderReport,
    folder: Path,
    contents: bytes,
    task: TaskSpec,
    states: dict[str, _FileState],
    resolution: int | None,
) -> None:
    """Add the problems of all rows, given the states of their files, and the counts."""
    place = str(folder / METADATA_NAME)
    lines_of_rows: dict[int, int] = {}  # by the hash of the row, which takes less memory
    prompts: set[str] = set()
    forms: dict[frozenset[str], int] = {}
    for number, line, variants, faults in _rows(contents, task):
        errors = [f"The row {fault}" for fault in faults] + _file_errors(variants, states)
        notes = _image_warnings(variants, states, resolution) + _prompt_warnings(variants)
        if variants:
            earlier = lines_of_rows.setdefault(hash(tuple(variants)), number)
            if earlier != number:
                notes.append(f"The row repeats line {earlier}.")
            forms.setdefault(form_of_row(line), number)
            if len(forms) > 1 and number in forms.values():
                first = next(iter(forms.values()))
                notes.append(
                    f"The row and line {first} differ in their keys or types: load_dataset reads no such file."
                )
        report.problems += [Problem(place, number, message, "error") for message in errors]
        report.problems += [Problem(place, number, message, "warning") for message in notes]
        report.rows += 1
        if not errors:
            report.variants += len(variants)
            prompts.update(itertools.chain(*(variant.prompts for variant in variants)))
    report.prompts = len(prompts)


def _rows(contents: bytes, task: TaskSpec) -> Iterator[tuple[int, bytes, list[Variant], list[str]]]:
    """The number, the text, the variants and the faults of each row."""
    for number, start, end in nonempty_lines(contents):
        line = contents[start:end]
        yield number, line, *parse_row(line, task)


def _file_names(variants: Sequence[Variant]) -> list[str]:
    """The different files of a row, in order."""
    pairs = ((variant.target, variant.condition) for variant in variants)
    return list(dict.fromkeys(name for pair in pairs for name in pair if name is not None))


def _decode(path: Path) -> _FileState:
    try:
        image = open_image(path)
        convert_to_rgb(image, path)
        return _FileState(None, image.size, is_partly_transparent(image))
    except ValueError as error:
        return _FileState(str(error))


def _file_errors(variants: Sequence[Variant], states: dict[str, _FileState]) -> list[str]:
    errors = [fault for name in _file_names(variants) if (fault := states[name].fault)]
    for variant in variants:
        if variant.condition is None:
            continue
        target, condition = states[variant.target].size, states[variant.condition].size
        if target and condition and not _have_one_aspect_ratio(target, condition):
            errors.append(
                f"The condition image {variant.condition} ({_text(condition)}) and its target {variant.target} "
                f"({_text(target)}) must have one aspect ratio."
            )
    return list(dict.fromkeys(errors))


def _image_warnings(variants: Sequence[Variant], states: dict[str, _FileState], resolution: int | None) -> list[str]:
    found = [
        f"{name} is partly transparent: training sees the colours without their transparency."
        for name in _file_names(variants)
        if states[name].is_partly_transparent
    ]
    targets, most = {variant.target for variant in variants}, PIL.Image.MAX_IMAGE_PIXELS
    for name in _file_names(variants):
        size = states[name].size
        if size is None:
            continue
        if resolution is not None and name in targets and min(size) < resolution:
            found.append(f"{name} ({_text(size)}) is smaller than the resolution of {resolution}, and is enlarged.")
        elif min(size) < _LEAST_EDGE:
            found.append(f"{name} ({_text(size)}) has an edge of less than {_LEAST_EDGE} pixels, and is enlarged.")
        if most is not None and size[0] * size[1] > most:
            found.append(f"{name} ({_text(size)}) has more pixels than Pillow expects, and takes long to load.")
    return found


def _prompt_warnings(variants: Sequence[Variant]) -> list[str]:
    """A warning of the longest prompt, if it has so many words that the text encoder must cut it."""
    words = max((len(prompt.split()) for variant in variants for prompt in variant.prompts), default=0)
    if words <= _PROMPT_TOKENS:
        return []
    return [f"A prompt has {words} words: training sees its first {_PROMPT_TOKENS} tokens, about 60 words, alone."]


def _have_one_aspect_ratio(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one image could be the other one resized, with its height and width rounded to whole pixels."""
    small, large = sorted((one, other))
    by_width, by_height = small[0] * large[1] / large[0], small[1] * large[0] / large[1]
    return abs(small[1] - by_width) <= 1 or abs(small[0] - by_height) <= 1


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
