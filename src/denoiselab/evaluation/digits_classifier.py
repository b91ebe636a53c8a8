"""The small classifier of handwritten digits whose features `fd_digits` is measured in.

`scripts/make_digits_classifier.py` trained it and wrote `assets/digits_classifier.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

NAME = "digits"
WEIGHTS = Path(__file__).parent / "assets" / "digits_classifier.safetensors"
NUM_CLASSES = 10
_ENTRY = "digits_classifier"  # one entry only: the order of several changes from one write to the next


class DigitsClassifier(nn.Module):
    """A convolutional network on 8x8 grey images: 64 features, 10 classes, 0.12 M parameters.

    The features are multiplied by `feature_scale`: their mean variance over the training images is 1.
    """

    feature_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 64),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, NUM_CLASSES)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images.

        Args:
            images: uint8 of shape (N, 1, 8, 8).

        Returns:
            features of shape (N, 64) and logits of shape (N, 10).
        """
        x = images.to(self.head.weight.dtype) / 127.5 - 1  # (N, 1, 8, 8)
        x = self.body(x)  # (N, 64)
        return self.feature_scale * x, self.head(x)


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def save_classifier(network: DigitsClassifier, metadata: dict[str, Any], path: str | Path) -> None:
    """Write the weights with their metadata (test accuracy, hash of the training data, feature scale)."""
    save_file(network.state_dict(), path, metadata={_ENTRY: json.dumps(metadata, sort_keys=True)})


def load_classifier(path: str | Path = WEIGHTS) -> DigitsClassifier:
    """The classifier, frozen, on the CPU.

    Raises:
        ValueError: if the file is not one of this network's.
    """
    network = DigitsClassifier()
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"weights={path}: must be written by scripts/make_digits_classifier.py") from error
    return network.eval().requires_grad_(False)


def classifier_metadata(path: str | Path = WEIGHTS) -> dict[str, Any]:
    """What is written beside the weights: test_accuracy, train_sha256, feature_scale."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[_ENTRY])


class DigitsFeatureExtractor(FeatureExtractorBase):
    """The classifier as torch-fidelity's extractor "digits", with features "penultimate" and "logits".

    Its signature is torch-fidelity's, which passes every option of `calculate_metrics` to every extractor.

    Args:
        name: the registered name.
        features_list: which features to return, in this order.
        feature_extractor_weights_path: a weights file; None takes the one that is shipped.
        _: torch-fidelity's other options, none of which concern this network.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(name, features_list)
        self.network = load_classifier(feature_extractor_weights_path or WEIGHTS)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features of images, uint8 of shape (N, 1, 8, 8)."""
        found = dict(zip(self.get_provided_features_list(), self.network(images), strict=True))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The names of all features."""
        return "penultimate", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The features that a metric of torch-fidelity ("isc", "fid", "kid", "prc") is computed in."""
        return "logits" if metric == "isc" else "penultimate"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch-fidelity may compile it: it has nothing to gain."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """An input of the right shape."""
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


register_feature_extractor(NAME, DigitsFeatureExtractor)
