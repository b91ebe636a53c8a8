"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 that need no download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from denoiselab.data.datamodule import ImageDataModule, Split
from denoiselab.data.dataset import InMemoryImages
from denoiselab.data.order import permutation

SPLIT_SEED = 8008  # part of the data set: published numbers depend on it, a run's seed does not touch it
TRAIN, TEST_PER_CLASS = 1297, 50


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

    The split is the same whatever the seed.

    Args:
        channels: 1.
        resolution: 8.
        num_classes: 10, or 0 to train without labels.
        batch_size, seed, num_workers, flip, eval_batch_size: as in `ImageDataModule`.
        train_size: train on so many images only, the first ones of each class in turn, 1 to 1,297; None: on all.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int,
        resolution: int | list[int],
        num_classes: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        flip: bool = False,
        eval_batch_size: int = 500,
        train_size: int | None = None,
    ) -> None:
        super().__init__(
            channels=channels,
            resolution=resolution,
            num_classes=num_classes,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            flip=flip,
            eval_batch_size=eval_batch_size,
        )
        if train_size is not None and not 1 <= train_size <= TRAIN:
            raise ValueError(f"train_size={train_size}: must be from 1 to {TRAIN}, or null for all")
        self.train_size = train_size

    def load(self, split: Split) -> InMemoryImages:
        """Read one split.

        Raises:
            ValueError: if the declared shape is not that of the digits.
        """
        self._expect("the digits", channels=1, size=(8, 8), num_classes=10)
        images, labels = load_digits_split(split)
        if split == "train" and self.train_size is not None:
            chosen = in_turn(labels, self.train_size)
            images, labels = images[chosen], labels[chosen]
        return self._in_memory(split, images, labels)


def in_turn(labels: Tensor, count: int) -> Tensor:
    """Which images are the first of each class, then the second of each, …: `count` indices, in increasing order.

    Args:
        labels: int64 of shape (N,).
        count: at most N.
    """
    which = torch.zeros_like(labels)  # the how-manieth of its class each image is
    for label in labels.unique():
        of_class = labels == label
        which[of_class] = torch.arange(int(of_class.sum()))
    return (which * (int(labels.max()) + 1) + labels).argsort(stable=True)[:count].sort().values
