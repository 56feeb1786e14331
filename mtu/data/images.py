"""Pictures as tensors with values in [−1, 1]: how they are made, resized and compared."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["psnr", "to_tensor", "upsample_bicubic"]


def upsample_bicubic(condition: Tensor, size: int) -> Tensor:
    """Resize a super-resolution condition bicubically, to see what copying it would give.

    PyTorch's kernel (a = −0.75); pipelines use PIL's (a = −0.5), which is a little softer.

    Args:
        condition: (..., 3, h, w) in [-1, 1].
        size: height and width to reach.

    Returns:
        (..., 3, size, size) in [-1, 1].
    """
    batch = condition.reshape(-1, *condition.shape[-3:])
    resized = functional.interpolate(batch, size=(size, size), mode="bicubic", align_corners=False)
    return resized.clamp(-1, 1).reshape(*condition.shape[:-2], size, size)


def to_tensor(image: np.ndarray) -> Tensor:
    """Turn (..., h, w, 3) uint8 into (..., 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(image, -1, -3).astype(np.float32) / 127.5 - 1)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], taken on [0, 1] with data range 1.

    Args:
        image: (..., 3, h, w).
        target: (..., 3, h, w).

    Returns:
        (...) one value per image.
    """
    error = ((image.clamp(-1, 1) - target) / 2).square().flatten(-3).mean(-1)
    return -10 * torch.log10(error.clamp_min(1e-10))
