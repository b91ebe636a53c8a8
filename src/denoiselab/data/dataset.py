"""Data sets of images: what a sample is, and how training flips it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from denoiselab.condition import NULL_LABEL
from denoiselab.data.order import Draw


def flips(seed: int, epoch: int, index: int) -> bool:
    """Whether sample `index` is mirrored in `epoch`: a fair coin that depends on the three numbers alone."""
    return bool(hashlib.blake2b(f"flip {seed} {epoch} {index}".encode(), digest_size=1).digest()[0] & 1)


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of one size with labels; subclasses say how many there are and what each one is.

    Args:
        flip: whether the draws of training are mirrored left to right with probability 1/2.
        seed: keys the mirroring.
    """

    def __init__(self, *, flip: bool = False, seed: int = 0) -> None:
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        """The number of images."""
        raise NotImplementedError

    def image(self, index: int) -> Tensor:
        """Image `index` as it is, never mirrored: uint8 of shape (C, H, W)."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """The class of image `index`; `NULL_LABEL` where there are no classes."""
        raise NotImplementedError

    def digest(self, index: int) -> bytes:
        """SHA-256 of the pixels of image `index`."""
        return hashlib.sha256(self.image(index).numpy().tobytes()).digest()

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """The sample that training draws or, for a plain index, the image as it is.

        Args:
            draw: an item of `GlobalBatchSampler`, or an index: then step is 0, place the index, and nothing
                is mirrored.

        Returns:
            image (uint8, shape (C, H, W)), label, index, step and place (integers: the default collate makes
            int64 of them).
        """
        if isinstance(draw, Draw):
            image = self.image(draw.index)
            if self.flip and flips(self.seed, draw.epoch, draw.index):
                image = image.flip(-1)
        else:
            draw = Draw(index=draw, step=0, place=draw, epoch=0)
            image = self.image(draw.index)
        label = self.label(draw.index)
        return {"image": image, "label": label, "index": draw.index, "step": draw.step, "place": draw.place}


class InMemoryImages(ImageDataset):
    """Images that are held in memory.

    Args:
        images: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,); None where there are no classes.
        flip: whether the draws of training are mirrored left to right with probability 1/2.
        seed: keys the mirroring.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, *, flip: bool = False, seed: int = 0) -> None:
        super().__init__(flip=flip, seed=seed)
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert labels is None or (labels.dtype == torch.int64 and labels.shape == images.shape[:1])
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Image `index`: uint8 of shape (C, H, W)."""
        return self.images[index]

    def label(self, index: int) -> int:
        """The class of image `index`; `NULL_LABEL` where there are no classes."""
        return NULL_LABEL if self.labels is None else int(self.labels[index])
