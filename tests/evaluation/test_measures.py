from __future__ import annotations

import json
import math

import pytest
import torch

from denoiselab.evaluation.distances import (
    FrechetTo,
    frechet_distance,
    inception_score,
    kernel_distance,
    statistics,
)
from denoiselab.evaluation.extrapolation import extrapolate
from denoiselab.evaluation.features import FeatureSet
from denoiselab.evaluation.intervals import jackknife_interval, mean_interval, wilson
from denoiselab.evaluation.measures import (
    Adherence,
    DensityCoverage,
    Frechet,
    FrechetInfinity,
    InceptionScore,
    Kernel,
    Memorisation,
    Pair,
    PrecisionRecall,
    SpatialFrechet,
)
from denoiselab.evaluation.neighbours import density_coverage, precision_recall
from denoiselab.evaluation.reference import Reference

ALL = [
    Frechet(),
    SpatialFrechet(),
    FrechetInfinity(blocks=5),
    Kernel(subsets=3, subset_size=20),
    InceptionScore(splits=4),
    PrecisionRecall(),
    DensityCoverage(),
    Memorisation(),
    Adherence(),
]


def image_set(count, seed, *, classes=4, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = scale * torch.randn(count, 6, generator=g) + labels[:, None]
    logits = 3 * torch.nn.functional.one_hot(labels, classes) + torch.randn(count, classes, generator=g)
    return FeatureSet(features, labels, logits, torch.randn(count, 10, generator=g), classes)


def reference(sample, stride=1):
    numbers = stride * torch.arange(len(sample))
    return Reference(statistics(sample.features), statistics(sample.spatial), sample, numbers, {})


@pytest.fixture
def samples():
    return image_set(80, 0)


@pytest.fixture
def real():
    return reference(image_set(120, 1, scale=1.2))


def test_every_measure_finds_what_the_functions_say(samples, real):
    found = {name: value for measure in ALL for name, value in measure(samples, real, "").items()}
    x, y = samples.features, real.sample.features
    precision, recall = precision_recall(x, y)
    hits, coverage = density_coverage(x, y)
    far = extrapolate(x, samples.labels, FrechetTo(real.moments), count=5)
    nearest = torch.cdist(x.double(), y.double()).sort(dim=1).values
    seen = samples.logits.argmax(dim=1)
    spread = [2 * x[samples.labels == c].double().T.cov().trace() for c in range(4)]
    expected = {
        "fid": frechet_distance(statistics(x), real.moments),
        "sfid": frechet_distance(statistics(samples.spatial), real.spatial),
        "fid_inf": far.value,
        "kid": kernel_distance(x, y, subsets=3, subset_size=20, seed=0),
        "is": inception_score(samples.logits, splits=4, seed=0)[0],
        "precision": precision,
        "recall": recall,
        "density": hits.mean().item(),
        "coverage": coverage,
        "nearest": nearest[:, 0].mean().item(),
        "copy_rate": (nearest[:, 0] < nearest[:, 1] / 3).double().mean().item(),
        "accuracy": (seen == samples.labels).double().mean().item(),
        "class_entropy": torch.distributions.Categorical(seen.bincount().double() / 80).entropy().item(),
        "class_diversity": torch.stack(spread).sqrt().mean().item(),
    }
    assert {name: value.value for name, value in found.items()} == pytest.approx(expected)
    assert found["fid_inf"].interval == far.interval
    assert found["fid_inf"].jackknife == far.jackknife
    free = {name for name, value in found.items() if value.count_free}
    assert free == {"kid", "precision", "density", "nearest", "copy_rate", "accuracy"}
    bounded = {name for name, value in found.items() if value.interval is not None}
    assert bounded == {"fid_inf", "is", "precision", "density", "nearest", "copy_rate", "accuracy"}
    assert all(found[name].interval[0] <= found[name].value <= found[name].interval[1] for name in bounded)


def test_names_say_which_features(samples, real):
    names = [name for measure in ALL for name in measure(samples, real, "digits")]
    assert names[:5] == ["fd_digits", "sfd_digits", "fd_inf_digits", "kd_digits", "is_digits"]
    assert all(name.endswith("_digits") for name in names)


def test_without_logits_spatial_features_labels_or_real_images_less_is_measured(samples, real):
    bare = FeatureSet(samples.features, torch.full((80,), -1))
    published = Reference(real.moments, None, None, torch.zeros(0), {})
    names = [name for measure in ALL for name in measure(bare, published, "")]
    assert names == ["fid", "fid_inf"]
    assert all(measure.moments_only for measure in ALL[:3])
    assert Memorisation().closest(bare, published, 4) == []


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_too_few_images_measure_less_and_raise_nothing(samples, real, count):
    few = samples.take(slice(count))
    pairs = [(few, real), (samples, Reference(real.moments, None, few, torch.arange(count), {}))]
    for images, compared in pairs:
        found = {name: value.value for measure in ALL for name, value in measure(images, compared, "").items()}
        assert all(math.isfinite(value) for value in found.values())
        assert ("fid" in found) == (len(images) > 1)
        assert ("recall" in found) == (count > 3)
        assert Memorisation().closest(images, compared, 100)[:1] or count == 1


def test_the_extrapolation_takes_more_samples_than_features_in_every_subset(samples, real):
    measure = FrechetInfinity(blocks=4)
    assert measure(samples.take(slice(8)), real, "") == {}  # 6 without a block, of 6 features
    assert set(measure(samples.take(slice(10)), real, "")) == {"fid_inf"}  # 7
    assert FrechetInfinity(blocks=20)(samples.take(slice(30)), real, "") == {}  # blocks of one sample or none


def test_settings_are_what_the_constructors_took():
    assert [measure.settings() for measure in ALL] == [
        {},
        {},
        {"blocks": 5},
        {"subsets": 3, "subset_size": 20, "seed": 0},
        {"splits": 4, "seed": 0},
        {"neighbours": 3},
        {"neighbours": 5},
        {"ratio": 1 / 3},
        {},
    ]
    json.dumps([measure.settings() for measure in ALL])
    assert [type(measure) for measure in ALL if measure.slow] == [FrechetInfinity]


@pytest.mark.parametrize(
    ("measure", "values", "message"),
    [
        (FrechetInfinity, {"blocks": 1}, "blocks=1: must be at least 2"),
        (Kernel, {"subsets": 0}, "subsets=0: must be at least 1"),
        (Kernel, {"subset_size": 1}, "subset_size=1: must be at least 2"),
        (Kernel, {"seed": -1}, "seed=-1: must be at least 0"),
        (InceptionScore, {"splits": 0}, "splits=0: must be at least 1"),
        (InceptionScore, {"seed": -1}, "seed=-1: must be at least 0"),
        (PrecisionRecall, {"neighbours": 0}, "neighbours=0: must be at least 1"),
        (DensityCoverage, {"neighbours": 0}, "neighbours=0: must be at least 1"),
        (Memorisation, {"ratio": 0.0}, r"ratio=0.0: must be in \(0, 1\]"),
        (Memorisation, {"ratio": 1.5}, r"ratio=1.5: must be in \(0, 1\]"),
    ],
)
def test_bad_values(measure, values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        measure(**values)


def test_copies_are_found_with_their_numbers(samples):
    real = reference(image_set(120, 1), stride=7)  # as when every seventh training image is kept
    features = samples.features.clone()
    features[5] = real.sample.features[11]
    features[40] = real.sample.features[3] + 0.01
    mixed = FeatureSet(features, samples.labels)
    found, control = (Memorisation()(images, real, "") for images in (mixed, samples))
    assert found["copy_rate"].value - control["copy_rate"].value == pytest.approx(2 / 80, abs=1e-9)
    assert found["nearest"].value < control["nearest"].value
    first, second, third = Memorisation().closest(mixed, real, 3)
    assert first == Pair(5, 77, 0.0, 0.0)
    assert second[:2] == (40, 21)
    assert second.distance == pytest.approx(0.01 * 6**0.5, rel=1e-3)
    assert second.ratio < 0.1
    assert third.distance > second.distance
    strict = Memorisation(ratio=1e-6)(mixed, real, "")["copy_rate"]
    assert strict.value == 1 / 80


def test_adherence_counts_the_conditional_samples(samples, real):
    wrong = FeatureSet(samples.features, (samples.labels + 1) % 4, samples.logits, None, 4)
    assert Adherence()(wrong, real, "")["accuracy"].value < 0.2
    half = samples.labels.masked_fill(torch.arange(80) < 40, -1)
    some = FeatureSet(samples.features, half, samples.logits, None, 4)
    found, whole = Adherence()(some, real, ""), Adherence()(samples, real, "")
    right = (samples.logits.argmax(dim=1) == samples.labels)[40:].double().mean().item()
    assert found["accuracy"].value == right
    assert found["accuracy"].interval == wilson(right, 40)
    assert found["class_entropy"] == whole["class_entropy"]
    none = FeatureSet(samples.features, torch.full((80,), -1), samples.logits, None, 4)
    assert set(Adherence()(none, real, "")) == {"class_entropy"}
    foreign = FeatureSet(samples.features, samples.labels, samples.logits)  # logits of other classes
    assert set(Adherence()(foreign, real, "")) == {"class_diversity"}


def test_class_entropy_and_diversity_see_collapse(real):
    labels = torch.arange(40) % 4
    alike = torch.randn(4, 6)[labels]
    one_class = torch.zeros(40, 4)
    one_class[:, 2] = 1
    collapsed = Adherence()(FeatureSet(alike, labels, one_class, None, 4), real, "")
    assert collapsed["class_entropy"].value == 0
    assert collapsed["class_diversity"].value == pytest.approx(0, abs=1e-6)
    even = Adherence()(FeatureSet(alike, labels, torch.eye(4)[labels], None, 4), real, "")
    assert even["class_entropy"].value == pytest.approx(math.log(4))


def test_class_diversity_is_the_root_mean_square_distance_of_pairs(real):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = Adherence()(FeatureSet(x, torch.zeros(50, dtype=torch.int64)), real, "")["class_diversity"]
    pairs = torch.pdist(x)
    assert found.value == pytest.approx(pairs.square().mean().sqrt().item())


def test_intervals_cover():
    g = torch.Generator().manual_seed(0)
    hits = {"mean": 0, "jackknife": 0, "wilson": 0}
    for _ in range(400):
        x = torch.rand(30, generator=g, dtype=torch.float64)
        low, high = mean_interval(x)
        hits["mean"] += low <= 0.5 <= high
        blocks = [x[torch.arange(30) % 10 != b].mean().item() for b in range(10)]
        low, high = jackknife_interval(x.mean().item(), blocks)
        hits["jackknife"] += low <= 0.5 <= high
        low, high = wilson((x < 0.3).double().mean().item(), 30)
        hits["wilson"] += low <= 0.3 <= high
    assert all(0.92 <= count / 400 <= 0.98 for count in hits.values()), hits
    assert mean_interval(torch.zeros(1)) is None
    assert wilson(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1), abs=1e-4)
