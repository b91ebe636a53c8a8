"""Loss weights, stated in the space in which their paper states them and converted to the prediction's own.

The loss is w_F(t)·‖F − target‖²; with the factors of `prediction.py`, w_F = w_x0·(σ/det)² = w_ε·(α/det)².
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path, Time
from denoiselab.diffusion.prediction import Prediction

Space = Literal["prediction", "x0", "epsilon"]


class Weighting(nn.Module, ABC):
    """A loss weight; a module, so that what it has learned is trained and saved with the network."""

    @abstractmethod
    def forward(self, path: Path, prediction: Prediction, t: Time) -> Time:
        """The weight in the space of the prediction."""

    def loss(self, error: Float[Tensor, " B"], path: Path, prediction: Prediction, t: Time) -> Float[Tensor, " B"]:
        """The loss of each sample from the mean squared error of the network's output."""
        return self(path, prediction, t).to(error.dtype) * error


class FixedWeighting(Weighting):
    """A weight w(t) that is known beforehand, in one space. A subclass is one `weight`."""

    space: Space

    def forward(self, path: Path, prediction: Prediction, t: Time) -> Time:
        """The weight in the space of the prediction."""
        weight = self.weight(path, t)
        if self.space == "prediction":
            return weight
        pair = prediction.pair(path, t)
        return weight * ((pair.sigma if self.space == "x0" else pair.alpha) / pair.det).square()

    @abstractmethod
    def weight(self, path: Path, t: Time) -> Time:
        """The weight in `space`."""


class Unit(FixedWeighting):
    """Weight 1.

    Args:
        space: where it is 1: in the network's own output, or in the error of x0 or ε.
    """

    def __init__(self, *, space: Space = "prediction") -> None:
        super().__init__()
        self.space = space

    def weight(self, path: Path, t: Time) -> Time:
        """1."""
        return torch.ones_like(t)


class MinSNR(FixedWeighting):
    """min(SNR, γ) on the error of x0.

    Args:
        gamma: the cap, positive; 5 in the paper.

    Source: Hang et al. 2023, section 3.4.
    """

    space: Space = "x0"

    def __init__(self, *, gamma: float = 5.0) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"gamma={gamma}: must be positive")
        self.gamma = gamma

    def weight(self, path: Path, t: Time) -> Time:
        """min(α²/σ², γ)."""
        return path.log_snr(t).exp().clamp(max=self.gamma)


class SoftMinSNR(FixedWeighting):
    """SNR·γ/(SNR + γ) on the error of x0: min-SNR without its corner.

    Args:
        gamma: the limit at high SNR, positive; 4 in the paper, which is 1/σ_d².

    Source: Crowson et al. 2024, soft-min-SNR weighting.
    """

    space: Space = "x0"

    def __init__(self, *, gamma: float = 4.0) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"gamma={gamma}: must be positive")
        self.gamma = gamma

    def weight(self, path: Path, t: Time) -> Time:
        """1/(1/SNR + 1/γ)."""
        return 1 / ((-path.log_snr(t)).exp() + 1 / self.gamma)


