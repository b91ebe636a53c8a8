from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import denoiselab.evaluation.reference as reference_module
from denoiselab.evaluation.distances import frechet_distance, statistics
from denoiselab.evaluation.extractors import DigitsExtractor, InceptionExtractor
from denoiselab.evaluation.measures import (
    Adherence,
    Frechet,
    FrechetInfinity,
    InceptionScore,
    Memorisation,
    PrecisionRecall,
    SpatialFrechet,
)
from denoiselab.evaluation.metrics import Metrics, class_balance, matching
from denoiselab.evaluation.records import protocol_id
from stand_ins import held

CONF = Path(__file__).parents[2] / "conf"


def digits_metrics(counts, *measures, **more):
    chosen = {type(measure).__name__: measure for measure in measures or (Frechet(),)}
    return Metrics(extractors={"digits": DigitsExtractor()}, measures=chosen, counts=counts, **more)


def numbers(metrics, images, labels, data, protocol=None, **more):
    measured = metrics.measure(held(images, 100), labels, data, protocol or {}, **more)
    return {number.name: number for number in measured.numbers}


def balanced(images, labels, n, num_classes=10):
    """The first images of each class, their labels 0, 1, ..., 9, 0, 1, ..."""
    of_class = [(labels == c).nonzero().flatten().tolist() for c in range(num_classes)]
    chosen = [of_class[i % num_classes][i // num_classes] for i in range(n)]
    return images[chosen], labels[chosen]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"counts": []}, "counts=[]: must be one or more"),
        ({"counts": [500, 3]}, "counts=[500, 3]: each must be at least 4"),
        ({"every_counts": [3]}, "every_counts=[3]: each must be at least 4"),
        ({"extractors": {}}, "counts=[8]: must be empty without extractors"),
        ({"measures": {}}, "measures=[]: one at least"),
        ({"every": 0}, "every=0: must be at least 1, or null"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"references": {"x": "y.npz"}}, "references.x=y.npz: must be one of digits"),
    ],
)
def test_bad_values_are_one_line(bad, message):
    given = {"extractors": {"digits": DigitsExtractor()}, "measures": {"frechet": Frechet()}, "counts": [8]} | bad
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Metrics(**given)


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*overrides, "logger=none"])
    return instantiate(config.metrics, _convert_="all")


@pytest.mark.parametrize(("choice", "num_samples"), [("digits", 2000), ("fid", 2000), ("none", 0)])
def test_every_choice_builds(choice, num_samples):
    assert composed(f"metrics={choice}").num_samples == num_samples


def test_null_leaves_a_measure_out():
    every, fewer = composed(), composed("metrics.measures.kernel=null")
    assert set(every.measures) - set(fewer.measures) == {"kernel"}


def test_no_metrics_measure_nothing(digits):
    metrics = Metrics(extractors={}, measures={}, counts=[])
    metrics.check(channels=4, resolution=1, num_classes=3)
    test = digits.test_set()
    assert numbers(metrics, test.images, test.labels, digits) == {}


def test_check_refuses_images_and_classes_that_the_extractor_is_not_for(tmp_path):
    metrics = digits_metrics([8])
    for num_classes in (0, 10):
        metrics.check(channels=1, resolution=8, num_classes=num_classes)
    with pytest.raises(ValueError, match=r"^num_classes=7: .* 10 classes"):
        metrics.check(channels=1, resolution=8, num_classes=7)
    with pytest.raises(ValueError, match="^channels=3: "):
        metrics.check(channels=3, resolution=8, num_classes=10)
    missing = Metrics(
        extractors={"mine": DigitsExtractor(weights=str(tmp_path / "x"))}, measures={"f": Frechet()}, counts=[8]
    )
    with pytest.raises(ValueError, match=r"^extractors\.mine\.weights=.*no such file"):
        missing.check(channels=1, resolution=8, num_classes=10)
    twice = Metrics(extractors={"a": DigitsExtractor(), "b": DigitsExtractor()}, measures={"f": Frechet()}, counts=[8])
    with pytest.raises(ValueError, match="must have different labels, not digits, digits"):
        twice.check(channels=1, resolution=8, num_classes=10)


