"""The metrics of a run: which numbers are measured, on how many samples, beside which floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from denoiselab.evaluation.bits import BitsPerDim
from denoiselab.evaluation.distances import frechet_distance, nearest_distance, precision_recall, statistics
from denoiselab.evaluation.features import Extractor, Features
from denoiselab.evaluation.records import Number, count_name
from denoiselab.evaluation.reference import Data, Reference, reference

MIN_COUNT = 4  # a ball up to the 3rd neighbour takes four samples


class Metrics:
    """Measures samples against the training images, and real test images beside them as the floor.

    With n a sample count as `count_name` writes it, the numbers are, at each count:

    - `fd_digits_n`, `fid_n` (by the extractor's prefix): Fréchet distance; it falls with n: compare equal n;
    - `precision_n`, `recall_n`: share of samples near a real image, and of real images near a sample;

    and at the largest count:

    - `nearest_n`: mean distance to the nearest training image in feature space; far below its floor: copies;
    - `accuracy`: share of the conditional samples that the extractor, if a classifier, classifies as asked.

    The floor is the same number for as many test images with the same labels. Where the test split is too
    small for that, distance and recall have none; the others, which do not depend on n, take the whole split.

    Args:
        extractor: of the features; null, with no counts, measures nothing.
        counts: sample counts, each at least 4.
        every: optimizer steps between measurements in training; null measures at the end only.
        batch_size: images per pass of the extractor.
        recall: whether precision and recall are measured.
        seed: keys the samples drawn for the metrics, and the choice of test images behind the floors.
        bits_per_dim: the likelihood of test images, measured by `evaluate`; null: not measured.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        extractor: Extractor | None,
        counts: list[int],
        every: int | None = None,
        batch_size: int = 250,
        recall: bool = True,
        seed: int = 0,
        bits_per_dim: BitsPerDim | None = None,
    ) -> None:
        if bool(counts) != (extractor is not None):
            needed = "at least one sample count" if extractor else "empty without an extractor"
            raise ValueError(f"counts={counts}: must be {needed}")
        if any(count < MIN_COUNT for count in counts):
            raise ValueError(f"counts={counts}: each must be at least {MIN_COUNT}")
        if every is not None and every < 1:
            raise ValueError(f"every={every}: must be at least 1, or null")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        self.extractor, self.counts, self.every = extractor, sorted(set(counts)), every
        self.batch_size, self.recall, self.seed = batch_size, recall, seed
        self.bits_per_dim = bits_per_dim
        self._floors: dict[tuple[Any, ...], dict[str, float]] = {}

    @property
    def num_samples(self) -> int:
        """How many samples are needed: the largest count, 0 if nothing is measured."""
        return max(self.counts, default=0)

    def check(self, *, channels: int, resolution: int | list[int], num_classes: int) -> None:
        """See to it that such images can be measured; to be called before anything is trained.

        Args:
            channels: of the images.
            resolution: of the images, one number or [height, width].
            num_classes: of the data, 0 without labels.

        Raises:
            ValueError: if weights are missing or wrong, or the extractor is not for such images.
        """
        if self.extractor is None:
            return
        self.extractor.check(channels=channels, resolution=resolution)
        known = self.extractor.num_classes
        if known is not None and num_classes not in (0, known):
            raise ValueError(f"num_classes={num_classes}: the {self.extractor.name} extractor knows {known} classes")

    def measure(self, images: Tensor, labels: Tensor, data: Data, protocol: dict[str, Any]) -> list[Number]:
        """The numbers of a set of samples; count n is measured on the first n of them.

        Args:
            images: uint8 of shape (N, C, H, W), N at least `num_samples`.
            labels: the classes that were asked for, int64 of shape (N,); -1 is none.
            data: what the samples are compared with.
            protocol: how the samples were made (sampler, nfe, guidance, weights, seed), plain values.

        Returns:
            The numbers, smallest count first, each with the protocol and what this adds to it.

        Raises:
            ValueError: if there are too few images.
        """
        if self.extractor is None:
            return []
        if len(images) < self.num_samples:
            raise ValueError(f"counts={self.counts}: must be at most {len(images)}, the number of images")
        assert labels.shape == images.shape[:1]
        labels = labels.cpu()
        found = self.extractor(images[: self.num_samples], self.batch_size)
        train = reference(data, "train", self.extractor, batch_size=self.batch_size)
        numbers: list[Number] = []
        for count in self.counts:
            asked = labels[:count]
            values = self._values(_take(found, slice(count)), asked, train)
            floors = self._floor(asked, data, train)
            record = protocol | self._record(asked, data) | {"reference_count": len(train.labels)}
            numbers += [Number(name, value, floors.get(name), record) for name, value in values.items()]
        return numbers

    def _values(self, found: Features, labels: Tensor, train: Reference, count: int | None = None) -> dict[str, float]:
        """Every number of one set of images; `count` is what it is named after, its size unless given."""
        assert self.extractor is not None
        count = len(labels) if count is None else count
        n = count_name(count)
        values = {f"{self.extractor.prefix}_{n}": frechet_distance(statistics(found.features), train.statistics)}
        if self.recall:
            values[f"precision_{n}"], values[f"recall_{n}"] = precision_recall(found.features, train.features)
        if count == self.num_samples:
            values[f"nearest_{n}"] = nearest_distance(found.features, train.features)
            if found.logits is not None and (conditional := labels >= 0).any():
                right = found.logits.argmax(dim=1) == labels
                values["accuracy"] = right[conditional].double().mean().item()
        return values

    def _floor(self, asked: Tensor, data: Data, train: Reference) -> dict[str, float]:
        """The values of real test images with the labels `asked`, remembered between measurements."""
        assert self.extractor is not None
        classes, sizes = asked.unique(return_counts=True)
        key = (data.fingerprint("train"), data.fingerprint("test"), *classes.tolist(), *sizes.tolist())
        if key not in self._floors:
            self._floors[key] = self._measure_floor(asked, data, train)
        return self._floors[key]

    def _measure_floor(self, asked: Tensor, data: Data, train: Reference) -> dict[str, float]:
        assert self.extractor is not None
        if len(data.test_set()) < MIN_COUNT:
            return {}
        test = reference(data, "test", self.extractor, batch_size=self.batch_size)
        found, chosen = Features(test.features, test.logits), matching(asked, test.labels, self.seed)
        if chosen is not None:
            return self._values(_take(found, chosen), test.labels[chosen], train)
        values = self._values(found, test.labels, train, count=len(asked))
        n = count_name(len(asked))
        return {name: v for name, v in values.items() if name not in (f"{self.extractor.prefix}_{n}", f"recall_{n}")}

    def _record(self, asked: Tensor, data: Data) -> dict[str, Any]:
        """The part of the protocol that is known here."""
        assert self.extractor is not None
        return {
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.hash,
            "resize": self.extractor.resize,
            "quantisation": "uint8",
            "count": len(asked),
            "class_balance": class_balance(asked, data.num_classes),
            "reference_split": "train",
            "reference_fingerprint": data.fingerprint("train"),
            "floor_split": "test",
            "floor_fingerprint": data.fingerprint("test"),
        }


