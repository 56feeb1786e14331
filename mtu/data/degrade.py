"""Degradation for super-resolution: the order of Real-ESRGAN's first stage, at the size of an icon."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

BLUR_SIGMA = (0.3, 1.0)
NOISE_STD = (2.0, 22.0)
JPEG_QUALITY = (40, 95)
# PIL's reducing filters low-pass before they sample, whatever the kernel.
RESIZE_KERNELS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def blur(image: np.ndarray, sigma: tuple[float, float]) -> np.ndarray:
    """Blur with a separable, possibly anisotropic Gaussian; edges are repeated.

    Args:
        image: (h, w, 3) float32.
        sigma: standard deviation down and across, in pixels.
    """
    reach = np.arange(-3, 4)
    for axis, width in enumerate(sigma):
        kernel = np.exp(-0.5 * (reach / width) ** 2)
        kernel /= kernel.sum()
        padding = [(3, 3) if side == axis else (0, 0) for side in range(3)]
        padded = np.pad(image, padding, mode="edge")
        length = image.shape[axis]
        image = sum(
            weight * np.take(padded, range(start, start + length), axis=axis) for start, weight in enumerate(kernel)
        ).astype(np.float32)
    return image


def degrade(image: np.ndarray, rng: np.random.Generator, *, noise: bool = True) -> np.ndarray:
    """Blur, resize by half with a random kernel, add noise, and compress as JPEG.

    Args:
        image: (h, w, 3) uint8.
        rng: source of all random choices.
        noise: False leaves noise and JPEG out, which tells how much of the loss they make.

    Returns:
        (h/2, w/2, 3) uint8.

    Source: Wang et al., "Real-ESRGAN", arXiv 2107.10833, section 3, with first-order degradation only.
    """
    sigma_down, sigma_across = rng.uniform(*BLUR_SIGMA, size=2)
    kernel = RESIZE_KERNELS[rng.integers(len(RESIZE_KERNELS))]
    std = rng.uniform(*NOISE_STD)
    quality = int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    blurred = np.clip(np.rint(blur(image.astype(np.float32), (sigma_down, sigma_across))), 0, 255).astype(np.uint8)
    height, width = image.shape[:2]
    small = np.asarray(Image.fromarray(blurred).resize((width // 2, height // 2), kernel))
    if not noise:
        return small
    noisy = np.clip(np.rint(small + rng.normal(0, std, small.shape)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def upsample(condition: Tensor, size: int) -> Tensor:
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
