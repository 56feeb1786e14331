"""Images as tensors with values in [−1, 1]: conversion, resizing and comparison."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["psnr", "to_normalized_tensor", "upsample_bicubic"]


def upsample_bicubic(images: Tensor, size: int) -> Tensor:
    """Resize images with PyTorch's bicubic kernel (a = −0.75).

    Pipelines resize condition images with PIL's kernel (a = −0.5), which is a little softer.

    Args:
        images: (..., 3, h, w) in [-1, 1].
        size: height and width of the result.

    Returns:
        (..., 3, size, size) in [-1, 1].
    """
    batch = images.reshape(-1, *images.shape[-3:])
    resized = functional.interpolate(batch, size=(size, size), mode="bicubic", align_corners=False)
    return resized.clamp(-1, 1).reshape(*images.shape[:-2], size, size)


def to_normalized_tensor(image: np.ndarray) -> Tensor:
    """Convert (..., h, w, 3) uint8 to (..., 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(image, -1, -3).astype(np.float32) / 127.5 - 1)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio in dB of images in [-1, 1].

        −10 log₁₀ mean(((image − target) / 2)²)

    Values are compared on the scale [0, 1], whose data range is 1.

    Args:
        image: (..., 3, h, w).
        target: (..., 3, h, w).

    Returns:
        (...) the ratio of each image, at most 100.
    """
    error = ((image.clamp(-1, 1) - target) / 2).square().flatten(-3).mean(-1)
    return -10 * torch.log10(error.clamp_min(1e-10))
