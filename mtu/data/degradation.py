"""The degradation for super-resolution: the first stage of Real-ESRGAN's, with ranges for images as small as icons."""

import io

import numpy as np
from PIL import Image

BLUR_SIGMA_RANGE = (0.3, 1.0)
NOISE_STD_RANGE = (2.0, 22.0)
JPEG_QUALITY_RANGE = (40, 95)
# With each of these kernels, PIL filters out high frequencies before it samples.
RESIZE_KERNELS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def gaussian_blur(image: np.ndarray, sigma: tuple[float, float]) -> np.ndarray:
    """Blur an image with a separable Gaussian kernel, and repeat its edges.

    Args:
        image: (h, w, 3) float32.
        sigma: standard deviations down and across, in pixels.

    Returns:
        (h, w, 3) float32.
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


def degrade_to_half_size(image: np.ndarray, rng: np.random.Generator, *, add_noise_and_jpeg: bool = True) -> np.ndarray:
    """Blur an image, resize it by half with a random kernel, add noise, and compress it as JPEG.

    Args:
        image: (h, w, 3) uint8.
        rng: source of all random choices.
        add_noise_and_jpeg: whether to add noise and compress. Without them, one sees what blur and resizing alone do.

    Returns:
        (h/2, w/2, 3) uint8.

    Source: Wang et al., "Real-ESRGAN", arXiv 2107.10833, section 3, with first-order degradation only.
    """
    sigma_down, sigma_across = rng.uniform(*BLUR_SIGMA_RANGE, size=2)
    kernel = RESIZE_KERNELS[rng.integers(len(RESIZE_KERNELS))]
    std = rng.uniform(*NOISE_STD_RANGE)
    quality = int(rng.integers(JPEG_QUALITY_RANGE[0], JPEG_QUALITY_RANGE[1] + 1))
    blurred = np.clip(np.rint(gaussian_blur(image.astype(np.float32), (sigma_down, sigma_across))), 0, 255).astype(
        np.uint8
    )
    height, width = image.shape[:2]
    small = np.asarray(Image.fromarray(blurred).resize((width // 2, height // 2), kernel))
    if not add_noise_and_jpeg:
        return small
    noisy = np.clip(np.rint(small + rng.normal(0, std, small.shape)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