class P2(FixedWeighting):
    """(k + SNR)^−γ on the error of ε: less weight on clean-up at high SNR.

    Args:
        k: positive; 1 in the paper.
        gamma: exponent, at least 0, where 0 is DDPM's simple loss; 0.5 and 1 in the paper.

    Source: Choi et al. 2022 (their λ'_t over λ_t, since λ_t·L_t is DDPM's simple loss).
    """

    space: Space = "epsilon"

    def __init__(self, *, k: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        if not k > 0:
            raise ValueError(f"k={k}: must be positive")
        if not gamma >= 0:
            raise ValueError(f"gamma={gamma}: must be at least 0")
        self.k, self.gamma = k, gamma

    def weight(self, path: Path, t: Time) -> Time:
        """(k + α²/σ²)^−γ."""
        return (self.k + path.log_snr(t).exp()) ** -self.gamma


class Sigmoid(FixedWeighting):
    """The weighted variational bound with w(λ) = sigmoid(bias − λ), where times are uniform.

    It is ½·w(λ)·(−dλ/dt)·‖ε − ε̂‖². With −dλ/dt = 2·(σ̇·α − α̇·σ)/(α·σ) and ‖ε − ε̂‖² = (α/σ)²·‖x0 − x̂0‖² this is
    w·(σ̇·α − α̇·σ)·α/σ³ on the error of x0, which has no 0·∞ at pure noise.

    Args:
        bias: log-SNR at which w falls to ½. Larger puts more weight on high SNR.

    Source: Kingma & Gao 2023, section 2 (the weighted loss); Hoogeboom et al. 2024 (sigmoid loss).
    """

    space: Space = "x0"

    def __init__(self, *, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = bias

    def weight(self, path: Path, t: Time) -> Time:
        """sigmoid(bias − λ)·(σ̇·α − α̇·σ)·α/σ³."""
        c = path.coefficients(t)
        speed = c.d_sigma * c.alpha - c.d_alpha * c.sigma
        return torch.sigmoid(self.bias - path.log_snr(t)) * speed * c.alpha / c.sigma**3


class EDMWeight(FixedWeighting):
    """(ρ² + σ_d²)/(ρ·σ_d)² with ρ = σ/α on the error of x0; 1 on the output of a network that predicts `EDM`.

    Args:
        sigma_data: standard deviation σ_d of the data, positive; the prediction's.

    Source: Karras et al. 2022, table 1 (λ) and section 5.
    """

    space: Space = "x0"

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 1e-6 <= sigma_data <= 1e6:
            raise ValueError(f"sigma_data={sigma_data}: must be positive, from 1e-6 to 1e6")
        self.sigma_data = sigma_data

    def weight(self, path: Path, t: Time) -> Time:
        """SNR + 1/σ_d²."""
        return path.log_snr(t).exp() + 1 / self.sigma_data**2


class LearnedUncertainty(Weighting):
    """Another weighting's loss L divided by what is learned to be its expectation at each noise level: L/e^u + u.

    At the optimum u = ln E[L], so that all noise levels pull equally. u is linear in Fourier features of unit magnitude of
    EDM's c_noise = ln(σ/α)/4 (on every path); it starts at 0, where the loss is L. It is trained with the network.

    Args:
        over: the weighting whose loss is divided.
        channels: Fourier features, from 1 to 65536.

    Source: Karras et al. 2024, eq. 21.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, *, over: Weighting, channels: int = 128) -> None:
        super().__init__()
        if not 1 <= channels <= 65536:
            raise ValueError(f"channels={channels}: must be from 1 to 65536")
        self.over = over
        noise = NoiseSource(seed=0, index=torch.arange(channels))
        self.register_buffer("frequency", 2 * math.pi * noise.normal("fourier frequency", ()))
        self.register_buffer("phase", 2 * math.pi * noise.uniform("fourier phase").float())
        self.linear = nn.Parameter(torch.zeros(channels))

    def forward(self, path: Path, prediction: Prediction, t: Time) -> Time:
        """The other's weight divided by e^u."""
        return self.over(path, prediction, t) / self.log_uncertainty(path, t).exp()

    def loss(self, error: Float[Tensor, " B"], path: Path, prediction: Prediction, t: Time) -> Float[Tensor, " B"]:
        """L/e^u + u."""
        return super().loss(error, path, prediction, t) + self.log_uncertainty(path, t).to(error.dtype)

    def log_uncertainty(self, path: Path, t: Time) -> Float[Tensor, " B"]:
        """The u of each time, float32."""
        c_noise = (-path.log_snr(t) / 8).clamp(-5, 5).float()  # infinite at pure noise
        features = math.sqrt(2) * torch.cos(c_noise[:, None] * self.frequency + self.phase)  # (B, channels)
        # A sum, not a matrix product, which mixed precision would round to three digits.
        return (features * self.linear).sum(1) / math.sqrt(len(self.linear))
