"""Builds csrc, the C++ backend for CPUs, as mtu_kernels/_C. Where that fails, mtu installs without it and says why."""

import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distributions
from pathlib import Path
from shutil import which

from setuptools import Extension, errors, setup
from setuptools.command.build_ext import build_ext

MINIMUM_TORCH = (2, 10)
COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
    # Only the interface that torch keeps stable since 2.10 is visible, so that one build serves every later version.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
ADVICE = (
    "backend='auto' uses PyTorch operators instead. To build it, install torch >= 2.10 and GCC >= 12 or clang >= 15, "
    "then run pip install --no-build-isolation again."
)


class OptionalBuild(build_ext):
    """Builds the extension against the installed torch, or prints one sentence that says why it could not."""

    def build_extension(self, ext: Extension) -> None:
        self._remove_previous_build(ext)
        try:
            self._set_flags(ext, find_torch())
            self._compile_in_parallel()
            super().build_extension(ext)
        except errors.PlatformError as error:
            report(str(error))
        except (errors.BaseError, errors.CCompilerError):
            compiler = getattr(self.compiler, "compiler_so_cxx", ["g++"])[0]
            report(f"{compiler} failed" if which(compiler) else f"no C++ compiler ({compiler}) was found")

    def _remove_previous_build(self, ext: Extension) -> None:
        # An extension of older sources must not stay where the new one cannot be built.
        folders = [self.build_lib, "."] if self.editable_mode else [self.build_lib]
        for folder in folders:
            Path(folder, self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def _set_flags(self, ext: Extension, torch: Distribution) -> None:
        ext.extra_compile_args = [*COMPILE_FLAGS, f"-I{torch.locate_file('torch/include')}"]
        ext.extra_link_args = [f"-L{torch.locate_file('torch/lib')}", "-ltorch_cpu"]

    def _compile_in_parallel(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor() as threads:
                objects = threads.map(lambda source: compile_in_turn([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all


def find_torch() -> Distribution:
    """The torch of the environment that mtu is installed into.

    An isolated build runs the Python of that environment, but without its packages on the path.

    Raises:
        PlatformError: torch is not installed or too old.
    """
    path = [*sys.path, sysconfig.get_path("platlib")]
    torch = next(iter(distributions(name="torch", path=path)), None)
    if torch is None:
        raise errors.PlatformError("torch is not installed")
    if tuple(int(part) for part in torch.version.split(".")[:2]) < MINIMUM_TORCH:
        raise errors.PlatformError(f"torch {torch.version} is too old")
    return torch


def report(reason: str) -> None:
    print(f"mtu: the C++ CPU backend was not built: {reason}. {ADVICE}", file=sys.stderr)


# Builds of Python without the global interpreter lock have no stable ABI.
stable_abi = "" if sysconfig.get_config_var("Py_GIL_DISABLED") else "cp311"
setup(
    ext_modules=[Extension("mtu_kernels._C", sorted(Path().glob("csrc/*.cpp")), optional=True, py_limited_api=True)],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": stable_abi}},
)
