"""Fréchet distance, kernel distance, Inception Score, precision and recall of features.

The Fréchet distance of two distributions is the least root-mean-square distance of their variables over all couplings
(the 2-Wasserstein distance). Of the Gaussians N(m, S) and N(m', R) its square is known (Dowson & Landau 1982, "The Fréchet
distance between multivariate normal distributions"):

    d² = |m − m'|² + tr S + tr R − 2 tr (R^½ S R^½)^½,

and d² of the Gaussians with the moments of two sets of features is what the field calls the Fréchet distance, and FID in
the features of Inception (Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6, where the last term is
tr (S R)^½: S R and R^½ S R^½ have the same eigenvalues).

How it is computed. Any B with B·Bᵀ = R will do for R^½, since Bᵀ S B and S B Bᵀ have the same eigenvalues but for zeros;
B = V·Λ^½ comes from one symmetric eigendecomposition R = V Λ Vᵀ and serves every S. Bᵀ S B is symmetric and positive
semidefinite, so its eigenvalues λ are real and the last term is −2 Σ √λ. Rounding makes zeros of rank-deficient moments
slightly negative: λ and the distance are clamped at zero. Nothing is inverted, and no regularisation is added.

Moments are means and unbiased covariances in float64. Two parts with n, m samples, means μ, ν and centred scatters P, Q
join as (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance")

    n + m,    μ + δ·m/(n + m),    P + Q + δδᵀ·nm/(n + m),    δ = ν − μ,

which squares no large mean, so no order of batches or processes costs more than rounding.

The other numbers are torch-fidelity's own functions.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Mean (shape (D,)) and unbiased covariance (shape (D, D)) of features, both float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Count, mean and scatter of features that come in batches and in parts, in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor) -> Self:
        """Take in a batch of features, shape (N, D), N at least 1, in any precision and on any device."""
        x = features.detach().cpu().double()
        mean = x.mean(dim=0)
        x = x - mean
        return self._join(len(x), mean, x.T @ x)

    def merge(self, other: Moments) -> Self:
        """Take in what another has taken in, from another process for example."""
        return self._join(other.count, other.mean, other.scatter) if other.count else self

    def without(self, part: Moments) -> Moments:
        """The moments of the samples that are not in `part`, which must be some of them but not all."""
        rest = Moments()
        rest.count = self.count - part.count
        rest.mean = self.mean + (self.mean - part.mean) * (part.count / rest.count)
        shift = part.mean - rest.mean
        rest.scatter = self.scatter - part.scatter - torch.outer(shift, shift) * (part.count * rest.count / self.count)
        return rest

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance of all that was taken in, at least 2 samples."""
        assert self.count >= 2, "a covariance takes two samples"
        return Statistics(self.mean.numpy().copy(), (self.scatter / (self.count - 1)).numpy())

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> Self:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return self
        total, shift = self.count + count, mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return self


def statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of features, shape (N, D), N at least 2."""
    return Moments().add(features).statistics()


class FrechetTo:
    """The squared Fréchet distance of Gaussians to one reference, whose root is computed once.

    Args:
        reference: moments of D features.
    """

    def __init__(self, reference: Statistics) -> None:
        self.mean, covariance = _tensors(reference)
        values, vectors = torch.linalg.eigh(covariance)
        self.trace = covariance.trace()
        self.root = vectors * values.clamp_min(0).sqrt()

    def __call__(self, found: Statistics) -> float:
        """The squared distance from moments of D features, at least 0."""
        mean, covariance = _tensors(found)
        roots = torch.linalg.eigvalsh(self.root.T @ covariance @ self.root).clamp_min(0).sqrt()
        squared = (mean - self.mean).square().sum() + covariance.trace() + self.trace - 2 * roots.sum()
        return max(0.0, squared.item())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance of the Gaussians with these moments, at least 0."""
    return FrechetTo(b)(a)


def kernel_distance(features: Tensor, reference: Tensor, *, subsets: int, subset_size: int, seed: int) -> float:
    """The mean over random subsets of the squared maximum mean discrepancy in the kernel (x·y/D + 1)³.

    Each subset's value is unbiased, so its expectation depends on no count, and near 0 it can be negative.
    Bińkowski et al. 2018, "Demystifying MMD GANs", section 4 (KID in the features of Inception). The subsets are
    torch-fidelity's, and so is the value, in float64.

    Args:
        features: shape (N, D).
        reference: shape (M, D).
        subsets: how many.
        subset_size: of both sides of a subset; the smaller of N and M where that is less.
        seed: of the choice.
    """
    size = min(subset_size, len(features), len(reference))
    choice = np.random.RandomState(seed)
    x, y = (part.double() / part.shape[1] ** 0.5 for part in (features, reference))  # x·y/D is a product of these

    one = torch.ones((), dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(one, a, b.T).pow_(3)

    values = []
    for _ in range(1 if size == len(x) == len(y) else subsets):  # the whole sets are one and the same subset
        a, b = (part[choice.choice(len(part), size, replace=False)] for part in (x, y))
        within = [(k.sum() - k.trace()) / (size * (size - 1)) for k in (kernel(a, a), kernel(b, b))]
        values.append(sum(within) - 2 * kernel(a, b).mean())
    return torch.stack(values).mean().item()


def inception_score(logits: Tensor, *, splits: int, seed: int) -> tuple[float, float]:
    """Mean and population standard deviation over splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016, section 4).

    Args:
        logits: shape (N, K), N at least `splits`.
        splits: equal parts of the shuffled samples.
        seed: of the shuffle.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=splits, rng_seed=seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def _tensors(moments: Statistics) -> tuple[Tensor, Tensor]:
    mean, covariance = (torch.tensor(part, dtype=torch.float64) for part in moments)
    return mean, covariance
