"""Paths in closed form."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from denoiselab.diffusion.paths.base import Coefficients, Path, Time, VariancePreserving


class VPLinear(VariancePreserving):
    """DDPM's betas in continuous time: ᾱ(t) = exp(−B), B = β_min·t + (β_max − β_min)·t²/2, so λ = −ln(e^B − 1).

    c_noise is 999·t, as its authors' networks were told.

    Args:
        beta_min: β(0), positive.
        beta_max: β(1), above beta_min.

    Source: Song et al. 2021, appendix C; Karras et al. 2022, table 1, for c_noise.
    """

    def __init__(
        self, *, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3, t_max: float = 1.0
    ) -> None:
        super().__init__(t_min=t_min, t_max=t_max)
        if not 0 < beta_min < beta_max < math.inf:
            raise ValueError(f"beta_min={beta_min}: needs 0 < beta_min < beta_max={beta_max} < inf")
        self.beta_min, self.rise = beta_min, beta_max - beta_min

    def _integral(self, t: Time) -> Time:
        return t * (self.beta_min + self.rise / 2 * t)

    def log_snr(self, t: Time) -> Time:
        """λ = −ln expm1(B)."""
        return -torch.expm1(self._integral(t)).log()

    def d_log_snr(self, t: Time) -> Time:
        """dλ/dt = −β/(1 − e^−B)."""
        return (self.beta_min + self.rise * t) / torch.expm1(-self._integral(t))

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """The positive root of B(t) = −ln sigmoid(λ), in the form that does not cancel."""
        integral = -logsigmoid(log_snr)
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * self.rise * integral).sqrt())

    def c_noise(self, t: Time) -> Time:
        """999·t."""
        return 999 * t


class Cosine(VariancePreserving):
    """The cosine path in continuous time: ᾱ(t) = cos²(u)/cos²(u₀), u = (t + s)/(1 + s)·π/2, u₀ = u(0).

    With σ² = 1 − ᾱ = sin(u − u₀)·sin(u + u₀)/cos²u₀ there is no cancellation at the data end. α(1) = 0, where ε can no
    longer be read from x0: t_max is 0.999, as Nichol & Dhariwal clip β at 0.999.

    Args:
        s: offset, positive; 0.008 makes √β₀ a little smaller than a pixel's bin of 1/127.5.

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


class Sigmoid(VariancePreserving):
    """ᾱ falls as a piece of a sigmoid: ᾱ(t) = (s(e) − s(u))/(s(e) − s(b)), u = b + t·(e − b), b = start/τ, e = end/τ.

    With s(p) − s(q) = sinh((p − q)/2)/(2·cosh(p/2)·cosh(q/2)) and h = (e − b)/2,

        ᾱ/(1 − ᾱ) = c·sinh((1 − t)·h)/sinh(t·h),  c = cosh(b/2)/cosh(e/2).

    Args:
        start: where on the sigmoid it begins.
        end: where it ends, above start.
        tau: temperature τ, positive; (end − start)/τ is at most 100.
        t_max: noise end, at most 0.99999 (λ̇ is infinite at 1).

    Source: Jabri, Fleet & Chen 2022.
    """

    highest = 0.99999

    def __init__(
        self, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0, t_min: float = 1e-3, t_max: float = 0.999
    ) -> None:
        super().__init__(t_min=t_min, t_max=t_max)
        if not start < end:
            raise ValueError(f"start={start}: must be below end={end}")
        if not 0 < (end - start) <= 100 * tau:
            raise ValueError(f"tau={tau}: must be positive and at least (end - start)/100")
        self.h = (end - start) / tau / 2
        self.c = math.cosh(start / tau / 2) / math.cosh(end / tau / 2)

    def log_snr(self, t: Time) -> Time:
        """λ = ln c + ln sinh((1 − t)·h) − ln sinh(t·h)."""
        return math.log(self.c) + ((1 - t) * self.h).sinh().log() - (t * self.h).sinh().log()

    def d_log_snr(self, t: Time) -> Time:
        """dλ/dt = −h·(coth((1 − t)·h) + coth(t·h))."""
        return -self.h * (1 / ((1 - t) * self.h).tanh() + 1 / (t * self.h).tanh())

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """From e^(2th) = (R + e^h)/(R + e^−h) with R = e^λ/c."""
        ratio = log_snr.exp() / self.c
        return torch.log1p(2 * math.sinh(self.h) / (ratio + math.exp(-self.h))) / (2 * self.h)


