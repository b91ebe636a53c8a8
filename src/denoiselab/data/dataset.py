"""Data sets of images: what a sample is, and how training flips it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from denoiselab.condition import NULL_LABEL
from denoiselab.data.decoding import BrokenImageError, OnCorrupt, check_on_corrupt
from denoiselab.data.order import Draw

TRIES = 100  # images that are asked to stand in for a broken one

log = logging.getLogger(__name__)


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

    def shown(self, index: int) -> tuple[Tensor, int]:
        """Image `index` or what stands in for it, and which image that is."""
        return self.image(index), index

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """The sample that training draws or, for a plain index, the image as it is.

        Args:
            draw: an item of `GlobalBatchSampler`, or an index: then step is 0, place the index, and nothing
                is mirrored.

        Returns:
            image (uint8, shape (C, H, W)), label, index, step, place and stand_in, which is 1 where the image
            could not be decoded and another one is shown, with its label, else 0 (integers: the default collate
            makes int64 of them).
        """
        of_training = isinstance(draw, Draw)
        if not isinstance(draw, Draw):
            draw = Draw(index=draw, step=0, place=draw, epoch=0)
        image, shown = self.shown(draw.index)
        if of_training and self.flip and flips(self.seed, draw.epoch, draw.index):
            image = image.flip(-1)
        numbers = {"index": draw.index, "step": draw.step, "place": draw.place, "stand_in": int(shown != draw.index)}
        return {"image": image, "label": self.label(shown), **numbers}


class LazyImages(ImageDataset):
    """Images that are read when they are asked for, from files any of which may be broken by then, or gone.

    With `on_corrupt="skip"` another image of the same class then stands in, everywhere: in training, in validation and
    in reference statistics; where none of the class can be decoded, any of the set. Which one is a function of the index
    and the files alone, so that a resumed run draws the same again. The choice is hashed: if a stretch of files is lost,
    no single image is shown in place of all of them.

    Args:
        flip: whether the draws of training are mirrored left to right with probability 1/2.
        seed: keys the mirroring.
        on_corrupt: what to do about an image that cannot be decoded: "fail" or "skip".

    Raises:
        ValueError: if on_corrupt is neither.
    """

    def __init__(self, *, flip: bool = False, seed: int = 0, on_corrupt: OnCorrupt = "fail") -> None:
        super().__init__(flip=flip, seed=seed)
        check_on_corrupt(on_corrupt)
        self.on_corrupt = on_corrupt
        self._named: set[int] = set()

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        raise NotImplementedError

    def read(self, index: int) -> Tensor:
        """Image `index` itself: uint8 of shape (C, H, W).

        Raises:
            BrokenImageError: if its file cannot be decoded.
        """
        raise NotImplementedError

    def peers(self, index: int) -> Sequence[int]:
        """The images that have the class of image `index`, itself among them."""
        raise NotImplementedError

    def image(self, index: int) -> Tensor:
        """Image `index` or what stands in for it, never mirrored: uint8 of shape (C, H, W).

        Raises:
            BrokenImageError: if it cannot be decoded and, with "skip", none was found that can.
        """
        return self.shown(index)[0]

    def shown(self, index: int) -> tuple[Tensor, int]:
        """Image `index` or what stands in for it, and which image that is; see `image`."""
        try:
            return self.read(index), index
        except BrokenImageError as error:
            if self.on_corrupt == "fail":
                raise BrokenImageError(f"{error}; repair or remove it, or set on_corrupt=skip") from error
            found = self._stand_in(index, error)
        if get_worker_info() is None:  # of what a loader's worker draws, the process that trains tells
            self.tell([index])
        return found

    def tell(self, indices: Iterable[int]) -> None:
        """Warn that others stand in for these images: each is named once."""
        for index in sorted(set(indices) - self._named):
            self._named.add(index)
            try:
                self.read(index)
            except BrokenImageError as error:
                _, shown = self._stand_in(index, error)
                what = "an image of the same class stands in"
                if shown not in self.peers(index):
                    what = (
                        f"none of its class was found that can be decoded; {self.path(shown)} stands in, with its label"
                    )
                log.warning("on_corrupt=skip: %s; %s", error, what)
            else:
                log.warning("on_corrupt=skip: %s could not be read when it was drawn, but now it can", self.path(index))

    def _stand_in(self, index: int, error: BrokenImageError) -> tuple[Tensor, int]:
        """An image of the same class that can be decoded or, if none is found, any; and which it is."""
        tried = {index: error}
        for kind, candidates in (("stand-in", self.peers(index)), ("any", range(len(self)))):
            for attempt in range(TRIES):
                digest = hashlib.blake2b(f"{kind} {index} {attempt}".encode(), digest_size=8).digest()
                other = candidates[int.from_bytes(digest) % len(candidates)]
                try:
                    if other not in tried:
                        return self.read(other), other
                except BrokenImageError as another:
                    tried[other] = another
        *_, last = tried.values()
        raise BrokenImageError(f"{error}; {len(tried) - 1} others were tried in its place, the last: {last}")


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
