"""Nearest neighbours in feature space: copies, precision and recall, density and coverage.

Squared distances come from one matrix product a chunk, |x|² + |y|² − 2 x·y, about the reference's mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES = 2**25  # of a distance matrix held at a time
CANDIDATES = 8  # neighbours by float32, of which the two nearest are found in float64
TIE = 1 + 1e-9  # a point exactly on a ball's edge is inside, whatever the rounding


class TwoNearest(NamedTuple):
    """The two nearest reference points of each of N points, the nearest first.

    Args:
        distances: Euclidean, float64 of shape (N, 2).
        indices: into the reference, int64 of shape (N, 2).
    """

    distances: Tensor
    indices: Tensor

    def ratios(self) -> Tensor:
        """First distance over second, float64 of shape (N,); 0 for an exact copy, even of one of two equal points."""
        first, second = self.distances.unbind(dim=1)
        return torch.where(first > 0, first / second, 0.0)


def two_nearest(features: Tensor, reference: Tensor) -> TwoNearest:
    """The two nearest reference points of each point, exact copies at distance 0.

    Candidates are ranked in float32; the two nearest of them are found, and measured, by differences in float64.

    Args:
        features: shape (N, D).
        reference: shape (M, D), M at least 2.
    """
    centre = reference.double().mean(dim=0).float()
    x, y = features.float() - centre, reference.float() - centre
    distances, indices = [], []
    for rows, squared in _squared_distances(x, y):
        found = squared.topk(min(CANDIDATES, len(y)), largest=False).indices  # (n, K)
        exact = torch.stack([(features[rows].double() - reference[k].double()).norm(dim=1) for k in found.T], dim=1)
        nearest = exact.topk(2, largest=False)
        distances.append(nearest.values)
        indices.append(found.gather(1, nearest.indices))
    return TwoNearest(torch.cat(distances), torch.cat(indices))


def density_coverage(features: Tensor, reference: Tensor, *, neighbours: int = 5) -> tuple[Tensor, float]:
    """Density and coverage with the balls of real images up to their k-th neighbour.

    Density is 1 in expectation for the distribution of the reference itself, and can be more. Naeem et al. 2020,
    "Reliable fidelity and diversity metrics for generative models", section 3.

    Args:
        features: of the samples, shape (N, D).
        reference: of real images, shape (M, D), M above `neighbours`.
        neighbours: k.

    Returns:
        in how many real images' balls each sample is, divided by k, float64 of shape (N,), whose mean is the density; and
        the coverage, the share of the real images with a sample in their ball.
    """
    x, y = _centred(features, reference)
    radii = _radii(y, neighbours)
    hits, covered = [], torch.zeros(len(y), dtype=torch.bool)
    for _, squared in _squared_distances(x, y):
        inside = squared <= radii
        hits.append(inside.sum(dim=1).double() / neighbours)
        covered |= inside.any(dim=0)
    return torch.cat(hits), covered.double().mean().item()


def precision_recall(features: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall with balls up to the k-th neighbour (Kynkäänniemi et al. 2019, eq. 1 and 2).

    torch-fidelity's numbers, in a sixth of its time.

    Args:
        features: of the samples, shape (N, D), N above `neighbours`.
        reference: of real images, shape (M, D), M above `neighbours`.
        neighbours: k.

    Returns:
        precision, the share of samples inside the real images' balls, and recall, the share of real images
        inside the samples' balls. The expectation of precision does not depend on N, recall's does.
    """
    x, y = _centred(features, reference)
    shares = []
    for points, centres in ((x, y), (y, x)):
        radii = _radii(centres, neighbours)
        inside = [(squared <= radii).any(dim=1) for _, squared in _squared_distances(points, centres)]
        shares.append(torch.cat(inside).double().mean().item())
    return shares[0], shares[1]


def _centred(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both about the reference's mean, in float64."""
    centre = reference.double().mean(dim=0)
    return features.double() - centre, reference.double() - centre


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """The squared distance of each point to its k-th neighbour among the others, shape (N,)."""
    own = [s.topk(neighbours + 1, largest=False).values[:, -1] for _, s in _squared_distances(points, points)]
    return torch.cat(own) * TIE


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, and their squared distances to all of y, shape (n, M), a chunk at a time."""
    size, squares = max(1, ENTRIES // len(y)), y.square().sum(dim=1)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        part = x[rows]
        squared = torch.addmm(squares, part, y.T, alpha=-2)
        yield rows, squared.add_(part.square().sum(dim=1, keepdim=True)).clamp_min_(0)
