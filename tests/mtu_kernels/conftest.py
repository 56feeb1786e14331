import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton*.py", "test_compiled_kernels.py", "test_tiles.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory reads as NaN: an element that a kernel forgets to write cannot pass by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_compiled_code_left():
    yield
    torch.compiler.reset()
