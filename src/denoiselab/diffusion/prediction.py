"""What the network's output means, as a pair of numbers: F = a(t)·x0 + b(t)·ε.

With x_t = α·x0 + σ·ε the two equations are solved by

    det = α·b − σ·a,   x0 = (b·x_t − σ·F)/det,   ε = (α·F − a·x_t)/det

so every prediction is its pair, and nothing else in the project asks which one was trained. An error δF in the output is
an error σ·δF/det in x0 and α·δF/det in ε: a loss weight in x0- or ε-space therefore becomes one in F-space as

    w_F = w_x0·(σ/det)² = w_ε·(α/det)².
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.diffusion.paths import Path, Time


class Pair(NamedTuple):
    """Path coefficients and prediction pair at some times, all of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor

    @property
    def det(self) -> Tensor:
        """α·b − σ·a."""
        return self.alpha * self.b - self.sigma * self.a


class Prediction(ABC):
    """What a network is trained to output."""

    @property
    def name(self) -> str:
        """For messages."""
        return type(self).__name__.lower()

    @abstractmethod
    def ab(self, path: Path, t: Time) -> tuple[Time, Time]:
        """The pair (a, b) at t."""

    def pair(self, path: Path, t: Time) -> Pair:
        """Path coefficients and (a, b) at t."""
        return Pair(path.alpha(t), path.sigma(t), *self.ab(path, t))

    def c_in(self, path: Path, t: Time) -> Time:
        """Factor on x_t at the network's input."""
        return torch.ones_like(t)

    def c_noise(self, path: Path, t: Time) -> Time:
        """What the network is told about t."""
        return path.c_noise(t)


class Epsilon(Prediction):
    """F = ε (Ho et al. 2020, eq. 14)."""

    def ab(self, path: Path, t: Time) -> tuple[Time, Time]:
        """(0, 1)."""
        return torch.zeros_like(t), torch.ones_like(t)


class X0(Prediction):
    """F = x0."""

    def ab(self, path: Path, t: Time) -> tuple[Time, Time]:
        """(1, 0)."""
        return torch.ones_like(t), torch.zeros_like(t)


class V(Prediction):
    """F = α·ε − σ·x0 (Salimans & Ho 2022, appendix D)."""

    def ab(self, path: Path, t: Time) -> tuple[Time, Time]:
        """(−σ, α)."""
        return -path.sigma(t), path.alpha(t)


class Velocity(Prediction):
    """F = dx_t/dt = α̇·x0 + σ̇·ε (Lipman et al. 2023, eq. 9; Liu et al. 2022, eq. 1)."""

    def ab(self, path: Path, t: Time) -> tuple[Time, Time]:
        """(α̇, σ̇)."""
        return path.d_alpha(t), path.d_sigma(t)


def check_legal(path: Path, prediction: Prediction, bound: float = 1e5) -> None:
    """Refuse a prediction from which x0 or ε cannot be read somewhere on the path.

    Raises:
        ValueError: if max(α, σ)/|det| exceeds `bound` anywhere on the closed range [t_min, t_max].
    """
    t = torch.linspace(path.t_min, path.t_max, 1025, dtype=torch.float64, device="cpu")
    pair = prediction.pair(path, t)
    gain = torch.maximum(pair.alpha, pair.sigma) / pair.det.abs()
    if not bool((gain <= bound).all()):
        at = float(t[(~(gain <= bound)).nonzero()[0]])
        raise ValueError(
            f"prediction={prediction.name}: x0 and noise cannot be read from it on {type(path).__name__} at t={at:g}; "
            "choose another prediction or narrow the path, for example objective.path.t_max=0.999"
        )
