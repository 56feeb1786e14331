"""Outputs and states of models, and how tests compare them."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

# Relative to the largest output. These networks chain some 40 layers, each of which may round by about 2 ulp
# (eps = 1.2e-7) of its largest output: 40 · 2 · 1.2e-7 = 1e-5, the bound that DESIGN §2 names, too.
TOLERANCE = 1e-5


def rows(given: dict[str, Any], index: Any, channels: int | None = None) -> dict[str, Any]:
    """The samples `index` of a batch, with `channels` of their channels."""
    taken = {k: rows(v, index) if isinstance(v, dict) else v[index] for k, v in given.items()}
    if channels is not None:
        taken["sample"] = taken["sample"][:, :channels]
    return taken


@torch.no_grad()
def predict(unet: UNet2DConditionModel, given: dict[str, Any], *names: str, **more: Any) -> Tensor:
    """The output for a batch whose samples belong to the tasks `names`; none named: as a stock UNet is called."""
    if names:
        more["task_ids"] = unet.task_ids(names)
    return unet(**given, **more).sample


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise unless the largest difference is within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.3g} of {scale:.3g}, allowed {tolerance:.3g}"


def assert_differ(first: Tensor, second: Tensor) -> None:
    """Raise unless two outputs are so different that a test that they are close means something."""
    assert (first - second).abs().max() > 1000 * TOLERANCE * second.abs().max()


def snapshot(unet: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A copy of what an operation that fails must not change: the state dict and the configuration."""
    return {k: v.clone() for k, v in unet.state_dict().items()}, dict(unet.config.items())


def assert_unchanged(unet: torch.nn.Module, before: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Raise unless `unet` is bit for bit what it was at `snapshot`."""
    state, config = before
    assert dict(unet.config) == config
    assert unet.state_dict().keys() == state.keys()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, state[name]), name