def test_published_statistics_are_checked_before_anything_is_trained(tmp_path):
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    metrics = digits_metrics([8], references={"digits": str(path)})
    with pytest.raises(ValueError, match=r"^references\.digits=.*has 3 features, the extractor 64"):
        metrics.check(channels=1, resolution=8, num_classes=10)
    missing = digits_metrics([8], references={"digits": "no.npz"})
    with pytest.raises(ValueError, match=r"^references\.digits=no\.npz: no such file"):
        missing.check(channels=1, resolution=8, num_classes=10)


def test_published_statistics_stand_in_for_the_training_images(digits, tmp_path):
    test = digits.test_set()
    found = statistics(DigitsExtractor()(test.images[:100]).features)
    np.savez(tmp_path / "stats.npz", mu=found.mean, sigma=found.covariance)
    metrics = digits_metrics([100], Frechet(), Memorisation(), references={"digits": str(tmp_path / "stats.npz")})
    metrics.check(channels=1, resolution=8, num_classes=10)
    values = numbers(metrics, test.images[:100], test.labels[:100], digits)
    assert values["fd_digits_100"].value == pytest.approx(0, abs=1e-6)
    protocol = values["fd_digits_100"].protocol
    assert (protocol["reference"], protocol["reference_file"]) == ("published", "stats.npz")
    (tmp_path / "stats.npz").rename(tmp_path / "renamed.npz")
    renamed = digits_metrics([100], references={"digits": str(tmp_path / "renamed.npz")})
    again = numbers(renamed, test.images[:100], test.labels[:100], digits)["fd_digits_100"].protocol
    assert protocol_id(again) == protocol_id(protocol)
    assert values["nearest_digits_100"].protocol["reference"] == "train"  # neighbours need images
    assert values["nearest_digits_100"].protocol["reference_sample"] == 1297


def test_spatial_statistics_are_checked_before_anything_is_trained(inception_file, tmp_path):
    def metrics(**spatial):
        np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048), **spatial)
        extractor = InceptionExtractor(weights=str(inception_file), allow_other_weights=True, spatial=True)
        return Metrics(
            extractors={"inception": extractor},
            measures={"spatial_frechet": SpatialFrechet()},
            counts=[8],
            references={"inception": str(tmp_path / "stats.npz")},
        )

    with pytest.raises(ValueError, match="has no mu_s and sigma_s; leave spatial_frechet out"):
        metrics().check(channels=3, resolution=8, num_classes=0)
    with pytest.raises(ValueError, match="has 7 spatial features, the extractor 2023"):
        metrics(mu_s=np.zeros(7), sigma_s=np.eye(7)).check(channels=3, resolution=8, num_classes=0)


def test_neighbours_of_a_part_of_the_training_images_are_no_claim_about_copies(digits, monkeypatch):
    monkeypatch.setattr(reference_module, "LIMIT", 100)
    test = digits.test_set()
    metrics = digits_metrics([50], PrecisionRecall(), Memorisation())
    found = numbers(metrics, test.images, test.labels, digits)
    assert set(found) == {"precision_digits_50", "recall_digits_50"}
    protocol = found["recall_digits_50"].protocol
    assert (protocol["reference_count"], protocol["reference_sample"]) == (1297, 100)


def test_the_real_test_split_scores_its_own_floor(digits):
    images, labels = balanced(digits.test_set().images, digits.test_set().labels, 500)
    metrics = digits_metrics([500, 250], Frechet(), PrecisionRecall(), Memorisation(), Adherence())
    found = numbers(metrics, images, labels, digits, {"sampler": "real", "nfe": 0})
    assert {"fd_digits_250", "precision_digits_250", "recall_digits_250", "fd_digits_500"} <= set(found)
    assert {"nearest_digits_500", "copy_rate_digits_500", "accuracy_digits_500"} <= set(found)
    assert "accuracy_digits_250" not in found  # at the largest count alone
    for name, number in found.items():
        if name.endswith("_500"):
            assert number.value == pytest.approx(number.floor, rel=1e-6, abs=1e-9)
    # made on 2 CPU cores with the shipped classifier
    assert found["fd_digits_500"].floor == pytest.approx(0.1716787, rel=1e-4)
    assert found["accuracy_digits_500"].floor == pytest.approx(0.994)
    # the distance is biased upwards by about 1/n
    assert 1.5 < found["fd_digits_250"].floor / found["fd_digits_500"].floor < 3
    assert found["fd_digits_250"].protocol == {
        "sampler": "real",
        "nfe": 0,
        "extractor": "digits",
        "extractor_hash": DigitsExtractor().hash,
        "resize": "none (8x8)",
        "quantisation": "uint8",
        "count": 250,
        "class_balance": "balanced",
        "reference": "train",
        "reference_hash": digits.fingerprint("train"),
        "reference_count": 1297,
        "reference_sample": None,
        "floor": "test",
        "floor_hash": digits.fingerprint("test"),
        "floor_seed": 0,
        "measure": {"name": "Frechet"},
    }
    assert found["accuracy_digits_500"].protocol["count"] == 500
    assert found["accuracy_digits_500"].protocol["measure"]["name"] == "Adherence"


