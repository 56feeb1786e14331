"""The rooms of `benchmarks`: each imports only those before it, and none has too many files."""

import ast

import pytest

from benchmarks.harness.provenance import ROOT

ROOMS = ("harness", "kernels", "ffn", "models", "pipelines", "pages", "gpu")
MOST_FILES = 15


def test_these_are_all_rooms():
    found = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_before_it(room):
    files = sorted((ROOT / "benchmarks" / room).glob("*.py"))
    assert len(files) <= MOST_FILES
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for package, *rest in (name.split(".") for name in names):
                assert package != "benchmarks" or rest[0] in ROOMS[: ROOMS.index(room) + 1], file
