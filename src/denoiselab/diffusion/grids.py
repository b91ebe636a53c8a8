"""At which times a sampler asks the denoiser: n decreasing times; the clean end is added by the sampler.

The Euler and Heun steps in σ/α amplify the network's error by the ratio of neighbouring noise levels: on paths that reach
very large ones (cosine: 640) a second-order sampler wants `Karras`, whose ratios are moderate, not `Uniform`.
"""

from __future__ import annotations

import math
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
    """Times placed by their noise level σ/α, from the largest to the smallest, both included.

    Args:
        sigma_min: smallest σ/α; None, or one that the path does not reach, is the path's own.
        sigma_max: largest σ/α; None, or one that the path does not reach, is the path's own.
    """

    def __init__(self, *, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be positive, or null")
        if sigma_min is not None and sigma_max is not None and not sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min}: must be below sigma_max={sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, path: Path, n: int) -> Time:
        """The times.

        Raises:
            ValueError: if the path ends in pure noise, whose level is infinite, and no `sigma_max` is given.
        """
        first, last = path.log_snr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
        if self.sigma_max is not None:
            first = first.clamp(min=-2 * math.log(self.sigma_max))
        if self.sigma_min is not None:
            last = last.clamp(max=-2 * math.log(self.sigma_min))
        if not bool(first.isfinite()):
            raise ValueError(
                f"grid={type(self).__name__}: needs a largest noise level on a path that ends in pure noise; set "
                "sampler.grid.sigma_max=80, or use sampler/grid=uniform"
            )
        fractions = torch.linspace(0, 1, n, dtype=torch.float64)
        t = path.t_of_log_snr(self.log_snr(first, last, fractions))
        return t.clamp(path.t_min, path.t_max)  # the ends to the last digit

    @abstractmethod
    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """The log-SNR at fractions 0 to 1 of the way."""


class LogSNR(_NoiseLevels):
    """Equal steps in log-SNR (Lu et al. 2022, section 3.4).

    Args:
        sigma_min: smallest σ/α; None is the path's own.
        sigma_max: largest σ/α; None is the path's own.
    """

    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """Linear."""
        return first + fractions * (last - first)


class Karras(_NoiseLevels):
    """Equal steps in (σ/α)^(1/ρ).

    Args:
        rho: 7 in the paper; larger means shorter steps near the data.
        sigma_min: smallest σ/α, 0.002 in the paper; None is the path's own.
        sigma_max: largest σ/α, 80 in the paper; None is the path's own.

    Source: Karras et al. 2022, eq. 5 and table 1.
    """

    def __init__(self, *, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        super().__init__(sigma_min=sigma_min, sigma_max=sigma_max)
        if not rho >= 1:
            raise ValueError(f"rho={rho}: must be at least 1")
        self.rho = rho

    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """σ/α = e^(−λ/2), so its ρ-th root is e^(−λ/2ρ)."""
        roots = [torch.exp(-end / (2 * self.rho)) for end in (first, last)]
        return -2 * self.rho * torch.log(roots[0] + fractions * (roots[1] - roots[0]))
