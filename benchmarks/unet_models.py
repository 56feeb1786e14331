"""The UNets that are measured, the original and the upcycled one; their inputs; and what their outputs are held to."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import mtu
from benchmarks.correctness import hold
from benchmarks.inputs import DTYPES
from benchmarks.sweeps import Setting
from benchmarks.unet_rows import Workload
from mtu.inspection import BUILT_IN
from mtu.tasks import SD_TASKS

# Arguments of the original's class. Weights are random: what they are makes no difference to time.
MODELS: dict[str, dict[str, Any]] = {
    "sd15": BUILT_IN["sd15"],
    # The same layout on a few channels, for a smoke test.
    "tiny": BUILT_IN["sd15"]
    | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32},
}
# Pixels per latent.
LATENT_FACTOR = 8
TASKS = len(SD_TASKS)
# Small enough for a run in a wider dtype.
CHECKED_SIZE = 64
_TEXT_TOKENS = 77
_TIMESTEP = 500


def check_setting(model: str, setting: Setting) -> None:
    """Raises ValueError if a model cannot be upcycled to these experts; found out without weights."""
    with torch.device("meta"):
        original = UNet2DConditionModel(**MODELS[model])
    mtu.upcycle(original, num_experts=setting.E, top_k=setting.K, init="paper", backend="eager")


def build_original(model: str, dtype: str) -> UNet2DConditionModel:
    """The stock UNet with seeded random weights, the same ones at every call, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**MODELS[model]).requires_grad_(False).eval()
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                # Fresh norms are 1 and 0, and would hide that a contender forgets them.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return _cast(unet, DTYPES[dtype])


def build_upcycled(model: str, dtype: str, setting: Setting, backend: str) -> mtu.MTUUNet2DConditionModel:
    """The original upcycled to four tasks, with its routers, in eval mode.

    Raises:
        RuntimeError: the backend is not part of this installation.
    """
    with warnings.catch_warnings():
        # Top-k routing does not preserve the original, and may leave experts without a task: neither matters to time.
        warnings.simplefilter("ignore", UserWarning)
        original = build_original(model, dtype)
        unet = mtu.upcycle(original, num_experts=setting.E, top_k=setting.K, backend=backend)
    return unet.requires_grad_(False)


def draw_inputs(unet: UNet2DConditionModel, workload: Workload, tasks: int) -> dict[str, Any]:
    """Arguments of one step: the same random numbers for every UNet, of which each takes the channels that it reads.

    Args:
        unet: the original, which gets the noisy latents, or the upcycled one, which gets the condition image, too.
        workload: batch, size and dtype.
        tasks: distinct tasks of the upcycled UNet's samples, in turn.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[workload.dtype])

    B, edge = workload.B, workload.size // LATENT_FACTOR
    channels = unet.config.in_channels + max(spec.condition_channels for spec in SD_TASKS)
    inputs = {
        "sample": normal(B, channels, edge, edge)[:, : unet.conv_in.in_channels].contiguous(),
        "timestep": torch.tensor(_TIMESTEP),
        "encoder_hidden_states": normal(B, _TEXT_TOKENS, unet.config.cross_attention_dim),
    }
    if isinstance(unet, mtu.MTUUNet2DConditionModel):
        inputs["task_ids"] = torch.arange(B) % tasks
    return inputs


class Yardstick(NamedTuple):
    """Outputs on a batch of all tasks, which a contender's are compared with.

    Attributes:
        workload: of that batch.
        user: of the code whose error is the yardstick, in that dtype.
        exact: of the same code and weights in a wider dtype.
    """

    workload: Workload
    user: Tensor
    exact: Tensor

    def check(self, unet: UNet2DConditionModel) -> None:
        """Asserts ``max|unet − exact| <= 2 · max|user − exact| + ulp · max|exact|``.

        Raises:
            WrongResult: one sentence with the error and what is allowed.
        """
        dtype = DTYPES[self.workload.dtype]
        output = _predict(unet, draw_inputs(unet, self.workload, TASKS))
        hold("the UNet's output", output, self.user, self.exact, dtype, torch.finfo(dtype).eps)


def make_yardstick(workload: Workload, setting: Setting) -> Yardstick:
    """What UNets of this setting are held to.

    With dense routing, a freshly upcycled UNet computes for each of its tasks what the original does, so it is held to
    the original. Top-k routing leaves hidden units out: there it is held to the upcycled UNet on the specification.
    """
    model, _, _, dtype = workload
    if setting.K is None:
        unet = build_original(model, dtype)
    else:
        unet = build_upcycled(model, dtype, setting, "reference")
        # Routers in a wider dtype might choose other experts.
        unet.drop_routers_()
    inputs = draw_inputs(unet, workload, TASKS)
    user = _predict(unet, inputs)
    wide = torch.float64 if dtype == "fp32" else torch.float32
    widened = {name: t.to(wide) if t.is_floating_point() else t for name, t in inputs.items()}
    return Yardstick(workload, user, _predict(_cast(unet, wide), widened))


@torch.no_grad()
def _predict(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
    return unet(**inputs).sample


def _cast(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    # diffusers' own `.to` warns of modules to keep in float32 even where there are none.
    return nn.Module.to(unet, dtype)