def class_balance(labels: Tensor, num_classes: int) -> str:
    """Say "balanced" (no class has two more than another), "unconditional" (no labels) or "as given"."""
    if (labels < 0).all():
        return "unconditional"
    sizes = torch.bincount(labels[labels >= 0], minlength=num_classes)
    return "balanced" if (labels >= 0).all() and sizes.max() - sizes.min() <= 1 else "as given"


def matching(asked: Tensor, labels: Tensor, seed: int) -> Tensor | None:
    """Indices of real images, as many of each class as are asked for; -1 takes any class.

    Args:
        asked: labels, int64 of shape (n,).
        labels: of the real images, shape (M,).
        seed: of the choice among them.

    Returns:
        n different indices; None if there are too few images of a class.
    """
    left = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen: list[Tensor] = []
    classes, sizes = asked.unique(return_counts=True)
    for label, size in zip(classes.flip(0).tolist(), sizes.flip(0).tolist(), strict=True):  # "any" comes last
        fits = (labels[left] == label) | (label < 0)
        taken = fits & (fits.cumsum(0) <= size)
        if taken.sum() < size:
            return None
        chosen.append(left[taken])
        left = left[~taken]
    return torch.cat(chosen)


def _take(found: Features, which: slice | Tensor) -> Features:
    return Features(found.features[which], None if found.logits is None else found.logits[which])
