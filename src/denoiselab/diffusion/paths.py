"""Gaussian paths from data to noise: x_t = α(t)·x0 + σ(t)·ε.

A path owns α, σ, their derivatives in its own time t, the log-SNR λ(t) = ln(α²/σ²) and its inverse. t runs from `t_min`
(data end, σ > 0) to `t_max` (noise end). Everything is evaluated in the type of t; callers pass float64 and round the
result, because 1 − ᾱ near the data end has no digits left in float32.

Variance preserving paths (α² + σ² = 1) follow from λ alone:

    α² = sigmoid(λ),  σ² = sigmoid(−λ),  α̇ = α·σ²·λ̇/2,  σ̇ = −σ·α²·λ̇/2

so `VariancePreserving` asks its subclasses for λ, λ̇ and the inverse of λ only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

Time = Float[Tensor, "*B"]


class Path(ABC):
    """A Gaussian path on [t_min, t_max].

    Args:
        t_min: data end; σ(t_min) > 0.
        t_max: noise end.

    Raises:
        ValueError: if not `lowest` ≤ t_min < t_max ≤ `highest`.
    """

    lowest: float = 1e-5
    highest: float = 1.0

    def __init__(self, *, t_min: float, t_max: float) -> None:
        if not self.lowest <= t_min < t_max:
            raise ValueError(f"t_min={t_min}: must be at least {self.lowest} and below t_max={t_max}")
        if not t_max <= self.highest:
            raise ValueError(f"t_max={t_max}: must be at most {self.highest}")
        self.t_min, self.t_max = float(t_min), float(t_max)

    @abstractmethod
    def alpha(self, t: Time) -> Time:
        """Signal coefficient α(t)."""

    @abstractmethod
    def sigma(self, t: Time) -> Time:
        """Noise coefficient σ(t)."""

    @abstractmethod
    def d_alpha(self, t: Time) -> Time:
        """dα/dt."""

    @abstractmethod
    def d_sigma(self, t: Time) -> Time:
        """dσ/dt."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Time) -> Time:
        """The inverse of `log_snr`, without clamping to [t_min, t_max]."""

    def log_snr(self, t: Time) -> Time:
        """λ(t) = ln(α²/σ²); −∞ where α = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def c_noise(self, t: Time) -> Time:
        """What the network is told about t, unless the prediction says otherwise: 1000·t."""
        return 1000 * t


class VariancePreserving(Path):
    """A path with α² + σ² = 1, given by its log-SNR."""

    @abstractmethod
    def log_snr(self, t: Time) -> Time:
        """λ(t)."""

    @abstractmethod
    def d_log_snr(self, t: Time) -> Time:
        """dλ/dt."""

    def alpha(self, t: Time) -> Time:
        """α = √sigmoid(λ)."""
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Time) -> Time:
        """σ = √sigmoid(−λ)."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def d_alpha(self, t: Time) -> Time:
        """dα/dt = α·σ²·λ̇/2."""
        log_snr = self.log_snr(t)
        return torch.sigmoid(log_snr).sqrt() * torch.sigmoid(-log_snr) * self.d_log_snr(t) / 2

    def d_sigma(self, t: Time) -> Time:
        """dσ/dt = −σ·α²·λ̇/2."""
        log_snr = self.log_snr(t)
        return -torch.sigmoid(-log_snr).sqrt() * torch.sigmoid(log_snr) * self.d_log_snr(t) / 2


