"""What is measured of a set of features: each measure is a small class with a YAML node."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from denoiselab.evaluation.distances import (
    FrechetTo,
    frechet_distance,
    inception_score,
    kernel_distance,
    statistics,
)
from denoiselab.evaluation.extrapolation import extrapolate, smallest_subset
from denoiselab.evaluation.intervals import mean_interval, quantile, wilson
from denoiselab.evaluation.neighbours import TwoNearest, density_coverage, precision_recall, two_nearest
from denoiselab.evaluation.records import base_name

if TYPE_CHECKING:
    from denoiselab.evaluation.features import FeatureSet
    from denoiselab.evaluation.reference import Reference


class Value(NamedTuple):
    """One number that a measure found.

    Args:
        value: the number.
        interval: of 95 %; None where there is none.
        jackknife: the number with block b of the samples left out, b = 0, 1, …; None where there is none.
        count_free: whether its expectation does not depend on the number of samples, so that a floor from another
            number of test images is fair.
    """

    value: float
    interval: tuple[float, float] | None = None
    jackknife: list[float] | None = None
    count_free: bool = False


class Measure(ABC):
    """Something to measure of a set of features, compared with real ones where it takes a comparison.

    Attributes:
        slow: whether it is an interval or an extrapolation that recomputes a distance many times; timed apart.
        every_count: whether it is taken at every sample count, not at the largest alone.
        moments_only: whether it needs the moments of the real images only, so that published statistics will do.
    """

    slow: bool = False
    every_count: bool = False
    moments_only: bool = False

    @abstractmethod
    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """The numbers by their base names; {} where it cannot be computed (no logits, too few samples, …).

        Args:
            images: features, labels and, where the extractor gives them, logits and spatial features of N images.
            real: what they are compared with.
            label: of the extractor, as `base_name` takes it.
        """

    def settings(self) -> dict[str, Any]:
        """What goes into the protocol: its attributes, which are plain values."""
        return dict(vars(self))


class Frechet(Measure):
    """`fid`, elsewhere `fd_<label>`: the Fréchet distance of the samples' moments to the real images'.

    Its expectation falls with the number of samples, and it has no interval: see `FrechetInfinity`.
    """

    every_count = True
    moments_only = True

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes two images."""
        if len(images) < 2:
            return {}
        return {base_name("fid", label, "fd"): Value(frechet_distance(statistics(images.features), real.moments))}


class SpatialFrechet(Measure):
    """`sfid`, elsewhere `sfd_<label>`: the Fréchet distance in features that know where things are.

    Nash et al. 2021, "Generating images with sparse representations", section 5 (sFID).
    """

    every_count = True
    moments_only = True

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes two images and an extractor with spatial features."""
        if images.spatial is None or real.spatial is None or len(images) < 2:
            return {}
        return {base_name("sfid", label, "sfd"): Value(frechet_distance(statistics(images.spatial), real.spatial))}


class FrechetInfinity(Measure):
    """`fid_inf`, elsewhere `fd_inf_<label>`: the Fréchet distance of infinitely many samples, with its interval.

    See `extrapolation`. It is left out where the samples without one block are not more than the features: a law of 1/N
    is not to be expected there.

    Args:
        blocks: of the jackknife.

    Raises:
        ValueError: if there are fewer than 2 blocks.
    """

    slow = True
    moments_only = True

    def __init__(self, *, blocks: int = 20) -> None:
        _at_least(2, blocks=blocks)
        self.blocks = blocks

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`."""
        samples, dimensions = images.features.shape
        if samples < 2 * self.blocks or smallest_subset(samples, self.blocks) <= dimensions:
            return {}
        found = extrapolate(images.features, images.labels, FrechetTo(real.moments), count=self.blocks)
        return {base_name("fid_inf", label, "fd_inf"): Value(found.value, found.interval, found.jackknife)}


class Kernel(Measure):
    """`kid`, elsewhere `kd_<label>`: the kernel distance, unbiased at any number of samples.

    It has no interval: the subsets overlap, so their spread says how exact a subset is and not how exact the mean is.

    Args:
        subsets: how many.
        subset_size: samples, and real images, in each; all of them where there are fewer.
        seed: of the choice.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        _at_least(1, subsets=subsets)
        _at_least(2, subset_size=subset_size)
        _at_least(0, seed=seed)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes two images of both kinds."""
        if real.sample is None or min(len(images), len(real.sample)) < 2:
            return {}
        value = kernel_distance(images.features, real.sample.features, **self.settings())
        return {base_name("kid", label, "kd"): Value(value, count_free=True)}


class InceptionScore(Measure):
    """`is`: how sure the logits are of each sample, and how varied over all; its expectation rises with the number.

    The interval is that of a mean over splits, for the expected score of so many samples as are in a split.

    Args:
        splits: equal parts of the shuffled samples, whose scores are averaged.
        seed: of the shuffle.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, *, splits: int = 10, seed: int = 0) -> None:
        _at_least(1, splits=splits)
        _at_least(0, seed=seed)
        self.splits, self.seed = splits, seed

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes logits, and an image for each split."""
        if images.logits is None or len(images) < self.splits:
            return {}
        value, spread = inception_score(images.logits, splits=self.splits, seed=self.seed)
        interval = None
        if self.splits > 1:
            half = quantile(self.splits - 1) * spread / math.sqrt(self.splits - 1)
            interval = value - half, value + half
        return {base_name("is", label): Value(value, interval)}