def test_unbalanced_labels_raise_the_distance(digits):
    """The reason for balance: about twice the bias at equal n."""
    test = digits.test_set()
    train = DigitsExtractor()(digits.train_set().images).features
    found = DigitsExtractor()(test.images).features
    even, random = [], []
    for seed in range(10):
        drawn = torch.randperm(500, generator=torch.Generator().manual_seed(seed))[:250]
        chosen = matching(torch.arange(250) % 10, test.labels, seed)
        for scores, indices in ((even, chosen), (random, drawn)):
            scores.append(frechet_distance(statistics(found[indices]), statistics(train)))
    assert 1.5 * sum(even) < sum(random)


def test_copies_are_seen_and_have_no_floor_above_the_test_split(digits):
    images, labels = balanced(digits.train_set().images, digits.train_set().labels, 1000)
    metrics = digits_metrics([1000], Frechet(), PrecisionRecall(), Memorisation(), Adherence())
    measured = metrics.measure(held(images, 300), labels, digits, {})
    found = {number.name: number for number in measured.numbers}
    assert found["fd_digits_1k"].floor is None
    assert found["recall_digits_1k"].floor is None
    assert found["nearest_digits_1k"].value < 1e-5
    assert found["nearest_digits_1k"].floor > 1
    assert found["copy_rate_digits_1k"].value > 0.99
    assert found["copy_rate_digits_1k"].floor < 0.05
    assert 0.8 < found["precision_digits_1k"].floor < 1
    assert found["accuracy_digits_1k"].floor == pytest.approx(0.994)
    assert len(measured.closest) == 8
    assert measured.images.shape == (16, 1, 8, 8)
    assert torch.equal(measured.images[::2], measured.images[1::2])  # each beside the image that it copies


def test_accuracy_is_about_what_was_asked(digits):
    images, labels = balanced(digits.test_set().images, digits.test_set().labels, 100)
    metrics = digits_metrics([100], Adherence())
    assert numbers(metrics, images, (labels + 1) % 10, digits)["accuracy_digits_100"].value < 0.05
    half = torch.where(torch.arange(100) < 50, labels, -1)  # those without a class do not count
    found = numbers(metrics, images, half, digits)
    assert found["accuracy_digits_100"].value > 0.95
    assert found["accuracy_digits_100"].protocol["class_balance"] == "as given"


def test_unconditional_samples_have_a_floor_and_no_accuracy(digits, make_data):
    none = [torch.full_like(s.labels, -1) for s in digits.sets.values()]
    unlabelled = make_data((digits.train_set().images, none[0]), (digits.test_set().images, none[1]), num_classes=0)
    metrics = digits_metrics([100], Frechet(), PrecisionRecall(), Adherence())
    found = numbers(metrics, digits.test_set().images[:100], none[1][:100], unlabelled)
    assert "accuracy_digits_100" not in found
    assert all(n.protocol["class_balance"] == "unconditional" for n in found.values())
    assert found["fd_digits_100"].floor is not None


def test_the_floor_has_the_classes_that_were_asked_for(digits):
    test = digits.test_set()
    threes = test.images[test.labels == 3]
    found = numbers(digits_metrics([50]), threes, torch.full((50,), 3), digits)
    assert found["fd_digits_50"].floor == pytest.approx(found["fd_digits_50"].value, rel=1e-6)
    assert found["fd_digits_50"].protocol["class_balance"] == "as given"


def test_too_few_images_are_one_line(digits):
    test = digits.test_set()
    with pytest.raises(ValueError, match=r"counts=\[8, 501\]: must be at most 500"):
        numbers(digits_metrics([501, 8]), test.images, test.labels, digits)


