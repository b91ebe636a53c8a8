"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 that need no download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from denoiselab.data.datamodule import ImageDataModule, Split
from denoiselab.data.order import permutation

SPLIT_SEED = 8008  # part of the data set: published numbers depend on it, a run's seed does not touch it
TEST_PER_CLASS = 50


def load_digits_split(split: Split) -> tuple[Tensor, Tensor]:
    """One part of the fixed, stratified split: 500 test images (50 of each class) and the 1,297 others.

    Args:
        split: "train" or "test".

    Returns:
        images, uint8 of shape (N, 1, 8, 8) in [0, 255], and labels, int64 of shape (N,) in [0, 10).
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # pixel values are 0 ... 16
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = permutation(len(labels), SPLIT_SEED)
    test = np.concatenate([order[labels[order] == c][:TEST_PER_CLASS] for c in range(10)])
    chosen = np.isin(np.arange(len(labels)), test) == (split == "test")
    return torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen].astype(np.int64))


class Digits(ImageDataModule):
    """Handwritten digits: channels 1, resolution 8, 10 classes, 1,297 training and 500 test images.

    The split is the same whatever the seed. Arguments are those of `ImageDataModule`.
    """

    def load(self, split: Split) -> InMemoryImages:
        """Read one split.

        Raises:
            ValueError: if the declared shape is not that of the digits.
        """
        self._expect("the digits", channels=1, size=(8, 8), num_classes=10)
        return self._in_memory(split, *load_digits_split(split))
