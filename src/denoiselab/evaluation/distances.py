"""Distances between sets of features, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Mean (shape (D,)) and covariance (shape (D, D)) of features, both float64."""

    mean: np.ndarray
    covariance: np.ndarray


def statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance, computed in float64.

    Args:
        features: shape (N, D), N at least 2.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features.double().cpu())
    return Statistics(found["mu"], found["sigma"])


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments.

    Rounding can take it a little below zero for equal sets. Dowson & Landau 1982; Heusel et al. 2017, eq. 6.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    found = [{"mu": s.mean, "sigma": s.covariance} for s in (a, b)]
    return fid_statistics_to_metric(*found, verbose=False)[KEY_METRIC_FID]


def precision_recall(features: Tensor, reference: Tensor, *, chunk: int = 1000) -> tuple[float, float]:
    """Precision and recall with balls up to the 3rd neighbour (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Args:
        features: of the samples, shape (N, D), N at least 4.
        reference: of real images, shape (M, D), M at least 4.
        chunk: rows of the distance matrix held at a time.

    Returns:
        precision, the share of samples inside the real images' balls, and recall, the share of real images
        inside the samples' balls. Precision does not depend on N, recall does.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        features.double(), reference.double(), prc_batch_size=chunk, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def nearest_distance(features: Tensor, reference: Tensor, *, chunk: int = 1000) -> float:
    """The mean Euclidean distance of each sample to its nearest reference image; about 0 for copies.

    Args:
        features: of the samples, shape (N, D).
        reference: shape (M, D).
        chunk: rows of the distance matrix held at a time.
    """
    real = reference.double()
    nearest = [torch.cdist(part.double(), real).amin(dim=1) for part in features.split(chunk)]
    return torch.cat(nearest).mean().item()