class DDPMLinear(VariancePreserving):
    """DDPM's linear betas, exact at t = (i + 1)/1000 and smooth between.

    ᾱ_i = Π_{j ≤ i} (1 − β_j) with β from `beta_min` to `beta_max` in T = 1000 steps; λ(t) is the not-a-knot cubic spline
    through the thousand points (a piecewise-linear one would destroy second-order convergence). Below the first point
    there is no data: t_min ≥ 1/1000. c_noise is DDPM's step number i = 1000·t − 1.

    Args:
        beta_min: first β, in (0, beta_max).
        beta_max: last β, below 1.
        t_min: data end, at least 0.001.
        t_max: noise end, at most 1.

    Source: Ho, Jain & Abbeel 2020, section 4.
    """

    steps = 1000
    lowest = 1e-3

    def __init__(
        self, *, beta_min: float = 1e-4, beta_max: float = 0.02, t_min: float = 1e-3, t_max: float = 1.0
    ) -> None:
        super().__init__(t_min=t_min, t_max=t_max)
        if not 0 < beta_min < beta_max < 1:
            raise ValueError(f"beta_min={beta_min}: needs 0 < beta_min < beta_max={beta_max} < 1")
        # On the CPU by name, also while configs are checked under `torch.device("meta")`.
        betas = torch.linspace(beta_min, beta_max, self.steps, dtype=torch.float64, device="cpu")
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        self._knots = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        self._slopes = _spline_slopes(self._knots)
        self._tables = {self._knots.device: (self._knots, self._slopes)}

    def _piece(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Place within the interval, in [0, 1] (beyond at the ends), and the Hermite data of its two knots."""
        if t.device not in self._tables:
            self._tables[t.device] = (self._knots.to(t.device), self._slopes.to(t.device))
        knots, slopes = self._tables[t.device]
        position = t * self.steps - 1
        i = position.floor().clamp(0, self.steps - 2).long()
        return position - i, knots[i], knots[i + 1], slopes[i], slopes[i + 1]

    def log_snr(self, t: Time) -> Time:
        """The cubic through the two neighbouring points, in Hermite form."""
        u, y0, y1, m0, m1 = self._piece(t)
        rise = y1 - y0
        return (y0 + u * (m0 + u * (3 * rise - 2 * m0 - m1 + u * (m0 + m1 - 2 * rise)))).to(t.dtype)

    def d_log_snr(self, t: Time) -> Time:
        """The derivative of that cubic."""
        u, y0, y1, m0, m1 = self._piece(t)
        rise = y1 - y0
        slope = m0 + u * (2 * (3 * rise - 2 * m0 - m1) + u * 3 * (m0 + m1 - 2 * rise))
        return (slope * self.steps).to(t.dtype)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """Safeguarded Newton inside the interval that holds the value (λ falls with t)."""
        value = log_snr.double()
        knots = self._knots.to(value.device)
        i = (torch.searchsorted(-knots, -value).clamp(1, self.steps - 1) - 1).double()
        low, high = (i + 1) / self.steps, (i + 2) / self.steps
        t = (low + high) / 2
        for _ in range(60):
            error = self.log_snr(t) - value
            low, high = torch.where(error > 0, t, low), torch.where(error > 0, high, t)
            newton = t - error / self.d_log_snr(t)
            t = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        return t.to(log_snr.dtype)

    def c_noise(self, t: Time) -> Time:
        """DDPM's step number, 0 to 999."""
        return 1000 * t - 1


def _spline_slopes(y: Tensor) -> Tensor:
    """Slopes at the knots (unit spacing) of the not-a-knot cubic spline through y.

    Continuity of the second derivative at inner knots: m[i−1] + 4·m[i] + m[i+1] = 3·(y[i+1] − y[i−1]); of the third at
    the first and last inner knots: m[0] + 2·m[1] = (5·(y[1]−y[0]) + (y[2]−y[1]))/2, and mirrored.
    Source: de Boor 1978, chapter IV.
    """
    n = len(y)
    matrix = 4 * torch.eye(n, dtype=y.dtype, device=y.device)
    matrix.diagonal(1).fill_(1)
    matrix.diagonal(-1).fill_(1)
    matrix[0, :2] = torch.tensor([1.0, 2.0], dtype=y.dtype, device=y.device)
    matrix[-1, -2:] = torch.tensor([2.0, 1.0], dtype=y.dtype, device=y.device)
    rise = y.diff()
    right = torch.empty_like(y)
    right[1:-1] = 3 * (rise[1:] + rise[:-1])
    right[0] = (5 * rise[0] + rise[1]) / 2
    right[-1] = (5 * rise[-1] + rise[-2]) / 2
    return torch.linalg.solve(matrix, right)


class Cosine(VariancePreserving):
    """The cosine path in continuous time: ᾱ(t) = cos²(u)/cos²(u₀), u = (t + s)/(1 + s)·π/2, u₀ = u(0).

    With σ² = 1 − ᾱ = sin(u − u₀)·sin(u + u₀)/cos²u₀ there is no cancellation at the data end. α(1) = 0, where ε can no
    longer be read from x0: t_max is 0.999, as Nichol & Dhariwal clip β at 0.999.

    Args:
        s: offset, positive; 0.008 makes √β₀ a little smaller than a pixel's bin of 1/127.5.
        t_min: data end.
        t_max: noise end, below 1.

    Source: Nichol & Dhariwal 2021, eq. 17.
    """

    def __init__(self, *, s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        super().__init__(t_min=t_min, t_max=t_max)
        if not s > 0:
            raise ValueError(f"s={s}: must be positive")
        self.s = s
        self.u0 = s / (1 + s) * math.pi / 2

    def _u(self, t: Time) -> Time:
        return self.u0 + t * (math.pi / 2 / (1 + self.s))

    def log_snr(self, t: Time) -> Time:
        """λ = ln cos²u − ln(sin(u − u₀)·sin(u + u₀))."""
        u = self._u(t)
        return 2 * u.cos().clamp(min=0).log() - (u - self.u0).sin().log() - (u + self.u0).sin().log()

    def d_log_snr(self, t: Time) -> Time:
        """dλ/dt = −u̇·(2·tan u + cot(u − u₀) + cot(u + u₀))."""
        u = self._u(t)
        slope = 2 * u.tan() + 1 / (u - self.u0).tan() + 1 / (u + self.u0).tan()
        return -slope * (math.pi / 2 / (1 + self.s))

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """From cos u = α·cos u₀ and sin²u = sin²u₀ + σ²·cos²u₀: atan2 is accurate at both ends."""
        cos0 = math.cos(self.u0)
        cos = torch.sigmoid(log_snr).sqrt() * cos0
        sin = (math.sin(self.u0) ** 2 + torch.sigmoid(-log_snr) * cos0**2).sqrt()
        return (torch.atan2(sin, cos) - self.u0) * ((1 + self.s) / (math.pi / 2))


class RectifiedFlow(Path):
    """The straight path α = 1 − t, σ = t.

    Args:
        t_min: data end.
        t_max: noise end, at most 1 (pure noise).

    Source: Liu et al. 2022, eq. 1; Lipman et al. 2023, eq. 20 with σ_min = 0 (their t runs the other way).
    """

    def __init__(self, *, t_min: float = 1e-3, t_max: float = 1.0) -> None:
        super().__init__(t_min=t_min, t_max=t_max)

    def alpha(self, t: Time) -> Time:
        """α = 1 − t."""
        return 1 - t

    def sigma(self, t: Time) -> Time:
        """σ = t."""
        return t

    def d_alpha(self, t: Time) -> Time:
        """α̇ = −1."""
        return -torch.ones_like(t)

    def d_sigma(self, t: Time) -> Time:
        """σ̇ = 1."""
        return torch.ones_like(t)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """T = sigmoid(−λ/2)."""
        return torch.sigmoid(-log_snr / 2)
