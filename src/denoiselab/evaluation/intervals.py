"""Intervals of 95 %."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """The interval of the expectation of independent values, shape (N,); None of a single one."""
    if len(values) < 2:
        return None
    mean, half = values.mean().item(), student(len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return mean - half, mean + half


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a probability, of `count` independent trials with this share of successes.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = 1.959963984540054
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def jackknife_interval(value: float, estimates: list[float]) -> tuple[float, float]:
    """The interval of a value, from its estimates with one of B blocks left out each; B at least 2.

    Of the difference of two paired values, give the difference and the differences of the estimates.

    Tukey 1958; Efron & Stein 1981, "The jackknife estimate of variance".
    """
    count = len(estimates)
    found = torch.tensor(estimates, dtype=torch.float64)
    variance = (count - 1) / count * (found - found.mean()).square().sum().item()
    half = student(count - 1) * math.sqrt(variance)
    return value - half, value + half
