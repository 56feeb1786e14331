"""Timesteps of a diffusion training: how they are drawn, and how much each one counts in the loss."""

import torch
from torch import Tensor

__all__ = ["timestep_loss_weights", "timesteps_at_fractions"]


def timesteps_at_fractions(fractions: Tensor, num_timesteps: int) -> Tensor:
    """Turn fractions of the schedule into timesteps: `min(⌊fraction · num_timesteps⌋, num_timesteps − 1)`.

    Args:
        fractions: (n,) numbers in [0, 1]. 1 itself occurs, because callers add stratum and offset in float32.
        num_timesteps: timesteps of the schedule.

    Returns:
        (n,) int64.
    """
    return (fractions * num_timesteps).long().clamp_max(num_timesteps - 1)


def timestep_loss_weights(
    alphas_cumprod: Tensor, snr_gamma: float | None, max_inverse_snr: float, prediction_type: str = "epsilon"
) -> Tensor:
    """Compute the weight of each timestep for the squared error of the prediction.

        epsilon:       min(SNR, γ) / SNR       + min(1 / SNR, κ),      where SNR = ᾱ / (1 − ᾱ)
        v_prediction:  min(SNR, γ) / (SNR + 1) + ᾱ · min(1 / SNR, κ)

    The first term is min-SNR, as in diffusers' scripts: it lowers the weight of timesteps with little noise, which are
    easy. The second term weighs the error in v, up to the cap κ. Without it the noisiest timesteps hardly count,
    although only text and condition tell there what the picture shows. With it, the weights are divided by their mean,
    so that the loss keeps its scale.

    Args:
        alphas_cumprod: (timesteps,) ᾱ, the signal's part of the variance.
        snr_gamma: γ; None: the first term is 1.
        max_inverse_snr: κ; 0: no second term.
        prediction_type: "epsilon" or "v_prediction".

    Returns:
        (timesteps,) in the dtype of ᾱ. Where ᾱ is 0, x_t is the noise itself and v is the negated picture. The formula
        gives this error no weight with γ, as diffusers' scripts do, so nothing would teach what sampling starts with.
        The first term is therefore 1 there, as without γ. The second term is its limit, 0.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556).
    """
    ratio = alphas_cumprod / (1 - alphas_cumprod)
    # At a given x_t, the error in v is the error in the noise divided by √ᾱ.
    factor = alphas_cumprod if prediction_type == "v_prediction" else torch.ones_like(ratio)
    first = torch.ones_like(ratio)
    if snr_gamma is not None:
        # min(γ / SNR, 1) equals min(SNR, γ) / SNR, which would be 0 / 0 where a schedule ends in zero terminal SNR.
        first = torch.where(alphas_cumprod > 0, (snr_gamma / ratio).clamp_max(1) * factor, 1.0)
    if not max_inverse_snr:
        return first
    weights = first + (1 / ratio).clamp_max(max_inverse_snr) * factor
    return weights / weights.mean()
