from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from denoiselab.evaluation import metrics as module
from denoiselab.evaluation.distances import frechet_distance, statistics
from denoiselab.evaluation.features import DigitsExtractor, InceptionExtractor
from denoiselab.evaluation.metrics import Metrics, class_balance, matching

CONF = Path(__file__).parents[2] / "conf" / "metrics"


def by_name(numbers):
    return {number.name: number for number in numbers}


def balanced(images, labels, n, num_classes=10):
    """The first images of each class, their labels 0, 1, ..., 9, 0, 1, ..."""
    of_class = [(labels == c).nonzero().flatten().tolist() for c in range(num_classes)]
    chosen = [of_class[i % num_classes][i // num_classes] for i in range(n)]
    return images[chosen], labels[chosen]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"counts": []}, "counts=[]: must be at least one"),
        ({"counts": [500, 3]}, "counts=[500, 3]: "),
        ({"extractor": None}, "counts=[8]: must be empty"),
        ({"every": 0}, "every=0: "),
        ({"batch_size": 0}, "batch_size=0: "),
        ({"seed": -1}, "seed=-1: "),
    ],
)
def test_bad_values_are_one_line(bad, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Metrics(**{"extractor": DigitsExtractor(), "counts": [8]} | bad)


@pytest.mark.parametrize(("choice", "num_samples"), [("digits", 2000), ("fid", 2000), ("none", 0)])
def test_every_choice_builds(choice, num_samples):
    metrics = instantiate(OmegaConf.load(CONF / f"{choice}.yaml"), _convert_="all")
    assert metrics.num_samples == num_samples


def test_no_metrics_measure_nothing(digits):
    metrics = Metrics(extractor=None, counts=[])
    metrics.check(channels=4, resolution=1, num_classes=3)
    test = digits.test_set()
    assert metrics.measure(test.images, test.labels, digits, {}) == []


def test_check_refuses_images_and_classes_that_the_extractor_is_not_for():
    metrics = Metrics(extractor=DigitsExtractor(), counts=[8])
    for num_classes in (0, 10):
        metrics.check(channels=1, resolution=8, num_classes=num_classes)
    with pytest.raises(ValueError, match=r"num_classes=7: .* 10 classes"):
        metrics.check(channels=1, resolution=8, num_classes=7)
    with pytest.raises(ValueError, match="channels=3: "):
        metrics.check(channels=3, resolution=8, num_classes=10)


def test_the_real_test_split_scores_its_own_floor(digits):
    images, labels = balanced(digits.test_set().images, digits.test_set().labels, 500)
    metrics = Metrics(extractor=DigitsExtractor(), counts=[500, 250])
    found = by_name(metrics.measure(images, labels, digits, {"sampler": "real", "nfe": 0}))
    assert set(found) == {
        *("fd_digits_250", "precision_250", "recall_250"),
        *("fd_digits_500", "precision_500", "recall_500", "nearest_500", "accuracy"),
    }
    for name in set(found) - {"fd_digits_250", "precision_250", "recall_250"}:  # of 250 others
        assert found[name].value == pytest.approx(found[name].floor, rel=1e-6)
    # made on 2 CPU cores with the shipped classifier
    assert found["fd_digits_500"].floor == pytest.approx(0.1716787, rel=1e-4)
    assert found["accuracy"].floor == pytest.approx(0.994)
    # the distance is biased upwards by about 1/n
    assert 1.5 < found["fd_digits_250"].floor / found["fd_digits_500"].floor < 3
    record = found["fd_digits_250"].protocol
    assert record == {
        "sampler": "real",
        "nfe": 0,
        "extractor": "digits",
        "extractor_hash": DigitsExtractor().hash,
        "resize": "none (8x8)",
        "quantisation": "uint8",
        "count": 250,
        "class_balance": "balanced",
        "reference_split": "train",
        "reference_fingerprint": digits.fingerprint("train"),
        "reference_count": 1297,
        "floor_split": "test",
        "floor_fingerprint": digits.fingerprint("test"),
    }
    assert found["accuracy"].protocol["count"] == 500


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
    metrics = Metrics(extractor=DigitsExtractor(), counts=[1000])
    found = by_name(metrics.measure(images, labels, digits, {}))
    assert found["fd_digits_1k"].floor is None
    assert found["recall_1k"].floor is None
    assert found["nearest_1k"].value < 1e-5
    assert found["nearest_1k"].floor > 1
    assert 0.8 < found["precision_1k"].floor < 1
    assert found["accuracy"].floor == pytest.approx(0.994)


def test_accuracy_is_about_what_was_asked(digits):
    images, labels = balanced(digits.test_set().images, digits.test_set().labels, 100)
    metrics = Metrics(extractor=DigitsExtractor(), counts=[100], recall=False)
    wrong = by_name(metrics.measure(images, (labels + 1) % 10, digits, {}))
    assert set(wrong) == {"fd_digits_100", "nearest_100", "accuracy"}
    assert wrong["accuracy"].value < 0.05
    half = torch.where(torch.arange(100) < 50, labels, -1)  # those without a class do not count
    found = by_name(metrics.measure(images, half, digits, {}))
    assert found["accuracy"].value > 0.95
    assert found["accuracy"].protocol["class_balance"] == "as given"


def test_unconditional_samples_have_a_floor_and_no_accuracy(digits, make_data):
    none = [torch.full_like(s.labels, -1) for s in digits.sets.values()]
    unlabelled = make_data((digits.train_set().images, none[0]), (digits.test_set().images, none[1]), num_classes=0)
    images = digits.test_set().images[:100]
    found = by_name(Metrics(extractor=DigitsExtractor(), counts=[100]).measure(images, none[1][:100], unlabelled, {}))
    assert "accuracy" not in found
    assert all(n.floor is not None and n.protocol["class_balance"] == "unconditional" for n in found.values())


def test_the_floor_has_the_classes_that_were_asked_for(digits):
    test = digits.test_set()
    threes = test.images[test.labels == 3]
    metrics = Metrics(extractor=DigitsExtractor(), counts=[50], recall=False)
    found = by_name(metrics.measure(threes, torch.full((50,), 3), digits, {}))
    assert found["fd_digits_50"].floor == pytest.approx(found["fd_digits_50"].value, rel=1e-6)
    assert found["fd_digits_50"].protocol["class_balance"] == "as given"


def test_too_few_images_are_one_line(digits):
    test = digits.test_set()
    with pytest.raises(ValueError, match=r"counts=\[8, 501\]: must be at most 500"):
        Metrics(extractor=DigitsExtractor(), counts=[501, 8]).measure(test.images, test.labels, digits, {})


def test_floors_are_computed_once(digits, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "frechet_distance", lambda a, b: float(calls.append(1) or 1))
    metrics = Metrics(extractor=DigitsExtractor(), counts=[20], recall=False)
    images, labels = balanced(digits.test_set().images, digits.test_set().labels, 20)
    metrics.measure(images, labels, digits, {})
    assert len(calls) == 2
    metrics.measure(images, labels, digits, {})
    assert len(calls) == 3
    metrics.measure(images, labels.roll(1) * 0, digits, {})  # other labels, another floor
    assert len(calls) == 5


def test_inception_is_wired_in_the_same_way(inception_file, make_data):
    generator = torch.Generator().manual_seed(0)
    train, test, samples = (
        torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator) for n in (8, 4, 4)
    )
    data = make_data((train, torch.full((8,), -1)), (test, torch.full((4,), -1)), num_classes=0)
    extractor = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)
    metrics = Metrics(extractor=extractor, counts=[4], batch_size=4)
    metrics.check(channels=3, resolution=8, num_classes=0)
    found = by_name(metrics.measure(samples, torch.full((4,), -1), data, {}))
    assert set(found) == {"fd_inception_other_4", "precision_4", "recall_4", "nearest_4"}
    assert all(torch.tensor([n.value, n.floor]).isfinite().all() for n in found.values())
    assert found["fd_inception_other_4"].protocol["extractor"] == "inception-v3-compat"


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
