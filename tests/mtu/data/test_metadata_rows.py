"""The rows of `metadata.jsonl`: what a line says, and every fault that one can have."""

import json

import pytest

from mtu.data.metadata_rows import Variant, form_of_row, infer_task, nonempty_lines, parse_row
from mtu.tasks import EDIT, REMOVE, SUPER_RESOLUTION, TEXT_TO_IMAGE

PAIR = {"target_file_name": "a.png", "condition_file_name": "b.png"}
EDITED = {**PAIR, "prompt": "make it blue"}


@pytest.mark.parametrize(
    ("task", "row", "variants"),
    [
        (TEXT_TO_IMAGE, {"file_name": "a.png", "text": "a cat"}, [("a.png", None, ("a cat",))]),
        (
            TEXT_TO_IMAGE,
            {"target_file_name": "a.png", "prompt": ["a cat", "cats"]},
            [("a.png", None, ("a cat", "cats"))],
        ),
        (SUPER_RESOLUTION, PAIR, [("a.png", "b.png", ("",))]),
        (SUPER_RESOLUTION, {**PAIR, "prompt": ""}, [("a.png", "b.png", ("",))]),
        (EDIT, EDITED, [("a.png", "b.png", ("make it blue",))]),
        (REMOVE, {**EDITED, "target_file_names": None}, [("a.png", "b.png", ("make it blue",))]),
        (
            EDIT,
            {"target_file_names": ["a", "b"], "condition_file_names": ["c", "d"], "prompts": ["one", ["two", "2"]]},
            [("a", "c", ("one",)), ("b", "d", ("two", "2"))],
        ),
        (
            REMOVE,
            {"target_file_names": ["a", "b"], "condition_file_name": "c", "prompts": ["one", "two"]},
            [("a", "c", ("one",)), ("b", "c", ("two",))],
        ),
        (
            SUPER_RESOLUTION,
            {"target_file_name": "a", "condition_file_names": ["b", "c", "d"]},
            [("a", name, ("",)) for name in "bcd"],
        ),
        (
            EDIT,
            {"target_file_names": ["a", "b"], "condition_file_names": ["c", "d"], "prompt": ["same", "for both"]},
            [("a", "c", ("same", "for both")), ("b", "d", ("same", "for both"))],
        ),
    ],
)
def test_rows_of_every_form(task, row, variants):
    assert parse_row(json.dumps(row).encode(), task) == ([Variant(*variant) for variant in variants], [])


