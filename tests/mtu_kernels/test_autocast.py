"""Which devices have autocast, asked as torch's own function answers it."""

import pytest
import torch

from mtu_kernels.autocast import has_autocast


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_compilers_may_ask_too(device, monkeypatch):
    """torch 2.11 cannot trace its own function; here, no version can."""
    expected = torch.amp.is_autocast_available(device)
    assert has_autocast(device) == expected
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))

    def one_if_so(x):
        return x + 1 if has_autocast(device) else x

    compiled = torch.compile(one_if_so, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == expected
