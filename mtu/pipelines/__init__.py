"""Multi-task pipelines: one call turns prompts and images into images, for any mix of tasks.

- `stable_diffusion`: `MTUPipeline`, for Stable Diffusion 1 and 2.
- `inputs`: the checks of a call's arguments, and the preparation of condition images.
- `guidance`: the guidance branches of a batch, and the formula that combines their predictions.
- `denoising`: the loop over the timesteps, which all pipelines share.
- `callbacks`: callbacks of the user between two steps.
- `conversion`: stock pipelines from multi-task ones, and the reverse.
- `model_card`: the README.md of a saved pipeline.

Configurations and the UNet itself are in `mtu.models`.
"""

from mtu.pipelines.stable_diffusion import MTUPipeline

__all__ = ["MTUPipeline"]