class Laplace(VariancePreserving):
    """Uniform times give Laplace-distributed log-SNRs: λ = μ − b·sgn(½ − t)·ln(1 − 2·|t − ½|).

    Most of [0, 1] is spent near μ, and the clean and noisy ends lie within 1e-9 and 1e-7 of 0 and 1: sample on a grid of
    noise levels (`log_snr`, `karras`), not on uniform times.

    Args:
        mu: centre of the log-SNR.
        b: its scale, positive.
        t_max: noise end, at most 1 − 1e-9.

    Source: Hang et al. 2024.
    """

    lowest = 1e-15
    highest = 1 - 1e-9

    even = False

    def __init__(self, *, mu: float = 0.0, b: float = 0.5, t_min: float = 1e-9, t_max: float = 1 - 1e-7) -> None:
        super().__init__(t_min=t_min, t_max=t_max)
        if not b > 0:
            raise ValueError(f"b={b}: must be positive")
        self.mu, self.b = mu, b

    def log_snr(self, t: Time) -> Time:
        """λ = μ − b·ln 2t, or μ + b·ln 2(1 − t) above ½."""
        return self.mu + self.b * torch.where(t < 0.5, -(2 * t).log(), (2 - 2 * t).log())

    def d_log_snr(self, t: Time) -> Time:
        """dλ/dt = −b/min(t, 1 − t)."""
        return -self.b / torch.minimum(t, 1 - t)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """The upper tail of the Laplace distribution."""
        z = (log_snr - self.mu) / self.b
        tail = torch.exp(-z.abs()) / 2
        return torch.where(z > 0, tail, 1 - tail)


class Trigonometric(Path):
    """The quarter circle α = cos(πt/2), σ = sin(πt/2), from image to pure noise.

    GVP of SiT (Ma et al. 2024), and TrigFlow of sCM (Lu & Song 2024) with its time divided by π/2.
    """

    def coefficients(self, t: Time) -> Coefficients:
        """α as the sine of what is left, so that α(1) is 0; α̇ = −π/2·σ, σ̇ = π/2·α."""
        alpha, sigma = (math.pi / 2 * (1 - t)).sin(), (math.pi / 2 * t).sin()
        return Coefficients(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """From tan(πt/2) = e^(−λ/2)."""
        return 2 / math.pi * torch.exp(-log_snr / 2).atan()


class RectifiedFlow(Path):
    """The straight path α = 1 − t, σ = t, from image to pure noise.

    Source: Liu et al. 2022, eq. 1; Lipman et al. 2023, eq. 20 with σ_min = 0 (their t runs the other way).
    """

    def coefficients(self, t: Time) -> Coefficients:
        """1 − t, t, −1, 1."""
        return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """T = sigmoid(−λ/2)."""
        return torch.sigmoid(-log_snr / 2)


class VarianceExploding(Path):
    """Noise is added to an unscaled image, and time is its level: α = 1, σ = t. c_noise is ln(σ/2).

    Args:
        t_min: smallest noise level.
        t_max: largest noise level, at most 10,000.

    Source: Song et al. 2021, section 3.4; Karras et al. 2022: σ(t) = t from 0.002 to 80, and table 1 (c_noise of VE).
    """

    highest = 1e4
    even = False

    def __init__(self, *, t_min: float = 0.002, t_max: float = 80.0) -> None:
        super().__init__(t_min=t_min, t_max=t_max)

    def coefficients(self, t: Time) -> Coefficients:
        """1, t, 0, 1."""
        return Coefficients(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """T = e^(−λ/2)."""
        return torch.exp(-log_snr / 2)

    def c_noise(self, t: Time) -> Time:
        """ln(σ/2)."""
        return (t / 2).log()
