from __future__ import annotations

import numpy as np
import pytest
import torch

from denoiselab.evaluation.distances import FrechetTo, Statistics, statistics
from denoiselab.evaluation.extrapolation import blocks, extrapolate, smallest_subset
from denoiselab.evaluation.intervals import jackknife_interval

SIZE = 64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussians:
    """Samples of one Gaussian and the exact distance to another: isotropic, or with variances that fall like 1/k."""

    def __init__(self, spectrum, truth):
        variance = torch.arange(1, SIZE + 1, dtype=torch.float64) ** {"isotropic": 0.0, "decaying": -1.0}[spectrum]
        variance *= SIZE / variance.sum()
        rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator(5), dtype=torch.float64)).Q
        self.mean = torch.zeros(SIZE, dtype=torch.float64)
        if truth == "near":
            self.mean[3], covariance = 1.0, variance.diag()
        else:  # other variances and other axes too
            self.mean[:8], covariance = 1.0, 1.5 * (rotation * variance) @ rotation.T
        self.factor = torch.linalg.cholesky(covariance)
        reference = Statistics(np.zeros(SIZE), variance.diag().numpy())
        self.distance = FrechetTo(reference)
        self.truth = self.distance(Statistics(self.mean.numpy(), covariance.numpy()))
        s = torch.linalg.eigvalsh(self.distance.root.T @ covariance @ self.distance.root).sqrt()
        self.bias = (covariance.trace() + (s[:, None] * s / (s[:, None] + s)).sum() / 2 + s.sum() / 4).item()

    def draw(self, count, seed):
        return torch.randn(count, SIZE, generator=generator(seed), dtype=torch.float64) @ self.factor.T + self.mean


@pytest.mark.parametrize(
    ("spectrum", "truth", "count"),
    [
        ("isotropic", "near", 1000),
        ("decaying", "near", 1000),
        ("decaying", "far", 2000),
        pytest.param("isotropic", "far", 1000, marks=pytest.mark.slow),
        pytest.param("isotropic", "near", 2000, marks=pytest.mark.slow),
        pytest.param("isotropic", "far", 2000, marks=pytest.mark.slow),
        pytest.param("decaying", "far", 1000, marks=pytest.mark.slow),
        pytest.param("decaying", "near", 2000, marks=pytest.mark.slow),
    ],
)
def test_gaussians_with_a_known_distance(spectrum, truth, count):
    """Over 200 repeats: the bias of the plain value, the mean of the estimate, and how often the interval is right."""
    known, labels = Gaussians(spectrum, truth), torch.arange(count) % 10
    plain, found, covered = [], [], []
    for seed in range(200):
        features = known.draw(count, seed)
        estimate = extrapolate(features, labels, known.distance)
        plain.append(estimate.value + estimate.slope / count)
        found.append(estimate.value)
        covered.append(estimate.interval[0] <= known.truth <= estimate.interval[1])
    error = np.std(plain) / 200**0.5
    assert np.mean(plain) - known.truth == pytest.approx(known.bias / count, rel=0.03, abs=3 * error)
    assert np.mean(found) == pytest.approx(known.truth, rel=0.05)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_a_bootstrap_of_the_plain_value_is_never_right():
    known, draws = Gaussians("isotropic", "near"), 40
    for seed in range(5):
        features = known.draw(1000, seed)
        resampled = [
            known.distance(statistics(features[torch.randint(1000, (1000,), generator=generator(100 * seed + i))]))
            for i in range(draws)
        ]
        plain = known.distance(statistics(features))
        assert min(resampled) > plain > known.truth + 2 * (max(resampled) - min(resampled))


def test_a_distance_that_follows_the_law_is_found_exactly():
    """A squared distance of means alone has bias tr C/N; with equal samples in each block it is exact."""
    features = torch.randn(200, 4, generator=generator(), dtype=torch.float64)
    distance = lambda s: s.covariance.trace() / 7 + (s.mean**2).sum()  # noqa: E731
    total = distance(statistics(features))
    found = extrapolate(features, torch.full((200,), -1), distance, count=200)  # blocks of one: the usual jackknife
    expected = total - statistics(features).covariance.trace() / 200
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.value + found.slope / 200 == pytest.approx(total, rel=1e-12)


def test_without_a_block():
    """What is left out leaves the distance of the others, less the bias at their number; the interval is theirs."""
    known, labels = Gaussians("isotropic", "near"), torch.arange(503) % 10
    features = known.draw(503, 0)
    found = extrapolate(features, labels, known.distance, count=5)
    block = blocks(labels, 5)
    for b, estimate in enumerate(found.jackknife):
        rest = features[block != b]
        assert estimate == pytest.approx(known.distance(statistics(rest)) - found.slope / len(rest), rel=1e-9)
    assert found.interval == jackknife_interval(found.value, found.jackknife)
    assert len(found.jackknife) == 5
    assert min(503 - (block == b).sum().item() for b in range(5)) == smallest_subset(503, 5) == 402


@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(500) % 10,
        torch.arange(503) % 10,
        torch.arange(500) // 50,
        torch.full((503,), -1),
        torch.randint(-1, 7, (1000,), generator=generator()),
    ],
)
def test_blocks_are_balanced(labels):
    block = blocks(labels, 20)
    sizes = block.bincount(minlength=20)
    assert sizes.max() - sizes.min() <= 1
    for label in labels.unique():
        sizes = block[labels == label].bincount(minlength=20)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(block, blocks(labels.clone(), 20))


def test_blocks_pair_two_sets_drawn_from_one_noise():
    """The interval of a difference is far narrower by paired blocks than by those of each."""
    known, labels = Gaussians("decaying", "near"), torch.arange(1000) % 10
    noise = known.draw(1000, 0)
    a, b = (extrapolate(x, labels, known.distance) for x in (noise, 1.02 * noise))
    differences = [x - y for x, y in zip(a.jackknife, b.jackknife, strict=True)]
    low, high = jackknife_interval(a.value - b.value, differences)
    single = min(x.interval[1] - x.interval[0] for x in (a, b))
    assert high - low < single / 3
