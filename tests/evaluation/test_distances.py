from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from denoiselab.evaluation.distances import (
    FrechetTo,
    Moments,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    statistics,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_gaussian(mean, covariance, n=500, seed=0):
    """Features whose sample mean and unbiased covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def correlated(n, size=64, seed=0):
    """Features with a mean far from zero and variances that fall like 1/k."""
    g = generator(seed)
    mixing = torch.randn(size, size, generator=g, dtype=torch.float64)
    scale = torch.arange(1, size + 1, dtype=torch.float64).rsqrt()
    return torch.randn(n, size, generator=g, dtype=torch.float64) * scale @ mixing + torch.randn(size, generator=g)


def distance(a, b):
    return frechet_distance(statistics(a), statistics(b))


def relative(found, expected):
    return max(np.abs(f - e).max() / np.abs(e).max() for f, e in zip(found, expected, strict=True))


def test_statistics_are_the_exact_moments_in_float64():
    mean = torch.full((6,), 1e4, dtype=torch.float64)
    features = exact_gaussian(mean, torch.eye(6, dtype=torch.float64)).float()
    found = statistics(features)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    expected = features.double().mean(dim=0)  # a float32 mean of values about 1e4 is off by 1e-3
    assert np.abs(found.mean - expected.numpy()).max() < 1e-10
    assert np.abs(found.covariance - np.cov(features.double().numpy().T)).max() < 1e-10


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_the_same_however_the_features_come(offset):
    features = torch.randn(1003, 32, generator=generator()).double() + offset
    expected = statistics(features)
    for sizes in ([1] * 1003, [250, 250, 250, 253], [1002, 1], [7] * 143 + [2]):
        streamed = Moments()
        for batch in features.split(sizes):
            streamed.add(batch)
        assert relative(streamed.statistics(), expected) < 1e-9
    for world in (2, 3, 5):  # ranks take turns; the last of them have fewer
        ranks = [Moments().add(features[rank::world]) for rank in range(world)]
        for order in (ranks, ranks[::-1]):
            merged = Moments().merge(Moments())
            for part in order:
                merged.merge(pickle.loads(pickle.dumps(part))).merge(Moments())
            assert merged.count == 1003
            assert relative(merged.statistics(), expected) < 1e-9


def test_merging_leaves_the_other_as_it_was():
    a, b = (Moments().add(correlated(20, 4, seed)) for seed in (0, 1))
    before = b.statistics()
    total = Moments().merge(b).merge(a).add(correlated(5, 4))
    assert total.count == 45
    assert relative(b.statistics(), before) == 0


def test_moments_without_a_part():
    features = correlated(400) + 1e3
    total, part = Moments().add(features), features[::20]
    left = torch.ones(400, dtype=torch.bool)
    left[::20] = False
    rest = total.without(Moments().add(part))
    assert rest.count == 380
    assert relative(rest.statistics(), statistics(features[left])) < 1e-10
    assert total.count == 400


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


def test_frechet_distance_of_many_planes_with_unlike_axes():
    """A rotation of block-diagonal covariances, whose distance is the sum of the planes'."""
    blocks, expected = ([], []), 0.0
    for i in range(16):
        a, b = (correlated(10, 2, seed=2 * i + j).T.cov() for j in range(2))
        product = a @ b
        expected += (a.trace() + b.trace() - 2 * torch.sqrt(product.trace() + 2 * product.det().sqrt())).item()
        blocks[0].append(a)
        blocks[1].append(b)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator(9), dtype=torch.float64)).Q
    a, b = (Statistics(np.zeros(32), (rotation @ torch.block_diag(*part) @ rotation.T).numpy()) for part in blocks)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [500, 40])  # more and fewer samples than features
