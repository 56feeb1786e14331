"""Trials whether Triton can launch or interpret a kernel on this machine."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import sys
import warnings

import triton
from triton import knobs


@functools.cache
def why_not_launchable() -> str | None:
    """The reason why Triton cannot launch kernels on a GPU of this machine, as a clause; or ``None`` if it can.

    Triton compiles C code against Python's headers to load and launch kernels, and caches the result. With a warm cache
    it needs no compiler, except that Triton 3.6 compiles a launcher for each new signature of a kernel.
    """
    try:
        driver = triton.runtime.driver.active
        # Triton declares this attribute in the classes of its drivers alone.
        loaded = driver.utils  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # the compiler, the linker and the operating system raise their own errors
        found = _why_no_compiler() or f"it could not do so ({_first_line(error)})"
        return f"Triton builds its driver with a C compiler and Python's headers, and {found}"
    if loaded is not None and builds_launchers(type(driver)) and (found := _why_no_compiler()) is not None:
        return f"Triton {triton.__version__} builds a launcher for each kernel with a C compiler, and {found}"
    return None


def builds_launchers(driver: type) -> bool:
    """Whether a driver class of Triton compiles a launcher for each signature of each kernel."""
    return hasattr(inspect.getmodule(driver), "make_launcher")


def _why_no_compiler() -> str | None:
    # Triton searches in this order, and does not check CC. Its builds for other systems include a compiler.
    if sys.platform != "linux" or knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    if named is not None:
        return None if shutil.which(named) else f"the variable CC names {named!r}, which is not there"
    return None if shutil.which("gcc") or shutil.which("clang") else "there is no gcc or clang, and no variable CC"


@triton.jit
def _count(n):
    for _ in range(n):
        pass


@functools.cache
def why_not_interpretable() -> str | None:
    """The reason why Triton's interpreter fails with the installed NumPy, as a clause; or ``None`` if it works.

    The interpreter of Triton 3.6 fails with NumPy 2.4 at a loop whose length is an argument.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _count[(1,)](1)
    except Exception as error:  # NumPy's own errors, or the interpreter's errors that wrap them
        numpy = sys.modules["numpy"].__version__
        return f"the interpreter of Triton {triton.__version__} does not run with NumPy {numpy} ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
