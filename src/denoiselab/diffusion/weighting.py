"""Loss weights, stated in the space in which their paper states them and converted to the prediction's own.

The loss is w_F(t)·‖F − target‖²; with the factors of `prediction.py`, w_F = w_x0·(σ/det)² = w_ε·(α/det)².
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from denoiselab.diffusion.paths import Path, Time
from denoiselab.diffusion.prediction import Prediction

Space = Literal["prediction", "x0", "epsilon"]


class Weighting(ABC):
    """A loss weight w(t) in one space."""

    space: Space

    def __call__(self, path: Path, prediction: Prediction, t: Time) -> Time:
        """The weight in the space of the prediction."""
        weight = self.weight(path, t)
        if self.space == "prediction":
            return weight
        pair = prediction.pair(path, t)
        return weight * ((pair.sigma if self.space == "x0" else pair.alpha) / pair.det).square()

    @abstractmethod
    def weight(self, path: Path, t: Time) -> Time:
        """The weight in `space`."""


class Unit(Weighting):
    """Weight 1.

    Args:
        space: where it is 1: in the network's own output, or in the error of x0 or ε.
    """

    def __init__(self, *, space: Space = "prediction") -> None:
        self.space = space

    def weight(self, path: Path, t: Time) -> Time:
        """1."""
        return torch.ones_like(t)


class MinSNR(Weighting):
    """min(SNR, γ) on the error of x0.

    Args:
        gamma: the cap, positive; 5 in the paper.

    Source: Hang et al. 2023, section 3.4.
    """

    space: Space = "x0"

    def __init__(self, *, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma={gamma}: must be positive")
        self.gamma = gamma

    def weight(self, path: Path, t: Time) -> Time:
        """min(α²/σ², γ)."""
        return path.log_snr(t).exp().clamp(max=self.gamma)
