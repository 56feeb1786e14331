"""The rows of `metadata.jsonl`: what each line says, and every fault of a line. No image is touched here.

A line is a JSON object. Its keys name the target, the condition image and the prompt. A key in the plural lists the
values of several variants, and a single value is shared by all variants of its row.
"""

import difflib
import itertools
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mtu.tasks import TaskSpec

__all__ = ["METADATA_NAME", "Variant", "form_of_row", "infer_task", "nonempty_lines", "parse_row"]

METADATA_NAME = "metadata.jsonl"
# The short names are those that Hugging Face's data sets of one image a row use.
_SHORT_NAMES = {"target_file_name": ["file_name"], "condition_file_name": [], "prompt": ["text"]}
_PLURALS = {
    "target_file_name": "target_file_names",
    "condition_file_name": "condition_file_names",
    "prompt": "prompts",
}
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 200
_KEYS = (*_PLURALS, *_PLURALS.values(), *itertools.chain(*_SHORT_NAMES.values()))


class Variant(NamedTuple):
    """One of the alternatives of a row.

    Args:
        target: the file of the image that the model should make, relative to the folder.
        condition: the file of the condition image, likewise; None for tasks without an image.
        prompts: the interchangeable prompts; an empty string for tasks without a prompt.
    """

    target: str
    condition: str | None
    prompts: tuple[str, ...]


def nonempty_lines(contents: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the number, from 1, the start and the end of each line that is not blank."""
    start = 3 if contents.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
    number = 1
    while start < len(contents):
        end = contents.find(b"\n", start)
        end = len(contents) if end < 0 else end
        if contents[start:end].strip():
            yield number, start, end
        start, number = end + 1, number + 1


def parse_row(line: bytes, task: TaskSpec) -> tuple[list[Variant], list[str]]:
    """Parse a line, and find all of its faults.

    Args:
        line: one line of `metadata.jsonl`.
        task: the task that the row is an example of.

    Returns:
        The variants of the row, of which there are none where there are faults, and a sentence for each fault. A
        sentence lacks its subject, which is the row.
    """
    try:
        fields = _load_fields(line)
    except ValueError as error:
        return [], [str(error)]
    faults = [_unknown_key_fault(key) for key in fields if key not in _KEYS]
    columns = {key: _column(fields, key, faults) for key in _PLURALS}
    faults += _task_faults(fields, columns["prompt"], task)
    for key in ("target_file_name", "condition_file_name"):
        faults += _file_name_faults(key, columns[key])
    faults += _prompt_faults(columns["prompt"])
    counts = {plural: len(fields[plural]) for plural in _PLURALS.values() if isinstance(fields.get(plural), list)}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in {key!r}" for key, count in counts.items())
        faults.append(f"must have lists of one length, but has {listed}.")
    if faults:
        return [], list(dict.fromkeys(faults))
    count = next(iter(counts.values()), 1)
    targets, conditions, prompts = (_spread(columns[key], count) for key in _PLURALS)
    return [
        Variant(target, condition, _alternatives(prompt) if prompt is not None else ("",))
        for target, condition, prompt in zip(targets, conditions, prompts, strict=True)
    ], []


def form_of_row(line: bytes) -> frozenset[str]:
    """The keys of a line with the types of their values, such as "prompts: array of string"; empty if it has faults.

    Tables have one form for all rows, so `datasets.load_dataset` reads no folder of several forms.
    """
    try:
        return frozenset(f"{key}: {_type_name(value)}" for key, value in _load_fields(line).items())
    except ValueError:
        return frozenset()


def infer_task(contents: bytes, name: str) -> TaskSpec:
    """Describe a task of the user's own by the keys of the first row that is readable.

    Args:
        contents: the text of `metadata.jsonl`.
        name: the name of the task.

    Returns:
        A task that takes an image and a prompt if that row has them, with settings of sampling that mean nothing.

    Raises:
        ValueError: this is no name of a task.
    """
    forms = (form_of_row(contents[start:end]) for _, start, end in nonempty_lines(contents))
    keys = {entry.partition(":")[0] for entry in next(filter(None, forms), frozenset())}
    channels = 4 if any(key.startswith("condition") for key in keys) else 0
    return TaskSpec(name, channels, "none", uses_prompt=bool(keys & {"prompt", "text", "prompts"}))


# ------------------------------------------------------------------------------------------------------------ parts


def _load_fields(line: bytes) -> dict[str, Any]:
    """The keys of a line that have a value. A null, which exported tables have in empty cells, is no value."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repetitions)
        if b"\\ud" in line.lower():  # half of an escaped character is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise ValueError("is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise ValueError("is not JSON of this format: it is nested too deeply.") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, but is of type {_type_name(value)}.")
    return {key: item for key, item in value.items() if item is not None}


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"has the key {repeated!r} more than once.")
    return fields


