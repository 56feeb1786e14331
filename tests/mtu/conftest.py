"""What tests of upcycled models share."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave two cases of each parametrized test here to the fast tier, the first and the last.

    The others take their time beside those. A test that marks slow cases itself is left as it is.
    """
    tests = defaultdict(list)
    for item in items:
        if FOLDER in item.path.parents and item.get_closest_marker("gpu") is None:
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        if not any(case.get_closest_marker("slow") for case in cases):
            for case in cases[1:-1]:
                case.add_marker(pytest.mark.slow)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Compiled code is dropped, and compiling the same code twice is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()
