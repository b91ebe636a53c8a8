"""The part of the loss that a learned variance is trained with: one term of the variational bound of a T-step chain.

The chain's times are t_min + (t_max − t_min)·i/(T − 1), i = 0 … T − 1 (DDPM's own at T = 1000), and one step leads from t
to s = t − (t_max − t_min)/(T − 1); times between are taken the same way. With 1 − SNR_t/SNR_s =: κ

    q(x_t | x_s) has variance σ_t²·κ ("large", β_t),   q(x_s | x_t, x0) has variance σ_s²·κ ("small", β̃_t)
    and mean (SNR_t/SNR_s)·(α_s/α_t)·x_t + α_s·κ·x0    (Kingma et al. 2021, appendix A.2)

and the model's step is normal about the same mean with its own x0, with a variance between the two: ln Σ = share·ln large +
(1 − share)·ln small (Nichol & Dhariwal 2021, eq. 15). The first step, to the data, has no small variance: it takes that of
the second, and is measured by the likelihood of the image's 256 grey levels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from denoiselab.diffusion.denoiser import Images, per_sample
from denoiselab.diffusion.paths import Path, Time


class ChainStep(NamedTuple):
    """One step of the chain from each of some times, float64 of the shape of t.

    Args:
        log_small: ln of the smallest variance.
        log_large: ln of the largest variance.
        gain: factor of x0 in the mean.
        first: whether the step leads to the data.
    """

    log_small: Time
    log_large: Time
    gain: Time
    first: Bool[Tensor, "*B"]


def chain_step(path: Path, t: Time, steps: int) -> ChainStep:
    """The step of the T-step chain that starts at t, T = `steps` ≥ 2."""
    stride = (path.t_max - path.t_min) / (steps - 1)
    first = t < path.t_min + (1 - 1e-6) * stride  # the second time of the grid itself is not, whatever its rounding
    start = torch.where(first, path.t_min + stride, t)
    end = (start - stride).clamp(min=path.t_min)
    kappa = -torch.expm1(path.log_snr(start) - path.log_snr(end))
    log_kappa = kappa.log()
    log_large = 2 * path.sigma(t).log() + torch.where(first, 0, log_kappa)
    return ChainStep(2 * path.sigma(end).log() + log_kappa, log_large, path.alpha(end) * kappa, first)


def variational_bound(path: Path, t: Time, x0: Images, guess: Images, share: Images, steps: int) -> Float[Tensor, " B"]:
    """The term of the bound at t in bits per dimension: KL(q(x_s | x_t, x0) ‖ p(x_s | x_t)), or −log p(x0 | x_t).

    Args:
        path: the Gaussian path.
        t: float64 of shape (B,).
        x0: images in [−1, 1].
        guess: the network's x0.
        share: where the variance lies between the small one (0) and the large one (1).
        steps: T, at least 2.

    Source: Nichol & Dhariwal 2021, eq. 4–7.
    """
    step = chain_step(path, t, steps)
    low, high = per_sample(step.log_small, x0), per_sample(step.log_large, x0)
    log_variance = share * high + (1 - share) * low
    kl = normal_kl(per_sample(step.gain, x0) * (x0 - guess), low, log_variance)
    first = step.first.reshape(-1, 1, 1, 1)
    # Elsewhere the guess may be too far off for its likelihood to have a gradient, which `where` would make a NaN.
    nats = torch.where(first, decoder_nll(x0, torch.where(first, guess, x0), log_variance), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def normal_kl(difference: Tensor, log_variance: Tensor, log_variance_other: Tensor) -> Tensor:
    """KL(N(m, v) ‖ N(m', v')) in nats, from m − m', ln v and ln v'."""
    log_ratio = log_variance - log_variance_other
    return (log_ratio.exp() - 1 - log_ratio + difference.square() * (-log_variance_other).exp()) / 2


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−ln of the probability that a normal puts on the grey level of x0, in nats.

    The levels are −1 + 2k/255; each owns the interval of ±1/255 about it, the outermost ones all that lies beyond.

    Source: Ho et al. 2020, eq. 13.
    """
    scale = (-log_variance / 2).exp()
    low = ((x0 - mean - 1 / 255) * scale).masked_fill(x0 < -1 + 1 / 255, -math.inf)
    high = ((x0 - mean + 1 / 255) * scale).masked_fill(x0 > 1 - 1 / 255, math.inf)
    # Φ(high) − Φ(low) in the lower tail, where ln Φ keeps its digits.
    above = low + high > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    log_high = torch.special.log_ndtr(high)
    return -log_high - torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
