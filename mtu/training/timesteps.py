"""Loss weights of timesteps, for the squared error of the predicted noise."""

import torch
from torch import Tensor

__all__ = ["timestep_loss_weights", "timesteps_at_fractions"]


def timesteps_at_fractions(spread: Tensor, count: int) -> Tensor:
    """The timestep `⌊spread · count⌋` of each number in [0, 1], as int64.

    The last one is taken where `spread` is 1: a sum of a number below 1 and a whole one rounds up to the next.
    """
    return (spread * count).long().clamp_max(count - 1)


def timestep_loss_weights(alphas_cumprod: Tensor, snr_gamma: float | None, max_inverse_snr: float) -> Tensor:
    """`min(SNR, γ) / SNR + min(1 / SNR, κ)`, with mean 1, where SNR = ᾱ / (1 − ᾱ).

    The first term is min-SNR: it lowers timesteps of little noise, which are easy. The second is the weight of an error
    in v up to a cap κ: without it the noisiest timesteps, where only text and condition tell what the picture is, count
    for almost nothing in the predicted image.

    Args:
        alphas_cumprod: (timesteps,) ᾱ, the signal's part of the variance.
        snr_gamma: γ; None: the first term is 1.
        max_inverse_snr: κ; 0: no second term.

    Returns:
        (timesteps,) in the dtype of ᾱ; where SNR is 0, the limit 1 + κ before the division by the mean.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556).
    """
    ratio = alphas_cumprod / (1 - alphas_cumprod)
    # Not min(SNR, γ) / SNR: a schedule of zero terminal SNR ends in 0 / 0.
    lowered = torch.ones_like(ratio) if snr_gamma is None else (snr_gamma / ratio).clamp_max(1)
    weights = lowered + (1 / ratio).clamp_max(max_inverse_snr)
    return weights / weights.mean()
