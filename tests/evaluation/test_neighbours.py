from __future__ import annotations

import pytest
import torch

from denoiselab.evaluation import neighbours
from denoiselab.evaluation.neighbours import density_coverage, precision_recall, two_nearest


def normal(n, size, seed=0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True])
def chunked(request, monkeypatch):
    """Once in one piece, once in many."""
    if request.param:
        monkeypatch.setattr(neighbours, "ENTRIES", 700)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("real", [2, 5, 300])
def test_two_nearest_equal_their_definition(real):
    x, y = normal(90, 6), normal(real, 6, seed=1)
    expected = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1)
    found = two_nearest(x, y)
    assert torch.equal(found.indices, expected.indices[:, :2])
    torch.testing.assert_close(found.distances, expected.values[:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.ratios(), expected.values[:, 0] / expected.values[:, 1])
    assert found.distances.dtype == torch.float64


def test_copies_are_at_distance_zero_even_far_from_the_origin():
    real = normal(300, 64) * 100 + 1e4  # float32 products would lose a copy's zero
    found = two_nearest(real[:40], real)
    assert found.distances[:, 0].max() == 0
    assert torch.equal(found.indices[:, 0], torch.arange(40))
    assert (found.ratios() == 0).all()
    shift = torch.zeros(64)
    shift[0] = 0.5
    near = two_nearest(real[:40] + shift, real)
    torch.testing.assert_close(near.distances[:, 0], torch.full((40,), 0.5, dtype=torch.float64), rtol=1e-2, atol=0)
    assert (near.ratios() < 0.01).all()


def test_close_neighbours_are_told_apart_in_float64():
    close = 10 + 1e-4 * normal(6, 32)  # float32 products see six equal points, so far from the reference's mean
    y = torch.cat((close, normal(50, 32, seed=1) - 10))
    x = (close.double() + 1e-6 * normal(6, 32, seed=2)).float()
    assert torch.equal(two_nearest(x, y).indices[:, 0], torch.arange(6))


def test_the_ratio_of_an_exact_copy_of_an_image_that_is_there_twice_is_zero():
    real = normal(20, 4)
    real[1] = real[0]
    assert two_nearest(real[:1], real).ratios().tolist() == [0]
    assert two_nearest(real[:1] + 0.01, real).ratios().tolist() == [1]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_equal_their_definition(k):
    x, y = normal(40, 3).double() * 0.8, normal(60, 3, seed=1).double()
    radius = torch.cdist(y, y).sort(dim=1).values[:, k]  # column 0 is the centre itself
    inside = torch.cdist(x, y) <= radius
    hits, coverage = density_coverage(x, y, neighbours=k)
    assert hits.tolist() == [count / k for count in inside.sum(dim=1).tolist()]
    assert coverage == pytest.approx(inside.any(dim=0).double().mean().item())
    assert 0 < coverage < 1


def test_density_and_coverage_of_the_same_distribution():
    """Density has expectation 1; coverage about 1 − 2^−k for as many samples as real images (Naeem et al., section 3)."""
    hits, coverage = density_coverage(normal(1500, 8), normal(1500, 8, seed=1))
    assert hits.mean().item() == pytest.approx(1, abs=0.06)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_density_and_coverage_see_collapse_and_distance():
    real = normal(200, 8) + 50
    hits, coverage = density_coverage(real[:1].repeat(100, 1), real)
    assert hits.mean() >= 1 / 5
    assert coverage < 0.2
    hits, coverage = density_coverage(real + 100, real)
    assert (hits.sum().item(), coverage) == (0, 0)


def test_a_point_on_the_edge_of_a_ball_is_inside():
    real = normal(100, 16).double() + 10
    hits, coverage = density_coverage(real, real, neighbours=3)
    assert hits.mean().item() == pytest.approx(4 / 3, rel=1e-9)  # a ball holds its centre and k neighbours
    assert coverage == 1


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_equal_their_definition(k):
    samples = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5

    def share_inside(points, centres):
        radius = torch.cdist(centres, centres).sort(dim=1).values[:, k]  # column 0 is the centre itself
        return (torch.cdist(points, centres) <= radius).any(dim=1).double().mean().item()

    precision, recall = precision_recall(samples, real, neighbours=k)
    assert precision == pytest.approx(share_inside(samples, real), abs=1e-6)
    assert recall == pytest.approx(share_inside(real, samples), abs=1e-6)
    assert 0 < recall < precision <= 1


def test_collapsed_samples_keep_precision_and_lose_recall():
    real = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    collapsed = real[:1] + 1e-4 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1
    assert recall < 0.05


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_precision_and_recall_are_torch_fidelitys(seed):
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, real = normal(150, 8, seed).relu(), 1.2 * normal(200, 8, seed + 10).relu()
    theirs = prc_features_to_metric(samples.double(), real.double(), verbose=False)
    assert precision_recall(samples, real) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
