"""What tests of upcycled models share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Compiled code is dropped, and compiling the same code twice is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()
