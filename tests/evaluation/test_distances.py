from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from denoiselab.evaluation.distances import frechet_distance, nearest_distance, precision_recall, statistics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_gaussian(mean, covariance, n=500, seed=0):
    """Features whose sample mean and unbiased covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def distance(a, b):
    return frechet_distance(statistics(a), statistics(b))


def test_statistics_are_the_exact_moments_in_float64():
    mean = torch.full((6,), 1e4, dtype=torch.float64)
    features = exact_gaussian(mean, torch.eye(6, dtype=torch.float64)).float()
    found = statistics(features)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    expected = features.double().mean(dim=0)  # a float32 mean of values about 1e4 is off by 1e-3
    assert np.abs(found.mean - expected.numpy()).max() < 1e-10
    assert np.abs(found.covariance - np.cov(features.double().numpy().T)).max() < 1e-10


@pytest.mark.parametrize("size", [2, 3, 64])
def test_frechet_distance_of_gaussians_with_common_axes(size):
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator(1), dtype=torch.float64)).Q
    a, b = torch.rand(2, size, generator=generator(2), dtype=torch.float64) + 0.1
    means = torch.randn(2, size, generator=generator(3), dtype=torch.float64)
    sets = [
        exact_gaussian(mean, rotation @ variance.diag() @ rotation.T, seed=seed)
        for seed, (mean, variance) in enumerate(zip(means, (a, b), strict=True))
    ]
    expected = (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance(*sets) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_gaussians_with_unlike_axes():
    a = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.7, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    product = a @ b
    root_trace = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))  # of a 2x2 matrix's square root
    expected = (a.trace() + b.trace() - 2 * root_trace).item()
    zero = torch.zeros(2, dtype=torch.float64)
    assert distance(exact_gaussian(zero, a), exact_gaussian(zero, b, seed=1)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_equal_sets_is_zero():
    features = torch.randn(300, 64, generator=generator())
    assert -1e-8 <= distance(features, features) < 1e-8


def test_frechet_distance_is_finite_with_fewer_samples_than_features():
    few = torch.randn(20, 64, generator=generator(), dtype=torch.float64)
    assert distance(few, few) == pytest.approx(0, abs=1e-5)
    assert distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)
    assert math.isfinite(distance(few, torch.zeros(20, 64)))


def test_precision_and_recall_equal_their_definition():
    samples = torch.randn(40, 3, generator=generator(0), dtype=torch.float64)
    real = torch.randn(60, 3, generator=generator(1), dtype=torch.float64) * 1.5

    def share_inside(points, centres):
        radius = torch.cdist(centres, centres).sort(dim=1).values[:, 3]  # column 0 is the centre itself
        return (torch.cdist(points, centres) <= radius).any(dim=1).double().mean().item()

    precision, recall = precision_recall(samples, real, chunk=7)
    assert precision == pytest.approx(share_inside(samples, real), abs=1e-6)
    assert recall == pytest.approx(share_inside(real, samples), abs=1e-6)
    assert 0 < recall < precision < 1


def test_collapsed_samples_keep_precision_and_lose_recall():
    real = torch.randn(100, 4, generator=generator())
    collapsed = real[:1] + 1e-4 * torch.randn(50, 4, generator=generator(1))
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1
    assert recall < 0.05


def test_nearest_distance():
    real = torch.randn(50, 8, generator=generator()) * 100 + 1000  # float32 products would lose a copy's zero
    assert nearest_distance(real[:20], real) < 1e-3
    shift = torch.zeros(8)
    shift[0] = 0.5
    assert nearest_distance(real[:20] + shift, real, chunk=3) == pytest.approx(0.5, rel=1e-3)
