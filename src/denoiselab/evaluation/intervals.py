"""Intervals, of 95 % where no other level is given."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95


def quantile(freedom: int | None = None, level: float = LEVEL) -> float:
    """How many standard errors an interval reaches to each side: Student's t, or normal without degrees of freedom."""
    if freedom is None:
        return NormalDist().inv_cdf((1 + level) / 2)
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, freedom))


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """The interval of the expectation of independent values, shape (N,); None of a single one."""
    if len(values) < 2:
        return None
    mean, half = values.mean().item(), quantile(len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return mean - half, mean + half


def wilson(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a probability, of `count` independent trials with this share of successes.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = quantile(level=level)
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    # at none and at all the ends are 0 and 1, which rounding would miss
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def jackknife_interval(value: float, estimates: list[float]) -> tuple[float, float]:
    """The interval of a value, from its estimates with one of B blocks left out each; B at least 2.

    Of the difference of two paired values, give the difference and the differences of the estimates.

    Tukey 1958; Efron & Stein 1981, "The jackknife estimate of variance".
    """
    count = len(estimates)
    found = torch.tensor(estimates, dtype=torch.float64)
    variance = (count - 1) / count * (found - found.mean()).square().sum().item()
    half = quantile(count - 1) * math.sqrt(variance)
    return value - half, value + half