def test_other_counts_can_be_asked_for(digits):
    test, metrics = digits.test_set(), digits_metrics([100, 50], Frechet(), Adherence())
    found = numbers(metrics, test.images, test.labels, digits, counts=[50])
    assert {"fd_digits_50", "accuracy_digits_50"} <= set(found)
    assert not any(name.endswith("_100") for name in found)


def test_floors_are_computed_once(digits):
    calls = []

    class Listening(Frechet):
        def __call__(self, images, real, label):
            calls.append(len(images))
            return super().__call__(images, real, label)

    metrics = digits_metrics([20], Listening())
    images, labels = balanced(digits.test_set().images, digits.test_set().labels, 20)
    numbers(metrics, images, labels, digits)
    assert len(calls) == 2
    numbers(metrics, images, labels, digits)
    assert len(calls) == 3
    numbers(metrics, images, labels.roll(1) * 0, digits)  # other labels, another floor
    assert len(calls) == 5


def test_a_protocol_does_not_depend_on_which_model_was_measured(digits):
    test, metrics = digits.test_set(), digits_metrics([50])
    one = numbers(metrics, test.images, test.labels, digits, {"step": 1, "weights_sha256": "a", "seed": 0})
    two = numbers(metrics, test.images, test.labels, digits, {"step": 2, "weights_sha256": "b", "seed": 0})
    three = numbers(metrics, test.images, test.labels, digits, {"step": 2, "weights_sha256": "b", "seed": 1})
    ids = [protocol_id(found["fd_digits_50"].protocol) for found in (one, two, three)]
    assert ids[0] == ids[1] != ids[2]


def test_features_kept_on_disk_are_not_drawn_again(digits, tmp_path):
    test, metrics = digits.test_set(), digits_metrics([100])
    first = numbers(metrics, test.images, test.labels, digits, shards=tmp_path)

    def nothing(numbers):
        assert not len(numbers)
        yield from ()

    again = metrics.measure(nothing, test.labels, digits, {}, shards=tmp_path).numbers
    assert {n.name: n.value for n in again} == {name: n.value for name, n in first.items()}


def test_inception_is_wired_in_the_same_way(inception_file, make_data):
    generator = torch.Generator().manual_seed(0)
    train, test, samples = (
        torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator) for n in (8, 4, 4)
    )
    data = make_data((train, torch.full((8,), -1)), (test, torch.full((4,), -1)), num_classes=0)
    extractor = InceptionExtractor(weights=str(inception_file), allow_other_weights=True, spatial=True)
    measures = (
        Frechet(),
        SpatialFrechet(),
        FrechetInfinity(),
        PrecisionRecall(),
        InceptionScore(splits=2),
        Adherence(),
    )
    metrics = Metrics(
        extractors={"inception": extractor},
        measures={type(measure).__name__: measure for measure in measures},
        counts=[4],
        batch_size=4,
    )
    metrics.check(channels=3, resolution=8, num_classes=0)
    found = numbers(metrics, samples, torch.full((4,), -1), data)
    label = extractor.label
    assert re.fullmatch("inception_unpublished_[0-9a-f]{8}", label)
    assert set(found) == {
        f"{name}_{label}_4" for name in ("fd", "sfd", "precision", "recall", "is")
    }  # 4 are too few for inf
    assert all(np.isfinite(n.value) for n in found.values())
    assert found[f"fd_{label}_4"].protocol["extractor"] == "inception-v3-compat"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 2, 0], "balanced"),
        ([2, 1, 0], "balanced"),
        ([0, 0, 1], "as given"),
        ([0, 1, 2, -1], "as given"),
        ([-1, -1], "unconditional"),
    ],
)
def test_class_balance(labels, expected):
    assert class_balance(torch.tensor(labels), 3) == expected


def test_matching():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    chosen = matching(torch.tensor([-1, 1, 0, 0]), labels, seed=0)
    assert len(chosen.unique()) == 4
    assert labels[chosen].bincount(minlength=3)[:2].ge(torch.tensor([2, 1])).all()
    assert matching(torch.tensor([2, 2]), labels, seed=0) is None
    assert matching(torch.full((7,), -1), labels, seed=0) is None
    assert sorted(matching(torch.full((6,), -1), labels, seed=3).tolist()) == list(range(6))
    draws = {tuple(sorted(matching(torch.tensor([0, 1]), labels, seed=s).tolist())) for s in range(20)}
    assert len(draws) > 1