class PrecisionRecall(Measure):
    """`precision` and `recall`: share of samples near a real image, and of real images near a sample.

    Args:
        neighbours: a ball reaches up to the k-th neighbour; k.

    Raises:
        ValueError: if it is below 1.
    """

    every_count = True

    def __init__(self, *, neighbours: int = 3) -> None:
        _at_least(1, neighbours=neighbours)
        self.neighbours = neighbours

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes more images of both kinds than neighbours."""
        if real.sample is None or min(len(images), len(real.sample)) <= self.neighbours:
            return {}
        precision, recall = precision_recall(images.features, real.sample.features, neighbours=self.neighbours)
        return {
            base_name("precision", label): Value(precision, wilson(precision, len(images)), count_free=True),
            base_name("recall", label): Value(recall),
        }


class DensityCoverage(Measure):
    """`density` and `coverage`: how many real images' balls a sample is in, and share of these balls with a sample.

    Args:
        neighbours: a ball reaches up to the k-th neighbour; k.

    Raises:
        ValueError: if it is below 1.
    """

    every_count = True

    def __init__(self, *, neighbours: int = 5) -> None:
        _at_least(1, neighbours=neighbours)
        self.neighbours = neighbours

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes more real images than neighbours."""
        if real.sample is None or len(real.sample) <= self.neighbours or not len(images):
            return {}
        hits, coverage = density_coverage(images.features, real.sample.features, neighbours=self.neighbours)
        return {base_name("density", label): _mean(hits), base_name("coverage", label): Value(coverage)}


class Pair(NamedTuple):
    """A sample and the training image nearest to it.

    Args:
        sample: number of the sample.
        training: number of the training image.
        distance: between their features.
        ratio: of this distance to that of the second nearest training image.
    """

    sample: int
    training: int
    distance: float
    ratio: float


class Memorisation(Measure):
    """`nearest` and `copy_rate`: mean distance to the nearest training image, and share of the samples that are copies.

    A copy is nearer to one training image than `ratio` times its distance to any other (Yoon et al. 2023, "Diffusion
    probabilistic models generalize when they fail to memorize", with 1/3; in feature space here). The control is the same
    of test images. Intervals are about the choice of the samples. An image that the training set has twice hides its copies,
    unless they are exact. Left out where the training images are more than are kept one by one (`reference.LIMIT`).

    Args:
        ratio: in (0, 1].

    Raises:
        ValueError: if it is out of its range.
    """

    def __init__(self, *, ratio: float = 1 / 3) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio}: must be in (0, 1]")
        self.ratio = ratio

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; takes two real images."""
        found = self._nearest(images, real)
        if found is None:
            return {}
        copies = (found.ratios() < self.ratio).double().mean().item()
        return {
            base_name("nearest", label): _mean(found.distances[:, 0]),
            base_name("copy_rate", label): Value(copies, wilson(copies, len(images)), count_free=True),
        }

    def closest(self, images: FeatureSet, real: Reference, count: int) -> list[Pair]:
        """The samples nearest to a training image, nearest first; at most `count`, none where it cannot be computed."""
        found = self._nearest(images, real)
        if found is None:
            return []
        ratios, pairs = found.ratios(), list[Pair]()
        for i in found.distances[:, 0].argsort(stable=True)[:count].tolist():
            training = int(real.numbers[found.indices[i, 0]])
            pairs.append(Pair(i, training, found.distances[i, 0].item(), ratios[i].item()))
        return pairs

    @staticmethod
    def _nearest(images: FeatureSet, real: Reference) -> TwoNearest | None:
        if real.sample is None or len(real.sample) < 2 or not len(images):
            return None
        if len(real.sample) < real.facts.get("reference_count", 0):  # copies of the others would not be seen
            return None
        return two_nearest(images.features, real.sample.features)


class Adherence(Measure):
    """`accuracy`, `class_entropy` and `class_diversity` of conditional samples.

    - accuracy: the share of the conditional samples that the extractor, if a classifier, classifies as asked;
    - class_entropy: of the classes that it sees in all samples, in nats: ln K when they are equally many;
    - class_diversity: the root-mean-square distance √(2 tr S_c) of two samples of the same asked class c, S_c the
      unbiased covariance of its features, averaged over the classes with two samples; 0 when each class is one image.
    """

    def __call__(self, images: FeatureSet, real: Reference, label: str) -> dict[str, Value]:
        """See `Measure`; the first two take a classifier of the data's classes, the first and last labels."""
        values: dict[str, Value] = {}
        asked = images.labels >= 0
        if images.logits is not None and images.classes is not None and len(images):
            seen = images.logits.argmax(dim=1)
            if asked.any():
                right = (seen == images.labels)[asked].double().mean().item()
                values["accuracy"] = Value(right, wilson(right, int(asked.sum())), count_free=True)
            shares = seen.bincount().double() / len(seen)
            values["class_entropy"] = Value(torch.special.entr(shares).sum().item())
        variances = [
            images.features[images.labels == c].double().var(dim=0).sum()
            for c in images.labels[asked].unique()
            if (images.labels == c).sum() >= 2
        ]
        if variances:
            values["class_diversity"] = Value((2 * torch.stack(variances)).sqrt().mean().item())
        return {base_name(name, label): value for name, value in values.items()}


def _mean(values: Tensor) -> Value:
    """The mean of one value a sample, at least 0 each, float64 of shape (N,)."""
    interval = mean_interval(values)
    if interval is not None:
        interval = max(0.0, interval[0]), interval[1]
    return Value(values.mean().item(), interval, count_free=True)


def _at_least(lowest: int, **values: int) -> None:
    for name, value in values.items():
        if value < lowest:
            raise ValueError(f"{name}={value}: must be at least {lowest}")
