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

from denoiselab.diffusion.paths import Coefficients, Path, Time


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
    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """The pair (a, b) where the path has these coefficients."""

    def pair(self, path: Path, t: Time) -> Pair:
        """Path coefficients and (a, b) at t."""
        c = path.coefficients(t)
        return Pair(c.alpha, c.sigma, *self.ab(c))

    def c_in(self, c: Coefficients) -> Time:
        """Factor on x_t at the network's input."""
        return torch.ones_like(c.alpha)

    def c_noise(self, path: Path, t: Time) -> Time:
        """What the network is told about t."""
        return path.c_noise(t)


class Epsilon(Prediction):
    """F = ε (Ho et al. 2020, eq. 14)."""

    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """(0, 1)."""
        return torch.zeros_like(c.alpha), torch.ones_like(c.alpha)


class X0(Prediction):
    """F = x0."""

    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """(1, 0)."""
        return torch.ones_like(c.alpha), torch.zeros_like(c.alpha)


class V(Prediction):
    """F = α·ε − σ·x0 (Salimans & Ho 2022, appendix D)."""

    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """(−σ, α)."""
        return -c.sigma, c.alpha


class Score(Prediction):
    """F = ∇ ln p(x_t) = −ε/σ (Song et al. 2021, eq. 7)."""

    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """(0, −1/σ)."""
        return torch.zeros_like(c.sigma), -1 / c.sigma


class EDM(Prediction):
    """The preconditioned network of EDM, on any path: input and target have unit variance, errors are not amplified.

    With V = α²·σ_d² + σ² (the variance of x_t): c_in = 1/√V, and x0 = c_skip·x_t + c_out·F with c_skip = α·σ_d²/V and
    c_out = σ·σ_d/√V, so that F = (σ·x0 − α·σ_d²·ε)/(σ_d·√V). On α = 1 these are eq. 7 and table 1.

    Args:
        sigma_data: standard deviation σ_d of the data; 0.5 for images in [−1, 1]. Positive.

    Source: Karras et al. 2022, eq. 7 and appendix B.6.
    """

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        if not 1e-6 <= sigma_data <= 1e6:
            raise ValueError(f"sigma_data={sigma_data}: must be positive, from 1e-6 to 1e6")
        self.sigma_data = sigma_data

    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """(σ/(σ_d·√V), −α·σ_d/√V)."""
        c_in = self.c_in(c)
        return c.sigma * c_in / self.sigma_data, -c.alpha * self.sigma_data * c_in

    def c_in(self, c: Coefficients) -> Time:
        """1/√V."""
        return (c.alpha.square() * self.sigma_data**2 + c.sigma.square()).rsqrt()

    def c_noise(self, path: Path, t: Time) -> Time:
        """ln(σ/α)/4, which is −λ/8."""
        return -path.log_snr(t) / 8


class Velocity(Prediction):
    """F = dx_t/dt = α̇·x0 + σ̇·ε (Lipman et al. 2023, eq. 9; Liu et al. 2022, eq. 1)."""

    def ab(self, c: Coefficients) -> tuple[Time, Time]:
        """(α̇, σ̇)."""
        return c.d_alpha, c.d_sigma


def check_legal(path: Path, prediction: Prediction, bound: float = 1e5) -> None:
    """Refuse a prediction from which x0 or ε cannot be read somewhere on the path.

    Raises:
        ValueError: if max(α, σ)/|det| exceeds `bound`, or the network's time input is infinite, anywhere on [t_min, t_max].
    """
    t = torch.linspace(path.t_min, path.t_max, 1025, dtype=torch.float64, device="cpu")
    pair = prediction.pair(path, t)
    gain = torch.maximum(pair.alpha, pair.sigma) / pair.det.abs()
    legal = (gain <= bound) & prediction.c_noise(path, t).isfinite()
    if not bool(legal.all()):
        at = float(t[(~legal).nonzero()[0]])
        raise ValueError(
            f"prediction={prediction.name}: x0 and noise cannot be read from it on {type(path).__name__} at t={at:g}; "
            "choose another prediction or narrow the path, for example objective.path.t_max=0.999"
        )
