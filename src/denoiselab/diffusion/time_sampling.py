"""At which times the training loss is asked: distributions on [t_min, t_max].

A distribution is its inverse CDF applied to uniform numbers. Stratified numbers, (place + u)/B over the *global* batch of
B, put one sample into each of B equal slices of probability: the same expectation with less variance (Kingma et al. 2021,
appendix I.1, does it with one shared u).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path, Time


class TimeSampling(ABC):
    """A distribution of training times.

    Args:
        stratified: spread the draws over the global batch.
    """

    def __init__(self, *, stratified: bool = True) -> None:
        self.stratified = stratified

    def __call__(self, path: Path, noise: NoiseSource) -> Time:
        """Times in [t_min, t_max], float64 of shape (B,)."""
        u = noise.uniform("time")
        if self.stratified:
            u = (noise.index + u) / (noise.total or len(u))
        return path.t_min + (path.t_max - path.t_min) * self.quantile(u)

    @abstractmethod
    def quantile(self, u: Time) -> Time:
        """The inverse CDF: probabilities in (0, 1) to fractions of the range, in [0, 1]."""


class Uniform(TimeSampling):
    """Uniform in t."""

    def quantile(self, u: Time) -> Time:
        """The identity."""
        return u


class LogitNormal(TimeSampling):
    """logit of the fraction is normal: more training in the middle of the path.

    Args:
        mean: of the logit; above 0 means noisier.
        std: of the logit, positive.
        stratified: spread the draws over the global batch.

    Source: Esser et al. 2024, eq. 19, where (0, 1) did best.
    """

    def __init__(self, *, mean: float = 0.0, std: float = 1.0, stratified: bool = True) -> None:
        super().__init__(stratified=stratified)
        if not std > 0:
            raise ValueError(f"std={std}: must be positive")
        self.mean, self.std = mean, std

    def quantile(self, u: Time) -> Time:
        """sigmoid(mean + std·Φ⁻¹(u))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
