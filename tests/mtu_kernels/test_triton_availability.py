"""What the backend "triton" says of a machine where Triton itself cannot launch a kernel."""

import inspect
import logging
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
from triton.runtime.build import compile_module_from_src

from mtu_kernels import ExpertWeights
from mtu_kernels.moe_ffn import _choose, _fastest
from mtu_kernels.triton import availability, launch, probes

CUDA = torch.device("cuda", 0)
MODULE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "loaded", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_loaded(void) { return PyModule_Create(&module); }
"""


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """Answers of this machine are kept for good; these are of others."""
    for module, name in ((availability, "_why_not"), (probes, "why_not_launchable"), (probes, "why_not_interpretable")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose driver Triton builds as it builds its own, and a C compiler that may be taken away."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    module = ModuleType("a_driver")
    monkeypatch.setitem(sys.modules, "a_driver", module)

    class Driver:
        __module__ = "a_driver"

        @property
        def utils(self):
            return compile_module_from_src(MODULE, "loaded")

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver()))

    def without_compiler(**environment):
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return SimpleNamespace(module=module, without_compiler=without_compiler)


def asked() -> str | None:
    return availability.why_unsupported(CUDA, torch.bfloat16)


def test_no_compiler_for_the_driver(gpu):
    gpu.without_compiler()
    assert asked() == (
        "Triton builds its driver with a C compiler and Python's headers, and there is no gcc or clang, and no "
        "variable CC"
    )


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_driver_that_is_built_needs_no_compiler_but_launchers_do(gpu):
    assert asked() is None
    gpu.without_compiler()
    assert asked() is None
    gpu.module.make_launcher = None
    assert asked() == (
        f"Triton {triton.__version__} builds a launcher for each kernel with a C compiler, and there is no gcc or "
        "clang, and no variable CC"
    )


def test_a_compiler_that_is_named_and_missing(gpu):
    gpu.without_compiler(CC="icx")
    assert asked().endswith(", and the variable CC names 'icx', which is not there")


def test_a_compiler_that_fails(gpu):
    gpu.without_compiler(CC=shutil.which("false"))
    assert "and it could not do so (CalledProcessError: Command '['" in asked()
    assert "\n" not in asked()


def test_auto_falls_back_and_asking_by_name_is_an_error(gpu, caplog):
    """Asked of a tensor that only says where it is."""
    gpu.without_compiler()
    x = SimpleNamespace(device=CUDA)
    experts = ExpertWeights(*[torch.zeros(1, dtype=torch.bfloat16)] * 4, num_experts=1)
    with caplog.at_level(logging.WARNING, logger="mtu_kernels"):
        assert _fastest(x, experts) is _choose("eager", x, experts)
    assert [r.message for r in caplog.records] == [
        f"backend='auto' takes 'eager' on cuda:0 instead of 'triton': {asked()}."
    ]
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call: Triton builds its driver with"):
        _choose("triton", x, experts)


def test_which_triton_builds_launchers():
    """By what the installed one does."""
    assert probes.builds_launchers(CudaDriver) == ("compile_module_from_src" in inspect.getsource(CudaLauncher))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")
def test_an_interpreter_that_its_numpy_breaks(monkeypatch):
    assert availability.why_unsupported(torch.device("cpu"), torch.float32) is None

    class Broken:
        def __getitem__(self, grid):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars\nand more")

    monkeypatch.setattr(probes, "_count", Broken())
    assert availability.why_unsupported(torch.device("cpu"), torch.float32) == (
        f"the interpreter of Triton {triton.__version__} does not run with NumPy {numpy.__version__} (TypeError: only "
        "0-dimensional arrays can be converted to Python scalars)"
    )