@pytest.mark.parametrize(
    ("task", "row", "faults"),
    [
        (EDIT, b'{"prompt": ', ["is not JSON: Expecting value at column 12"]),
        (EDIT, b"\xff\xfe", ["is not UTF-8 text"]),
        (EDIT, b'{"prompt": "\\ud83d"}', ["is not UTF-8 text"]),
        (EDIT, b"[1]", ["must be a JSON object, but is of type array of number"]),
        (EDIT, b"[" * 10**5, ["nested too deeply"]),
        (EDIT, b'{"prompt": "a", "prompt": "b"}', ["has the key 'prompt' more than once"]),
        (
            EDIT,
            {},
            ["lacks the key 'target_file_name'", "lacks the key 'condition_file_name'", "lacks the key 'prompt'"],
        ),
        (
            EDIT,
            {**PAIR, "prompt": "x", "source_file_name": "c"},
            ["key 'source_file_name': expected some of target_file"],
        ),
        (EDIT, {**PAIR, "prompt": "x", "target_file_name": "a\0"}, ["'target_file_name', but has a NUL character"]),
        (EDIT, {**PAIR, "promt": "x"}, ["the unknown key 'promt': did you mean 'prompt'?", "lacks the key 'prompt'"]),
        (EDIT, {**EDITED, "xyz": 1}, ["the unknown key 'xyz': expected some of target_file_name, "]),
        (EDIT, {**EDITED, "file_name": "c"}, ["has both 'target_file_name' and 'file_name'"]),
        (
            EDIT,
            {**EDITED, "condition_file_names": ["c"]},
            ["has both 'condition_file_name' and 'condition_file_names'"],
        ),
        (EDIT, {**EDITED, "prompt": " \n"}, ["has an empty prompt"]),
        (EDIT, {**EDITED, "prompt": ["fine", ""]}, ["has an empty prompt"]),
        (EDIT, {**EDITED, "prompt": []}, ["has an empty list of prompts"]),
        (
            EDIT,
            {**EDITED, "prompt": {"long": "x" * 1000}},
            ["strings or lists of strings as prompts, but has {'long': 'xx"],
        ),
        (EDIT, {**EDITED, "prompt": 3}, ["strings or lists of strings as prompts, but has 3"]),
        (EDIT, {**PAIR, "prompts": "x"}, ["a list with at least one entry as 'prompts', but has 'x'"]),
        (EDIT, {**PAIR, "prompts": []}, ["a list with at least one entry as 'prompts', but has []"]),
        (EDIT, {**EDITED, "target_file_name": ["a"]}, ["must name a file by 'target_file_name', but has ['a']"]),
        (EDIT, {**EDITED, "target_file_name": ""}, ["must name a file by 'target_file_name', but has ''"]),
        *(
            (EDIT, {**EDITED, "condition_file_name": name}, ["a file inside the folder by 'condition_file_name'"])
            for name in ("/etc/passwd", "../b.png", "a/../b.png", "C:/b.png")
        ),
        (EDIT, {**EDITED, "condition_file_name": "a\\b.png"}, ["must separate folders by '/'"]),
        (TEXT_TO_IMAGE, EDITED, ["has a condition image, but the task 'text-to-image' takes none"]),
        (SUPER_RESOLUTION, EDITED, ["has a prompt, but the task 'super-resolution' takes none"]),
        (
            EDIT,
            {"target_file_names": ["a", "b"], "condition_file_name": "c", "prompts": ["x", "y", "z"]},
            ["lists of one length, but has 2 in 'target_file_names', 3 in 'prompts'"],
        ),
        (
            EDIT,
            {"target_file_name": "../a", "condition_file_name": 3, "text": ""},
            [
                "has an empty prompt",
                "inside the folder by 'target_file_name'",
                "must name a file by 'condition_file_name'",
            ],
        ),
    ],
)
def test_every_fault_of_a_row_is_a_sentence(task, row, faults):
    variants, found = parse_row(row if isinstance(row, bytes) else json.dumps(row).encode(), task)
    assert variants == []
    assert len(found) == len(faults)
    assert all(fault in sentence for fault, sentence in zip(faults, found, strict=True))
    assert all(sentence[-1] in ".?" and len(sentence) < 300 for sentence in found)


@pytest.mark.parametrize(
    ("contents", "lines"),
    [
        (b"", []),
        (b"\n \r\n", []),
        (b"a", [(1, b"a")]),
        (b"\xef\xbb\xbfa\r\n\n  \nb\xe2\x80\xa8c\n", [(1, b"a\r"), (4, b"b\xe2\x80\xa8c")]),
    ],
)
def test_lines_keep_their_numbers(contents, lines):
    assert [(number, contents[start:end]) for number, start, end in nonempty_lines(contents)] == lines


def test_the_form_of_a_row_tells_types_apart():
    assert form_of_row(b'{"file_name": "a", "text": "b"}') == form_of_row(b'{"text": "c", "file_name": "d", "e": null}')
    forms = [b'{"prompt": "a"}', b'{"text": "a"}', b'{"prompt": ["a"]}', b'{"prompt": ["a", ["b"]]}', b'{"prompt": []}']
    assert len({form_of_row(line) for line in forms}) == len(forms)


@pytest.mark.parametrize("task", [TEXT_TO_IMAGE, SUPER_RESOLUTION, EDIT], ids=lambda task: task.name)
def test_a_task_is_inferred_from_the_first_row_that_is_readable(task):
    row = {"target_file_name": "a"}
    row |= {"condition_file_names": ["b"]} if task.takes_image else {}
    row |= {"text": "c"} if task.uses_prompt else {}
    found = infer_task(b"{broken\n" + json.dumps(row).encode() + b'\n{"other": 1}', "colorize")
    assert (found.name, found.takes_image, found.uses_prompt) == ("colorize", task.takes_image, task.uses_prompt)
