"""Builds csrc, the C++ backend for CPUs, as mtu_kernels/_C; where it cannot, installs without it and says so."""

import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from shutil import which

from setuptools import Extension, errors, setup
from setuptools.command.build_ext import build_ext


class BuildOrSayWhyNot(build_ext):
    def build_extension(self, ext):
        for outdated in ["."] * self.editable_mode + [self.build_lib]:
            Path(outdated, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        # An isolated build runs the environment's own Python, but does not see what is installed beside it.
        torch = next(iter(distributions(name="torch", path=[*sys.path, sysconfig.get_path("platlib")])), None)
        cxx = getattr(self.compiler, "compiler_so_cxx", ["g++"])[0]
        try:
            if torch is None or tuple(map(int, torch.version.split(".")[:2])) < (2, 10):
                raise errors.PlatformError(f"torch {torch.version} is too old" if torch else "torch is not installed")
            ext.extra_compile_args = [*FLAGS.split(), f"-I{torch.locate_file('torch/include')}"]
            ext.extra_link_args = [f"-L{torch.locate_file('torch/lib')}", "-ltorch_cpu"]
            one, threads = self.compiler.compile, ThreadPoolExecutor()
            self.compiler.compile = lambda files, **args: [*threads.map(lambda f: one([f], **args)[0], files)]
            super().build_extension(ext)
        except (errors.BaseError, errors.CCompilerError) as error:
            failure = f"{cxx} failed" if which(cxx) else f"no C++ compiler ({cxx}) was found"
            why = error if isinstance(error, errors.PlatformError) else failure
            print(f"mtu: the C++ CPU backend was not built: {why}. {INSTEAD}", file=sys.stderr)


FLAGS = "-std=c++20 -O3 -g0 -fvisibility=hidden -Wno-maybe-uninitialized -DTORCH_TARGET_VERSION=0x020a000000000000"
INSTEAD = """backend='auto' uses PyTorch operators instead. To build it, install torch >= 2.10 and GCC >= 12 or \
clang >= 15, then run pip install --no-build-isolation again."""
PYTHON = "" if sysconfig.get_config_var("Py_GIL_DISABLED") else "cp311"
C = Extension("mtu_kernels._C", Path().glob("csrc/*.cpp"), optional=True, py_limited_api=True)
setup(ext_modules=[C], cmdclass={"build_ext": BuildOrSayWhyNot}, options={"bdist_wheel": {"py_limited_api": PYTHON}})