def _unknown_key_fault(key: str) -> str:
    # A lower threshold takes source_file_name for the target.
    nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
    return f"has the unknown key {key!r}: " + (
        f"did you mean {nearest[0]!r}?" if nearest else f"expected some of {', '.join(_KEYS)}."
    )


def _names_of(fields: Mapping[str, Any], key: str) -> list[str]:
    """The names by which a row gives the values of a key: the key itself, its short name or its plural."""
    return [name for name in (key, *_SHORT_NAMES[key], _PLURALS[key]) if name in fields]


def _column(fields: Mapping[str, Any], key: str, faults: list[str]) -> list[Any]:
    """The values of a key, of which there are none where a fault hides them."""
    names = _names_of(fields, key)
    if not names:
        return []
    if len(names) > 1:
        faults.append(f"has both {names[0]!r} and {names[1]!r}: expected one of them.")
    if names[0] != _PLURALS[key]:
        return [fields[names[0]]]
    values = fields[names[0]]
    if not isinstance(values, list) or not values:
        faults.append(f"must have a list with at least one entry as {names[0]!r}, but has {_SHORTENED.repr(values)}.")
        return []
    return values


def _task_faults(fields: Mapping[str, Any], prompts: list[Any], task: TaskSpec) -> list[str]:
    """Faults of a row whose images and prompts are not those of its task."""
    faults = []
    if not _names_of(fields, "target_file_name"):
        faults.append("lacks the key 'target_file_name'.")
    has_condition = bool(_names_of(fields, "condition_file_name"))
    if task.takes_image and not has_condition:
        faults.append(f"lacks the key 'condition_file_name': the task {task.name!r} takes an image.")
    if has_condition and not task.takes_image:
        faults.append(f"has a condition image, but the task {task.name!r} takes none.")
    if task.uses_prompt and not _names_of(fields, "prompt"):
        faults.append(f"lacks the key 'prompt': the task {task.name!r} takes a prompt.")
    texts = [text for prompt in prompts for text in _alternatives(prompt)]
    if not task.uses_prompt and any(text != "" for text in texts):
        faults.append(f"has a prompt, but the task {task.name!r} takes none.")
    if task.uses_prompt and any(isinstance(text, str) and not text.strip() for text in texts):
        faults.append("has an empty prompt.")
    return faults


def _prompt_faults(prompts: list[Any]) -> list[str]:
    wrong = [text for prompt in prompts for text in _alternatives(prompt) if not isinstance(text, str)]
    faults = [f"must have strings or lists of strings as prompts, but has {_SHORTENED.repr(text)}." for text in wrong]
    return faults + ["has an empty list of prompts." for prompt in prompts if prompt == []]


def _file_name_faults(key: str, names: list[Any]) -> list[str]:
    faults = []
    for name in names:
        if not isinstance(name, str) or not name.strip():
            faults.append(f"must name a file by {key!r}, but has {_SHORTENED.repr(name)}.")
        elif "\0" in name:
            faults.append(f"must name a file by {key!r}, but has a NUL character in {_SHORTENED.repr(name)}.")
        elif "\\" in name:
            faults.append(f"must separate folders by '/' in {key!r}, but has {_SHORTENED.repr(name)}.")
        elif name.startswith("/") or re.match("[A-Za-z]:/", name) or ".." in name.split("/"):
            faults.append(f"must name a file inside the folder by {key!r}, but has {_SHORTENED.repr(name)}.")
    return faults


def _alternatives(prompt: Any) -> tuple[Any, ...]:
    return tuple(prompt) if isinstance(prompt, list) else (prompt,)


def _spread(values: list[Any], count: int) -> list[Any]:
    """One value for each variant."""
    return (values or [None]) * count if len(values) <= 1 else values


def _type_name(value: Any) -> str:
    """The name of a value's type in JSON."""
    if isinstance(value, list):
        return " or ".join(["array", *sorted({f"array of {_type_name(item)}" for item in value})][bool(value) :])
    names = {str: "string", bool: "boolean", dict: "object", type(None): "null"}
    return names.get(type(value), "number")
