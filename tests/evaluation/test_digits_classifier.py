from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch_fidelity

from denoiselab.data.digits import load_digits_split
from denoiselab.evaluation.digits_classifier import WEIGHTS, classifier_metadata, load_classifier
from denoiselab.evaluation.distances import frechet_distance, statistics
from denoiselab.evaluation.extractors import DigitsExtractor
from denoiselab.evaluation.neighbours import precision_recall

SHIPPED = "2d6e3efe9780c639316f6b8484c806794725b00fb8e0b1b82ae20e897f06144d"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_digits_classifier.py"


def test_the_shipped_file_is_the_one_that_numbers_were_published_with():
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == SHIPPED
    assert WEIGHTS.stat().st_size < 1_000_000
    assert DigitsExtractor().weights == WEIGHTS


def test_accuracy_on_the_test_split_is_what_the_file_says():
    images, labels = load_digits_split("test")
    accuracy = (load_classifier()(images)[1].argmax(dim=1) == labels).double().mean().item()
    assert accuracy >= classifier_metadata()["test_accuracy"] - 1e-6
    assert accuracy >= 0.985


def test_scale_makes_the_mean_variance_over_training_images_one():
    images, labels = load_digits_split("train")
    network = load_classifier()
    features, _ = network(images)
    variance = features.double().var(dim=0)
    assert variance.mean().item() == pytest.approx(1, abs=1e-5)
    assert variance.min() > 0  # no dead feature
    metadata = classifier_metadata()
    assert metadata["feature_scale"] == network.feature_scale.item()
    trained_on = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert metadata["train_sha256"] == trained_on


def test_a_foreign_weights_file_is_one_line(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"not safetensors")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=f"weights=.*{name}.safetensors: must be written by") as error:
            load_classifier(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)


class Set(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_our_numbers_are_those_of_torch_fidelity_with_this_extractor(digits):
    samples, real = digits.test_set().images, digits.train_set().images
    theirs = torch_fidelity.calculate_metrics(
        input1=Set(samples),
        input2=Set(real),
        feature_extractor="digits",
        fid=True,
        prc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    a, b = (DigitsExtractor()(images).features for images in (samples, real))
    ours = frechet_distance(statistics(a), statistics(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]), abs=0.005)


def test_the_script_is_deterministic_and_its_file_loads(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("make_digits_classifier", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "STEPS", 20)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        script.main(str(path))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() in capsys.readouterr().out
    images, _ = load_digits_split("train")
    features = DigitsExtractor(weights=str(paths[0]))(images).features
    assert features.double().var(dim=0).mean().item() == pytest.approx(1, abs=1e-5)
