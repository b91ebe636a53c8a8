"""Paths made from a path."""

from __future__ import annotations

import math

import torch

from denoiselab.diffusion.paths.base import Coefficients, Path, Time


class _Wrapper(Path):
    """A path made from another one, by default on its range."""

    def __init__(self, *, path: Path, t_min: float | None = None, t_max: float | None = None) -> None:
        self.path = path
        self.lowest, self.highest, self.even = path.lowest, path.highest, path.even
        super().__init__(t_min=path.t_min if t_min is None else t_min, t_max=path.t_max if t_max is None else t_max)


class Shifted(_Wrapper):
    """The base, with its noise level σ/α multiplied by `shift` at every time: λ(t) = λ_base(t) − 2·ln shift.

    It has the base's coefficients and c_noise at τ(t) = λ_base⁻¹(λ(t)). The base's own w = σ̇α − α̇σ gives dλ/dt = −2w/(ασ), so
    τ̇ = λ̇(t)/λ̇(τ) = w(t)/w(τ)·α(τ)σ(τ)/(α(t)σ(t)), and with α(τ)/α(t) = σ(τ)/(shift·σ(t)), also finite where α = 0,

        τ̇ = w(t)/w(τ)·σ(τ)²/(shift·σ(t)²).

    On rectified flow this is SD3's timestep shift, τ = shift·t/(1 + (shift − 1)·t) (Esser et al. 2024, eq. 23); on variance
    preserving paths the shifted schedule of simple diffusion, shift = side/64 (Hoogeboom et al. 2023).

    Args:
        path: the base.
        shift: factor on σ/α, positive; above 1 is noisier.
        t_min: data end; None is the base's.
        t_max: noise end; None is the base's.
    """

    def __init__(self, *, path: Path, shift: float, t_min: float | None = None, t_max: float | None = None) -> None:
        super().__init__(path=path, t_min=t_min, t_max=t_max)
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}: must be positive")
        self.shift = shift

    def _tau(self, t: Time) -> Time:
        return self.path.t_of_log_snr(self.log_snr(t))

    def coefficients(self, t: Time) -> Coefficients:
        """The base's α, σ, α̇·τ̇ and σ̇·τ̇ at τ."""
        here, there = self.path.coefficients(t), self.path.coefficients(self._tau(t))
        w_here, w_there = (c.d_sigma * c.alpha - c.d_alpha * c.sigma for c in (here, there))
        d_tau = w_here / w_there * (there.sigma / here.sigma) ** 2 / self.shift
        return Coefficients(there.alpha, there.sigma, there.d_alpha * d_tau, there.d_sigma * d_tau)

    def log_snr(self, t: Time) -> Time:
        """λ_base(t) − 2·ln shift."""
        return self.path.log_snr(t) - 2 * math.log(self.shift)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """The base's time of λ + 2·ln shift."""
        return self.path.t_of_log_snr(log_snr + 2 * math.log(self.shift))

    def c_noise(self, t: Time) -> Time:
        """The base's, at τ."""
        return self.path.c_noise(self._tau(t))


def resolution_shifted(
    *,
    path: Path,
    resolution: int | list[int],
    base_resolution: int,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Shifted:
    """The path of one resolution, shifted to another by √(pixels/base pixels): twice the side, twice the noise level.

    Args:
        path: the base, good for images of side `base_resolution`.
        resolution: side of the images, or their height and width.
        base_resolution: a side.
        t_min: data end; None is the base's.
        t_max: noise end; None is the base's.
    """
    pixels = math.prod(resolution) if isinstance(resolution, list) else resolution**2
    if pixels < 1:
        raise ValueError(f"resolution={resolution}: must be at least 1")
    if base_resolution < 1:
        raise ValueError(f"base_resolution={base_resolution}: must be at least 1")
    return Shifted(path=path, shift=math.sqrt(pixels) / base_resolution, t_min=t_min, t_max=t_max)


class ZeroTerminalSNR(_Wrapper):
    """A variance preserving base, its α moved and scaled so that its last point T is pure noise and its first stays.

    With α₁ and α_T the base's at its t_min and t_max, α' = (α − α_T)·α₁/(α₁ − α_T). Then α − α' = α_T·(α₁ − α')/α₁, so that
    σ'² = σ² + (α − α')(α + α') does not cancel, neither forth nor back.

    Args:
        path: the base, with α² + σ² = 1.
        t_min: data end; None is the base's.
        t_max: noise end, at most the base's; None is the base's.

    Source: Lin et al. 2023, algorithm 1.
    """

    def __init__(self, *, path: Path, t_min: float | None = None, t_max: float | None = None) -> None:
        super().__init__(path=path, t_min=t_min, t_max=t_max)
        self.highest = path.t_max  # beyond it α' would be negative
        if self.t_max > self.highest:
            raise ValueError(f"t_max={t_max}: must be at most the base's, {path.t_max}")
        ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64, device="cpu")
        alpha, sigma = path.alpha(ends), path.sigma(ends)
        if not torch.allclose(alpha**2 + sigma**2, torch.ones_like(ends), rtol=0, atol=1e-9):
            raise ValueError(f"path={type(path).__name__}: must be variance preserving")
        self.first, self.last = alpha.tolist()
        self.factor = self.first / (self.first - self.last)

    def coefficients(self, t: Time) -> Coefficients:
        """α' and σ' as above; σ̇' = −α'·α̇'/σ'."""
        base = self.path.coefficients(t)
        alpha = ((base.alpha - self.last) * self.factor).clamp(min=0)
        sigma = (base.sigma**2 + self._less(alpha) * (base.alpha + alpha)).sqrt()
        d_alpha = base.d_alpha * self.factor
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """The base's time of α = α' + (α − α') and σ² = σ'² − (α − α')(α + α')."""
        alpha = torch.sigmoid(log_snr).sqrt()
        less = self._less(alpha)
        variance = torch.sigmoid(-log_snr) - less * (2 * alpha + less)
        t = self.path.t_of_log_snr(2 * (alpha + less).log() - variance.log())
        return torch.where(alpha > 0, t, self.path.t_max)  # pure noise to the last digit

    def c_noise(self, t: Time) -> Time:
        """The base's."""
        return self.path.c_noise(t)

    def _less(self, alpha: Time) -> Time:
        """α − α', from α'."""
        return (self.first - alpha) * (self.last / self.first)
