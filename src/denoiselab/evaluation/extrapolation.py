"""The Fréchet distance of infinitely many samples, with an interval.

Bias. Let S be the covariance of N samples, C its expectation, R = Q·Qᵀ the reference's, and a_i = s_i² the eigenvalues of
A = Qᵀ C Q. With H = Qᵀ (S − C) Q in A's axes, the trace of the root is, to second order,

    tr (A + H)^½ = Σ s_i + ½ Σ H_ii/s_i − ¼ Σ_ij H_ij² / (s_i s_j (s_i + s_j)).

The linear term has no mean. For Gaussian samples E H_ij² = a_i a_j (1 + δ_ij)/(N − 1), and the mean adds tr C/N, so that

    E d²_N ≈ d² + b/N,    b = tr C + ½ Σ_ij s_i s_j/(s_i + s_j) + ¼ Σ_i s_i,

which is positive: the plain value is too high. A bootstrap of it does not help, since each resample has the bias of its set
and its own on top. Of other distributions b is another, and 1/N the same.

Extrapolation (Chong & Forsyth 2020, "Effectively unbiased FID and Inception Score and where to find them"): fit a
line to distances of subsets against 1/size and read it at 0. The samples are divided into B blocks; the sizes are N (all) and
N·(B − 1)/B (each block left out once, averaged), where every sample counts the same. Since the first-order fluctuation of
both is then the same mean over all samples, the line does not amplify it. The second-order remainder of the intercept is
−b₂/N² · B/(B − 1), the least of any such pair of sizes (halves and quarters: −5·b₂/N²; on 64-dimensional Gaussians with
N = 1000 and d² = 0.5 they are 11 % low, this 2 %), and no subset is much smaller than the set, as features of
2048 dimensions need. The estimate is not clamped: where d² = 0 it is negative half of the time.

Interval. These are also the distances of the block jackknife. With θ_b the distance without block b, the estimate without
block b is θ_b less the line's bias at its size, b/n_b; their jackknife variance (B − 1)/B · Σ (… − mean)², with Student's t of
B − 1 degrees of freedom, gives the interval. It is about the choice of the samples alone: the reference is taken as it is.
The jackknife counts fluctuations of second order twice (Efron & Stein 1981, "The jackknife estimate of variance"), so near
d² = 0 intervals are somewhat wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.evaluation.distances import Moments, Statistics
from denoiselab.evaluation.intervals import jackknife_interval


class Extrapolation(NamedTuple):
    """A distance at infinitely many samples.

    Args:
        value: the estimate; can be negative.
        interval: of 95 %.
        jackknife: the estimate without block b, for each b.
        slope: b of the line value + b/N, which is the plain value's bias times N.
    """

    value: float
    interval: tuple[float, float]
    jackknife: list[float]
    slope: float


def blocks(labels: Tensor, count: int) -> Tensor:
    """The block of each sample: its place among all samples sorted by class, in their own order, modulo `count`.

    No block has two more samples than another, of any class or in all. It depends on the labels alone, so two sets with
    the same labels have the same blocks and can be paired. Labels usually go round in turn; taking a sample's number
    modulo `count` would put half of ten classes, or one, into each of twenty blocks.

    Args:
        labels: int64 of shape (N,), -1 is a class too.
        count: how many blocks.

    Returns:
        int64 of shape (N,), in [0, count).
    """
    place = torch.empty_like(labels)
    place[labels.sort(stable=True).indices] = torch.arange(len(labels))
    return place % count


def smallest_subset(samples: int, count: int) -> int:
    """The number of samples of the smallest subset that `extrapolate` takes."""
    return samples - -(-samples // count)


def extrapolate(
    features: Tensor, labels: Tensor, distance: Callable[[Statistics], float], *, count: int = 20
) -> Extrapolation:
    """Extrapolate a distance to infinitely many samples; `count` + 1 distances are computed.

    Args:
        features: shape (N, D); 1/N is a good law only where N is well above D.
        labels: int64 of shape (N,).
        distance: of moments to the reference, such as `FrechetTo`.
        count: of the blocks, at least 2 and at most N / 2.
    """
    block, total = blocks(labels, count), Moments().add(features)
    plain, left_out, sizes = distance(total.statistics()), list[float](), list[int]()
    for b in range(count):
        rest = total.without(Moments().add(features[block == b]))
        left_out.append(distance(rest.statistics()))
        sizes.append(rest.count)
    # weighted by size, each sample counts the same, and the mean of bias/size is bias · count / sum(sizes)
    mean = math.fsum(size * found for size, found in zip(sizes, left_out, strict=True)) / sum(sizes)
    slope = (mean - plain) / (count / sum(sizes) - 1 / total.count)
    value = plain - slope / total.count
    jackknife = [found - slope / size for size, found in zip(sizes, left_out, strict=True)]
    return Extrapolation(value, jackknife_interval(value, jackknife), jackknife, slope)
