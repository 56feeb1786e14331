"""The rooms of each package: none imports a later one, no files import in a circle, none has too many files."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package, by the packages that it may import; each of its rooms, a folder or a module, in the order of imports.
PACKAGES = {"mtu_kernels": (), "mtu": ("mtu_kernels",), "benchmarks": ("mtu_kernels", "mtu")}
ROOMS = {
    "mtu": (
        *("tasks", "experts", "storage", "compat", "models", "example_inputs", "runtime", "pipelines", "upcycling"),
        *("inspection", "data", "training", "recipes", "cli"),
    ),
    "benchmarks": ("harness", "kernels", "ffn", "models", "training", "pipelines", "pages", "gpu", "gpu_run"),
}
# These hand names of all rooms on, or start a room's command.
ENTRANCES = {"mtu/__init__.py", "mtu/__main__.py", "benchmarks/__init__.py"}
MOST_FILES = 15


def files_of(package):
    return [path for path in sorted((ROOT / package).rglob("*.py")) if str(path.relative_to(ROOT)) not in ENTRANCES]


def imported_modules(file):
    """The modules that a file imports, also for type checkers alone and within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if path_of(name) is not None else node.module


def path_of(name):
    """The file of a module of this repository."""
    path = ROOT.joinpath(*name.split("."))
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    return found[0] if found else None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way_and_no_files_a_circle(package):
    imports = {}
    for file in files_of(package):
        names = list(imported_modules(file))
        for name in names:
            first = name.partition(".")[0]
            assert first not in {*PACKAGES, "tests"} or first in (package, *PACKAGES[package]), f"{file} imports {name}"
        imports[file] = [path for name in names if (path := path_of(name)) is not None and path != file]
    graphlib.TopologicalSorter(imports).prepare()


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_those_before_it(package):
    rooms = ROOMS[package]
    found = set()
    for file in files_of(package):
        room = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        found.add(room)
        for name in imported_modules(file):
            first, *rest = name.split(".")
            if first == package:
                assert set(rest[:1]) <= set(rooms[: rooms.index(room) + 1]), f"{file} imports {name}"
                assert rest, f"{file} imports the whole package"
    assert found == set(rooms)


def test_no_folder_has_too_many_files():
    folders = {file.parent for package in PACKAGES for file in files_of(package)}
    assert {folder: count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES} == {}
