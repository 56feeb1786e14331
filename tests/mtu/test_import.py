"""What importing loads: little, and every public name by its first use, whatever was imported before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mtu

ROOT = Path(__file__).parents[2]
# Statements that a user may start with.
STARTS = [
    *(f"import mtu; mtu.{name}" for name in mtu.__all__),
    "from mtu import *; assert callable(upcycle) and callable(compile) and callable(load_trained)",
    "from mtu import upcycle; assert callable(upcycle)",
    # A module that has the name of a function would take its place.
    "import mtu.upcycling, mtu; assert callable(mtu.upcycle) and mtu.upcycle is mtu.upcycling.upcycle",
    "from mtu.upcycling import load_trained; from mtu import upcycle; assert callable(upcycle)",
    "import mtu.runtime.compiling as c, mtu; assert mtu.compile is c.compile and mtu.warmup is c.warmup",
    # As diffusers does, to read a pipeline's folder.
    "import diffusers, importlib; m = importlib.import_module('mtu'); c = getattr(m, 'MTUUNet2DConditionModel'); "
    "assert issubclass(c, getattr(m, 'ModelMixin')) and m.ModelMixin is diffusers.ModelMixin",
    "import mtu.models.unet as u, mtu; assert mtu.MTUUNet2DConditionModel is u.MTUUNet2DConditionModel; mtu.ModelMixin",
    # By the module that the class names as its own, which has not loaded it.
    "import pickle; from mtu.models.unet import MTUUNet2DConditionModel as U; "
    "assert pickle.loads(pickle.dumps(U)).__module__ == 'mtu'",
    "import pickle, mtu.pipelines as p; assert pickle.loads(pickle.dumps(p.MTUPipeline)) is p.MTUPipeline",
]


def run(code, *options):
    """stdout of a fresh interpreter."""
    command = [sys.executable, *options, "-c", code]
    # Kernels for GPUs then run on CPU tensors, whatever the machine has.
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_neither_torch_nor_diffusers_nor_transformers():
    heavy = ("torch", "torch._dynamo", "diffusers", "diffusers.models", "transformers", "numpy", "mtu_kernels")
    code = f"import sys, mtu; mtu.tasks.EDIT; dir(mtu); print([name for name in {heavy} if name in sys.modules])"
    assert run(code).strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_every_name_comes_by_its_first_use_whatever_was_imported_before():
    # Each in a child of a process that has loaded all but mtu, which takes seconds.
    code = f"""
import os, sys, traceback
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
assert "mtu" not in sys.modules
for statement in {STARTS!r}:
    child = os.fork()
    if not child:
        status = 1
        try:
            exec(statement, {{}})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, statement
"""
    run(code)


def test_dir_names_what_is_public():
    assert dir(mtu) == sorted(mtu.__all__)
    assert all(getattr(mtu, name) is not None for name in dir(mtu))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"^module 'mtu' has no attribute 'downcycle'$"):
        _ = mtu.downcycle
    with pytest.raises(ImportError, match="cannot import name 'downcycle' from 'mtu'"):
        from mtu import downcycle  # noqa: F401


@pytest.mark.slow
def test_kernels_leave_torchs_compiler_alone_until_they_are_compiled():
    code = """
import sys, torch, mtu_kernels
from tests.mtu_kernels.moe_ffn_cases import Sizes, make_problem
arguments = make_problem(0, Sizes(B=2, L=48, D=64, E=3, F=64)).arguments
names = ("auto", *mtu_kernels.available_backends())
expected = {name: mtu_kernels.moe_ffn(*arguments, backend=name) for name in names}
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
# Compiled dense inference in float32 leaves nothing to Triton's kernels.
expected["triton"] = expected["eager"]
for name in names:
    def call(*arguments):
        return mtu_kernels.moe_ffn(*arguments, backend=name)
    torch.compiler.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(compiled(*arguments), expected[name]), name
"""
    # The interpreter of Triton 3.6 takes numbers from arrays in a way that NumPy deprecates.
    run(code, "-W", "error", "-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
