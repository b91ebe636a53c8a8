"""At which times a sampler asks the denoiser: n decreasing times; the clean end is added by the sampler.

A grid is given in the path's time (`Uniform`, `Linspace`, `Leading`, `Quadratic`, `Beta`), in the noise level σ/α, which means
the same on every path (`LogSNR`, `Karras`, `Cosine`), as a list (`Explicit`), or over another grid (`Shifted`).

The Euler and Heun steps in σ/α amplify the network's error by the ratio of neighbouring noise levels: on paths that reach
very large ones (cosine: 640) a second-order sampler wants `Karras`, whose ratios are moderate, not `Uniform`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from itertools import pairwise

import torch

from denoiselab.diffusion.paths import Path, Time


class Grid(ABC):
    """A rule that places n times on a path. A subclass is one `times`."""

    in_time: bool = False  # whether its steps are equal in t, whatever the noise levels are

    def __call__(self, path: Path, n: int) -> Time:
        """N ≥ 1 decreasing times in [t_min, t_max], float64 of shape (n,); the first is t_max unless the class says otherwise.

        Raises:
            ValueError: if the grid cannot place so many on the path, or would waste nearly all of them in the noise.
        """
        if self.in_time and not path.even:
            raise ValueError(
                f"grid={type(self).__name__}: on {type(path).__name__} equal steps in t jump over nearly all noise levels "
                "that matter; use sampler/grid=karras, or a sampler that has it, such as sampler=heun"
            )
        t = self.times(path, n).clamp(path.t_min, path.t_max)  # the ends to the last digit
        if not bool((t.diff() < 0).all()):
            raise ValueError(
                f"steps={n}: some times of the grid {type(self).__name__} coincide on {type(path).__name__}; take fewer "
                "steps, or noise levels that the path reaches"
            )
        return t

    @abstractmethod
    def times(self, path: Path, n: int) -> Time:
        """The times, which may lie outside the path by rounding."""


class Uniform(Grid):
    """Equal steps in t down to the clean end: t_max·(1 − i/n).

    On DDPM's paths this is the "trailing" spacing of Lin et al. 2023, table 2, without its rounding to whole steps where n
    does not divide 1000.
    """

    in_time = True

    def times(self, path: Path, n: int) -> Time:
        """The times.

        Raises:
            ValueError: if the last one would lie below t_min.
        """
        if path.t_max / n < path.t_min * (1 - 1e-9):
            raise ValueError(
                f"steps={n}: at most {int(path.t_max / path.t_min + 1e-9)} uniform steps fit above t_min={path.t_min}"
            )
        return path.t_max * (1 - torch.arange(n, dtype=torch.float64) / n)


class _Fractions(Grid):
    """Times at given fractions of the way from t_min to t_max."""

    def times(self, path: Path, n: int) -> Time:
        """t_min + (t_max − t_min)·fraction."""
        return path.t_min + (path.t_max - path.t_min) * self.fractions(n)

    @abstractmethod
    def fractions(self, n: int) -> Time:
        """N numbers from 1 (t_max) down, at least 0 (t_min)."""


class Linspace(_Fractions):
    """Equal steps in t between both ends, both asked ("linspace" in Lin et al. 2023, table 2, without rounding)."""

    in_time = True

    def fractions(self, n: int) -> Time:
        """1 to 0."""
        return torch.linspace(1, 0, n, dtype=torch.float64)


class Leading(_Fractions):
    """Every ⌊T/n⌋-th of T time steps, counted from the data end: what many published samples were drawn with.

    The first time lies a stride below t_max, though sampling starts from pure noise: the flaw that Lin et al. 2023, section
    3.3, describe ("leading" in their table 2). Step k of T lies at the fraction k/(T − 1) of [t_min, t_max]: on DDPM's paths
    exactly at its step k.

    Args:
        steps_offset: added to every step number; 1 in Stable Diffusion. At least 0.
        train_steps: T, at least 2.
    """

    in_time = True

    def __init__(self, *, steps_offset: int = 0, train_steps: int = 1000) -> None:
        if train_steps < 2:
            raise ValueError(f"train_steps={train_steps}: must be at least 2")
        if not 0 <= steps_offset < train_steps:
            raise ValueError(f"steps_offset={steps_offset}: must be at least 0 and below train_steps={train_steps}")
        self.steps_offset, self.train_steps = steps_offset, train_steps

    def fractions(self, n: int) -> Time:
        """((n − 1 − i)·⌊T/n⌋ + offset)/(T − 1).

        Raises:
            ValueError: if the first one lies above the last time step.
        """
        k = torch.arange(n - 1, -1, -1, dtype=torch.float64) * (self.train_steps // n) + self.steps_offset
        if n > self.train_steps or k[0] >= self.train_steps:
            raise ValueError(
                f"steps={n}: does not fit into train_steps={self.train_steps} with steps_offset={self.steps_offset}"
            )
        return k / (self.train_steps - 1)


class Quadratic(_Fractions):
    """Times above t_min in proportion to i²: shorter steps near the data; both ends are asked.

    Source: Song, Meng & Ermon 2021, appendix D.2, whose τ_i = ⌊c·i²⌋ counts DDPM's steps from its first one.
    """

    def fractions(self, n: int) -> Time:
        """(i/(n − 1))², downwards."""
        return torch.linspace(1, 0, n, dtype=torch.float64).square()


class Beta(_Fractions):
    """Quantiles of a Beta distribution in t: with both parameters below 1, shorter steps near both ends, which are asked.

    diffusers' `use_beta_sigmas` places noise levels σ/α in this way; that is the same where t is the noise level (variance
    exploding) and, in its flow-matching schedulers, on rectified flow.

    Args:
        alpha: below 1: denser near t_min. Positive.
        beta: below 1: denser near t_max. Positive.

    Source: Lee et al. 2024, "Beta Sampling is All You Need"; 0.6 is diffusers' choice.
    """

    def __init__(self, *, alpha: float = 0.6, beta: float = 0.6) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be positive")
        self.alpha, self.beta = alpha, beta

    def fractions(self, n: int) -> Time:
        """The inverse CDF at 1 to 0."""
        from scipy.special import betaincinv

        return torch.from_numpy(betaincinv(self.alpha, self.beta, torch.linspace(1, 0, n, dtype=torch.float64).numpy()))


class _NoiseLevels(Grid):
    """Times placed by their noise level σ/α, from the largest to the smallest, both included.

    Args:
        sigma_min: smallest σ/α; None, or one that the path does not reach, is the path's own.
        sigma_max: largest σ/α; None, or one that the path does not reach, is the path's own.
    """

    needs_finite = True

    def __init__(self, *, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be positive, or null")
        if sigma_min is not None and sigma_max is not None and not sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min}: must be below sigma_max={sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def times(self, path: Path, n: int) -> Time:
        """The times.

        Raises:
            ValueError: if the path ends in pure noise, whose level is infinite, and no `sigma_max` is given.
        """
        first, last = _log_snr_ends(path)
        if self.sigma_max is not None:
            first = first.clamp(min=-2 * math.log(self.sigma_max))
        if self.sigma_min is not None:
            last = last.clamp(max=-2 * math.log(self.sigma_min))
        if self.needs_finite and not bool(first.isfinite()):
            raise ValueError(
                f"grid={type(self).__name__}: needs a largest noise level on a path that ends in pure noise; set "
                "sampler.grid.sigma_max=80, or use sampler/grid=uniform"
            )
        log_snr = self.log_snr(first, last, torch.linspace(0, 1, n, dtype=torch.float64))
        log_snr[-1], log_snr[0] = last, first  # to the last digit; a single time is the first
        return path.t_of_log_snr(log_snr)

    @abstractmethod
    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """The log-SNR at fractions 0 to 1 of the way."""


def _log_snr_ends(path: Path) -> Time:
    """λ at t_max and t_min; −∞ at pure noise."""
    return path.log_snr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))


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


class Cosine(_NoiseLevels):
    """Equal steps in the angle arctan(σ/α): on any path the noise levels of equal steps on α = cos(πt/2), σ = sin(πt/2).

    Pure noise has the angle π/2, so no largest noise level is needed.

    Args:
        sigma_min: smallest σ/α; None is the path's own.
        sigma_max: largest σ/α; None is the path's own.

    Source: the grid of Salimans & Ho 2022, "Progressive Distillation".
    """

    needs_finite = False

    def log_snr(self, first: Time, last: Time, fractions: Time) -> Time:
        """σ/α = tan of the angle."""
        angles = [torch.atan(torch.exp(-end / 2)) for end in (first, last)]
        return -2 * torch.log(torch.tan(angles[0] + fractions * (angles[1] - angles[0])))


class Shifted(Grid):
    """Another grid with its noise levels σ/α multiplied: λ' = λ − 2·ln s; on rectified flow t' = s·t/(1 + (s − 1)·t).

    Pure noise stays pure noise. On a path whose noise levels are bounded, the other grid is placed on the part of it that is
    shifted onto the path; with a shift below 1 such a path is begun at `shift` times its largest level.

    Args:
        over: the other grid.
        shift: above 1 for more steps at high noise, as higher resolutions want; 3 in Stable Diffusion 3. Positive.

    Source: Esser et al. 2024, eq. 23; Hoogeboom et al. 2023 for its meaning in log-SNR.
    """

    def __init__(self, *, over: Grid, shift: float = 3.0) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}: must be positive")
        self.over, self.shift = over, shift

    def times(self, path: Path, n: int) -> Time:
        """The shifted times.

        Raises:
            ValueError: if nothing of the path is shifted onto it.
        """
        fall = 2 * math.log(self.shift)
        kept = _log_snr_ends(path) + torch.tensor([max(fall, 0.0), min(fall, 0.0)], dtype=torch.float64)
        part = copy.copy(path)
        part.t_max, part.t_min = path.t_of_log_snr(kept).tolist()
        if not kept[0] < kept[1]:
            raise ValueError(f"grid.shift={self.shift}: is more than the whole range of {type(path).__name__}")
        return path.t_of_log_snr(path.log_snr(self.over(part, n)) - fall)


class Explicit(Grid):
    """A list of times or noise levels, as it is for as many steps as it is long.

    For another number of steps n, n + 1 noise levels are interpolated log-linearly in the list and the path's smallest level
    behind it; the last one gives way to the clean end. The first time is the list's.

    Args:
        times: at least two decreasing times of the path.
        sigmas: instead, at least two decreasing noise levels σ/α; those that the path does not reach are its own largest
            (smallest), once.

    Source: Sabour et al. 2024, "Align Your Steps", optimise such lists and interpolate in this way.
    """

    def __init__(self, *, times: list[float] | None = None, sigmas: list[float] | None = None) -> None:
        if (times is None) == (sigmas is None):
            raise ValueError(f"times={times}: give either times or sigmas (sigmas={sigmas})")
        name, values = ("times", times) if sigmas is None else ("sigmas", sigmas)
        assert values is not None
        decreasing = all(a > b for a, b in pairwise((math.inf, *values, 0.0)))
        if len(values) < 2 or not decreasing:
            raise ValueError(f"{name}={values}: must be at least two positive numbers, each below the one before")
        self.name, self.values = name, values

    def times(self, path: Path, n: int) -> Time:
        """The times.

        Raises:
            ValueError: if a listed time is not on the path, or a list that begins in pure noise has to be interpolated.
        """
        listed = torch.tensor(self.values, dtype=torch.float64)
        if self.name == "sigmas":
            listed = path.t_of_log_snr(-2 * listed.log()).clamp(path.t_min, path.t_max).unique_consecutive()
        elif not path.t_min <= listed[-1] < listed[0] <= path.t_max:
            raise ValueError(f"grid.times={self.values}: must lie between t_min={path.t_min} and t_max={path.t_max}")
        if n == len(listed):
            return listed
        end = torch.tensor([path.t_min], dtype=torch.float64)
        log_snr = path.log_snr(torch.cat((listed[listed > path.t_min * (1 + 1e-9)], end)))
        if not bool(log_snr.isfinite().all()):
            raise ValueError(f"steps={n}: a list that begins in pure noise is for steps={len(listed)} alone")
        place = torch.linspace(0, len(log_snr) - 1, n + 1, dtype=torch.float64)[:n]
        before, after = place.floor().long(), place.ceil().long()
        return path.t_of_log_snr(torch.lerp(log_snr[before], log_snr[after], place - before))
