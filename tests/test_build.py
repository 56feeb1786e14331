"""How csrc is built, what happens where it cannot be, and which instructions are where in what is built."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
import setuptools
import torch

import mtu_kernels

ROOT = Path(__file__).parents[1]
NOT_BUILT = re.compile(
    r"mtu: the C\+\+ CPU backend was not built: (.*)\. backend='auto' uses PyTorch operators instead\. "
    r"To build it, install torch >= 2\.10 and GCC >= 12 or clang >= 15, "
    r"then run pip install --no-build-isolation again\."
)
# The files by which type checkers know that the packages have annotations.
TYPED = {"mtu/py.typed", "mtu_kernels/py.typed"}
# Writes down what it is asked for, and an empty file in place of a result.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


class Build:
    """Builds of a copy of the sources as pip makes them in isolation: with nothing on Python's path but setuptools."""

    def __init__(self, folder: Path):
        self.sources, self.output, self.log = folder / "sources", folder / "output", folder / "log"
        shutil.copytree(ROOT / "csrc", self.sources / "csrc")
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.sources)
        for name in ("mtu", "mtu_kernels"):
            (self.sources / name).mkdir()
            (self.sources / name / "__init__.py").touch()
            shutil.copy(ROOT / name / "py.typed", self.sources / name)
        self.packages = folder / "packages"
        self.packages.mkdir()
        site = Path(setuptools.__file__).parents[1]
        for path in (site / "_distutils_hack", *site.glob("setuptools*")):
            (self.packages / path.name).symlink_to(path)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv/bin/python"
        self.site_packages = next((folder / "venv/lib").glob("*/site-packages"))
        self.compiler = folder / "compiler"
        self.compiler.write_text(COMPILER.format(log=self.log))
        self.compiler.chmod(0o755)

    def install_torch(self, version: str) -> None:
        metadata = self.site_packages / f"torch-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def run(self, hook: str, **environment: str) -> tuple[Path, str | None]:
        """What a hook makes, and the reason given for making it without the extension."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        self.output.mkdir(exist_ok=True)
        result = subprocess.run(
            [self.python, "-c", f"from setuptools import build_meta; print(build_meta.{hook}({str(self.output)!r}))"],
            cwd=self.sources,
            env=inherited | {"PYTHONPATH": str(self.packages)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("mtu: ")]
        assert len(lines) <= 1
        return self.output / result.stdout.splitlines()[-1], NOT_BUILT.fullmatch(lines[0])[1] if lines else None


@pytest.fixture
def build(tmp_path):
    return Build(tmp_path)


def contents(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        return archive.namelist()


def extensions(wheel: Path) -> list[str]:
    return [name for name in contents(wheel) if Path(name).name.startswith("_C")]


def test_without_a_compiler_it_installs_and_says_so(build, tmp_path):
    build.install_torch("2.10.0")
    wheel, reason = build.run("build_wheel", PATH=str(tmp_path / "empty"))
    assert re.fullmatch(r"no C\+\+ compiler \(\S+\) was found", reason)
    assert not extensions(wheel)
    assert set(contents(wheel)) >= TYPED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "compiler", "expected"),
    [
        ("2.10.0", "false", "false failed"),
        ("2.10.0", "missing", "no C++ compiler (missing) was found"),
        (None, "c++", "torch is not installed"),
        ("2.9.1+cpu", "c++", "torch 2.9.1+cpu is too old"),
    ],
)
def test_where_it_cannot_be_compiled_it_installs_and_says_why(build, version, compiler, expected):
    if version is not None:
        build.install_torch(version)
    wheel, reason = build.run("build_wheel", CXX=compiler)
    assert reason == expected
    assert not extensions(wheel)


def test_it_compiles_for_the_torch_that_is_installed_and_for_no_processor_in_particular(build):
    build.install_torch("2.13.0+cpu")
    wheel, reason = build.run("build_wheel", CXX=str(build.compiler))
    assert reason is None
    assert len(extensions(wheel)) == 1
    *compiled, linked = build.log.read_text().splitlines()
    sources = {path.name for path in (ROOT / "csrc").glob("*.cpp")}
    assert {re.search(r"-c csrc/(\S+)", line)[1] for line in compiled} == sources
    for line in compiled:
        assert {"-std=c++20", f"-I{build.site_packages}/torch/include"} <= {*line.split()}
        assert not re.search(r" -m(arch|cpu|tune|avx|sse|f)", line)
    assert f"-L{build.site_packages}/torch/lib -ltorch_cpu" in linked


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_what_cannot_be_built_again_is_not_left_from_before(build, hook):
    build.install_torch("2.10.0")
    for compiler, expected in ((build.compiler, 1), ("false", 0)):
        wheel, _ = build.run(hook, CXX=str(compiler))
        places = [*extensions(wheel), *build.sources.glob("mtu_kernels/_C*")]
        assert len(places) == expected


def test_the_source_distribution_has_all_that_is_compiled(build):
    archive, _ = build.run("build_sdist")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} | {"setup.py", *TYPED} <= names


def installed() -> Path | None:
    return next(Path(mtu_kernels.__file__).parent.glob("_C*"), None)


def has_compiler() -> bool:
    if shutil.which("g++") is None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return False
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return int(version.split(".")[0]) >= 12


@pytest.mark.skipif(not has_compiler(), reason="needs torch >= 2.10 and GCC >= 12")
def test_where_there_is_a_compiler_the_extension_is_installed():
    assert installed() is not None, "To see why: pip install -v --no-deps --no-build-isolation -e ."


# What the functions of each level must not hold, the rest of the library being no level: by the first byte, after
# prefixes, of an instruction (VEX for AVX and tiles, EVEX for AVX-512), or by its name.
VEX_OR_EVEX = r":\t(?:(?:26|2e|36|3e|64|65|67) )*(?:c4|c5|62) "
EVEX = r":\t(?:(?:26|2e|36|3e|64|65|67) )*62 "
BFLOAT16 = r"\tv\w*bf16"
TILES = r"\t\w*tile|\ttdp"
BEYOND = {
    None: VEX_OR_EVEX,
    "avx2": f"{EVEX}|{BFLOAT16}|{TILES}",
    "avx512": f"{BFLOAT16}|{TILES}",
    "avx512_bf16": TILES,
    "amx": "no such instruction",
}


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86-64 and objdump")
@pytest.mark.skipif(installed() is None, reason="needs the extension")
def test_instructions_beyond_a_processor_are_only_in_functions_of_its_level():
    """Functions of a level are in its own unnamed namespace: no other file can be linked with a copy of theirs."""
    command = ["objdump", "-d", "--insn-width=15", installed()]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held = dict.fromkeys(BEYOND, "")
    for name, code in re.findall(r"^[0-9a-f]+ <(\S+)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        match = re.match(r"_ZZ*NK?3mtu\d+(avx2|avx512|avx512_bf16|amx)12_GLOBAL__N_1", name)
        level = match[1] if match else None
        assert not re.search(BEYOND[level], code), name
        held[level] += code
    # What is looked for above is found in the levels that have it.
    assert all(re.search(VEX_OR_EVEX, held[level]) for level in BEYOND if level)
    assert all(re.search(EVEX, held[level]) for level in ("avx512", "avx512_bf16", "amx"))
    assert re.search(BFLOAT16, held["avx512_bf16"])
    assert re.search(TILES, held["amx"])
    # Tiles are set up by a constant: GCC 12 may leave a local variable unwritten, all but its first 8 bytes.
    operands = re.findall(r"ldtilecfg\s+(.+)", held["amx"])
    assert operands
    assert all("(%rip)" in operand for operand in operands)
