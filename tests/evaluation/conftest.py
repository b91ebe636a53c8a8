from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from denoiselab.data.digits import load_digits_split


class Images:
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])


class Data:
    """A data set as evaluation sees it, over tensors."""

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int = 10) -> None:
        self.num_classes = num_classes
        self.sets = {"train": Images(*train), "test": Images(*test)}

    def train_set(self) -> Images:
        return self.sets["train"]

    def test_set(self) -> Images:
        return self.sets["test"]

    def fingerprint(self, split: str) -> str:
        held = self.sets[split]
        return hashlib.sha256(held.images.numpy().tobytes() + held.labels.numpy().tobytes()).hexdigest()


@pytest.fixture(autouse=True)
def reference_cache(tmp_path, monkeypatch):
    """References of a test are its own, and never in the user's cache."""
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_data():
    return Data


@pytest.fixture(scope="session")
def digits() -> Data:
    return Data(load_digits_split("train"), load_digits_split("test"))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A state dict for torch-fidelity's Inception with random weights."""
    from torch_fidelity import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            assert not state_dict

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Blank("inception-v3-compat", ["2048"], str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"
