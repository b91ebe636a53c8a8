"""What a Gaussian path is, and what α² + σ² = 1 gives for free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Time = Float[Tensor, "*B"]


class Coefficients(NamedTuple):
    """What a path says of some times, all of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Path(ABC):
    """A Gaussian path on [t_min, t_max]. A subclass is its coefficients and the inverse of its log-SNR.

    Args:
        t_min: data end; σ(t_min) > 0.
        t_max: noise end.

    Raises:
        ValueError: if not `lowest` ≤ t_min < t_max ≤ `highest`.
    """

    lowest: float = 1e-5
    highest: float = 1.0
    even: bool = True  # whether equal steps in t spread a sampler's steps sensibly over the noise levels

    def __init__(self, *, t_min: float = 1e-3, t_max: float = 1.0) -> None:
        if not self.lowest <= t_min < t_max:
            raise ValueError(f"t_min={t_min}: must be at least {self.lowest} and below t_max={t_max}")
        if not t_max <= self.highest:
            raise ValueError(f"t_max={t_max}: must be at most {self.highest}")
        self.t_min, self.t_max = float(t_min), float(t_max)

    @abstractmethod
    def coefficients(self, t: Time) -> Coefficients:
        """α(t), σ(t), dα/dt and dσ/dt."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Time) -> Time:
        """The inverse of `log_snr`, without clamping to [t_min, t_max]."""

    def alpha(self, t: Time) -> Time:
        """Signal coefficient α(t)."""
        return self.coefficients(t).alpha

    def sigma(self, t: Time) -> Time:
        """Noise coefficient σ(t)."""
        return self.coefficients(t).sigma

    def d_alpha(self, t: Time) -> Time:
        """dα/dt."""
        return self.coefficients(t).d_alpha

    def d_sigma(self, t: Time) -> Time:
        """dσ/dt."""
        return self.coefficients(t).d_sigma

    def log_snr(self, t: Time) -> Time:
        """λ(t) = ln(α²/σ²); −∞ where α = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def c_noise(self, t: Time) -> Time:
        """What the network is told about t, unless the prediction says otherwise: 1000·t."""
        return 1000 * t


class VariancePreserving(Path):
    """A path with α² + σ² = 1 and α > 0, given by its log-SNR."""

    @abstractmethod
    def log_snr(self, t: Time) -> Time:
        """λ(t)."""

    @abstractmethod
    def d_log_snr(self, t: Time) -> Time:
        """dλ/dt."""

    def coefficients(self, t: Time) -> Coefficients:
        """α = √sigmoid(λ), σ = √sigmoid(−λ), α̇ = α·σ²·λ̇/2, σ̇ = −σ·α²·λ̇/2."""
        log_snr, slope = self.log_snr(t), self.d_log_snr(t)
        alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        alpha, sigma = alpha2.sqrt(), sigma2.sqrt()
        return Coefficients(alpha, sigma, alpha * sigma2 * slope / 2, -sigma * alpha2 * slope / 2)
