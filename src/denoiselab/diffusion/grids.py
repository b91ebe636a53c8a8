"""At which times a sampler asks the denoiser: n decreasing times from t_max on; the clean end is added by the sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from denoiselab.diffusion.paths import Path, Time


class Grid(ABC):
    """A rule that places n times on a path."""

    @abstractmethod
    def __call__(self, path: Path, n: int) -> Time:
        """N ≥ 1 decreasing times in [t_min, t_max], the first one t_max, float64 of shape (n,)."""


class Uniform(Grid):
    """Equal steps in t down to the clean end: t_max·(1 − i/n). On DDPM's path, diffusers' "trailing" spacing."""

    def __call__(self, path: Path, n: int) -> Time:
        """The times.

        Raises:
            ValueError: if the last one would lie below t_min.
        """
        if path.t_max / n < path.t_min * (1 - 1e-9):
            raise ValueError(
                f"steps={n}: at most {int(path.t_max / path.t_min + 1e-9)} uniform steps fit above t_min={path.t_min}"
            )
        return path.t_max * (1 - torch.arange(n, dtype=torch.float64) / n)


class _NoiseLevels(Grid):
    """Times between t_max and t_min, both included, placed by their noise level."""

    def __call__(self, path: Path, n: int) -> Time:
        """The times.

        Raises:
            ValueError: if the path ends in pure noise, whose level is infinite.
        """
        ends = path.log_snr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
        if not bool(ends.isfinite().all()):
            raise ValueError(
                f"grid={type(self).__name__}: needs a finite noise level at t_max={path.t_max}; "
                "narrow the path (objective.path.t_max=0.999) or use sampler/grid=uniform"
            )
        fractions = torch.linspace(0, 1, n, dtype=torch.float64)
        t = path.t_of_log_snr(self.log_snr(ends[0], ends[1], fractions))
        t[0] = path.t_max  # exactly, not to rounding
        if n > 1:
            t[-1] = path.t_min
        return t

    @abstractmethod
    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """The log-SNR at fractions 0 to 1 of the way."""


class LogSNR(_NoiseLevels):
    """Equal steps in log-SNR (Lu et al. 2022, section 3.4)."""

    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """Linear."""
        return first + fractions * (last - first)


class Karras(_NoiseLevels):
    """Equal steps in (σ/α)^(1/ρ).

    Args:
        rho: 7 in the paper; larger means shorter steps near the data.

    Source: Karras et al. 2022, eq. 5.
    """

    def __init__(self, *, rho: float = 7.0) -> None:
        if not rho >= 1:
            raise ValueError(f"rho={rho}: must be at least 1")
        self.rho = rho

    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """σ/α = e^(−λ/2), so its ρ-th root is e^(−λ/2ρ)."""
        roots = [torch.exp(-end / (2 * self.rho)) for end in (first, last)]
        return -2 * self.rho * torch.log(roots[0] + fractions * (roots[1] - roots[0]))