def test_frechet_distance_equals_torch_fidelity_and_the_matrix_root(n):
    a, b = correlated(n, seed=1), correlated(n + 11, seed=2)
    ours = distance(a, b)
    theirs = [fid_features_to_statistics(x) for x in (a, b)]
    for mine, other in zip((a, b), theirs, strict=True):
        assert relative(statistics(mine), (other["mu"], other["sigma"])) < 1e-12
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(expected, rel=1e-6)
    (m, s), (mr, r) = statistics(a), statistics(b)
    root = scipy.linalg.sqrtm(s @ r).real
    expected = (m - mr) @ (m - mr) + np.trace(s) + np.trace(r) - 2 * np.trace(root)
    assert ours == pytest.approx(expected, rel=1e-5)
    # Where the moments are singular, zeros among the eigenvalues are rounded to 1e-16 of the largest, and their roots to 1e-8.
    assert ours == pytest.approx(distance(b, a), rel=1e-9 if n == 500 else 1e-8)


def test_one_root_serves_many_distances():
    reference = statistics(correlated(300, seed=1))
    to = FrechetTo(reference)
    for seed in (2, 3):
        found = statistics(correlated(200, seed=seed))
        assert to(found) == frechet_distance(found, reference)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_frechet_distance_of_equal_sets_is_zero(scale):
    features = torch.randn(300, 64, generator=generator()) * scale
    assert 0 <= distance(features, features) < 1e-8 * scale**2


def test_frechet_distance_is_finite_and_not_negative_with_fewer_samples_than_features():
    few = torch.randn(20, 64, generator=generator(), dtype=torch.float64)
    assert 0 <= distance(few, few) < 1e-5
    assert distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)
    assert distance(few, torch.zeros(20, 64)) == pytest.approx(few.var(dim=0).sum() + few.mean(dim=0).square().sum())
    assert distance(torch.zeros(2, 64), torch.zeros(2, 64)) == 0
    for seed in range(20):
        copies = torch.randn(3, 8, generator=generator(seed)).repeat(5, 1)
        assert 0 <= distance(copies, copies) < 1e-6


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    a, b = (torch.randn(400, 16, generator=generator(seed)) for seed in (0, 1))
    settings = {"subsets": 20, "subset_size": 300, "seed": 0}
    kernel = lambda x, y: (x @ y.T / 16 + 1) ** 3  # noqa: E731

    def unbiased(x, y):
        within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
        return (sum(within) - 2 * kernel(x, y).mean()).item()

    assert kernel_distance(a, b, **settings) == pytest.approx(unbiased(a.double(), b.double()), abs=0.01)
    full = kernel_distance(a, b, subsets=2, subset_size=1000, seed=0)  # both subsets are the whole set
    assert full == pytest.approx(unbiased(a.double(), b.double()), rel=1e-3, abs=1e-5)
    assert kernel_distance(a + 0.5, b, **settings) > 0.3
    assert kernel_distance(a, b, **settings) == kernel_distance(a, b, **settings)
    assert kernel_distance(a, b, **settings) != kernel_distance(a, b, **(settings | {"seed": 1}))


@pytest.mark.parametrize("size", [60, 150])
def test_kernel_distance_is_torch_fidelitys(size):
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = (torch.randn(n, 16, generator=generator(n), dtype=torch.float64).relu() for n in (200, 150))
    theirs = kid_features_to_metric(a, b, kid_subsets=7, kid_subset_size=size, rng_seed=3, verbose=False)
    ours = kernel_distance(a, b, subsets=7, subset_size=size, seed=3)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_inception_score_of_sure_balanced_logits_is_the_number_of_classes():
    sure = 100 * torch.eye(4).repeat(50, 1)
    assert inception_score(sure, splits=1, seed=0) == pytest.approx((4, 0))
    assert inception_score(torch.zeros(200, 4), splits=10, seed=0) == pytest.approx((1, 0))
    some = torch.randn(200, 4, generator=generator())
    p = some.double().softmax(dim=1)
    expected = (p * (p.log() - p.mean(dim=0).log())).sum(dim=1).mean().exp().item()
    assert inception_score(some, splits=1, seed=0)[0] == pytest.approx(expected, rel=1e-6)
    assert inception_score(some, splits=10, seed=0) != inception_score(some, splits=10, seed=1)
