import gc
import os

import pytest
import torch

# Without a GPU, Triton's kernels run in Triton's interpreter. It reads its switch when a kernel is defined, hence here,
# before any test module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests poison memory through torch's deterministic mode, which older versions of torch grant cuBLAS on this condition.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays until the end: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
