"""The metrics of a run: which numbers are measured, on how many samples, beside which floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.evaluation.bits import BitsPerDim
from denoiselab.evaluation.collect import Clock, broadcast, collect, ranks
from denoiselab.evaluation.counting import Counting
from denoiselab.evaluation.features import Extractor, FeatureSet
from denoiselab.evaluation.generate import Source
from denoiselab.evaluation.measures import Measure, Memorisation, Pair, SpatialFrechet, Value
from denoiselab.evaluation.records import Number, count_name
from denoiselab.evaluation.reference import Data, Reference, published, reference

MIN_COUNT = 4  # a ball up to the 3rd neighbour takes four samples
MAX_COUNT = 100_000_000
PAIRS = 8  # the closest pairs of sample and training image that are reported


@dataclass(frozen=True)
class Measured:
    """What a measurement found; the same on every rank, but for the seconds.

    Args:
        numbers: smallest count first.
        seconds: spent on network, features, reference, statistics and intervals.
        closest: the samples nearest to a training image in the first extractor's features, nearest first.
        images: these samples, each before its training image, uint8 of shape (2 pairs, C, H, W), on rank 0; else None.
    """

    numbers: list[Number]
    seconds: dict[str, float]
    closest: list[Pair]
    images: Tensor | None = None


class Metrics:
    """Measures images against the training images, and real test images beside them as the floor.

    Each image is drawn once and shown to every extractor; every measure is taken of every extractor that gives what it
    needs. A number's name ends in its sample count, since most depend on it: `fid_50k`, `fd_digits_500`.

    The floor is the same number for as many test images with the same labels. Where the test split is too small for
    that, numbers whose expectation does not depend on the count take the whole split, the others have no floor.

    Args:
        extractors: of features, by a name of their own; with no extractor and no counts nothing is measured.
        measures: by a name of their own; null leaves one out.
        counts: sample counts, each at least 4; count n is measured on the first n samples. At all but the largest, only
            the measures that say so are taken.
        every: optimizer steps between measurements in training; null measures at the end only.
        every_counts: sample counts of those; null takes the smallest of `counts`.
        weights: which weights are measured in training: "raw" or names of averages; null takes the first average.
        references: published statistics (npz) by the extractor's name, in place of the training images' moments; null: none.
        batch_size: images per pass of an extractor.
        seed: keys the samples drawn for the metrics, and the choice of test images behind the floors.
        bits_per_dim: the likelihood of test images, measured by `evaluate`; null: not measured.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        *,
        extractors: dict[str, Extractor | None],
        measures: dict[str, Measure | None],
        counts: list[int],
        every: int | None = None,
        every_counts: list[int] | None = None,
        weights: list[str] | None = None,
        references: dict[str, str | None] | None = None,
        batch_size: int = 250,
        seed: int = 0,
        bits_per_dim: BitsPerDim | None = None,
    ) -> None:
        self.extractors = {name: extractor for name, extractor in extractors.items() if extractor is not None}
        self.measures = {name: measure for name, measure in measures.items() if measure is not None}
        if bool(counts) != bool(self.extractors):
            raise ValueError(f"counts={counts}: must be {'one or more' if extractors else 'empty without extractors'}")
        if bool(self.extractors) != bool(self.measures):
            raise ValueError(f"measures={list(self.measures)}: one at least where there is an extractor, else none")
        for key, given in (("counts", counts), ("every_counts", every_counts or [])):
            if any(count < MIN_COUNT for count in given):
                raise ValueError(f"{key}={given}: each must be at least {MIN_COUNT}")
            if any(count > MAX_COUNT for count in given):
                raise ValueError(f"{key}={given}: each must be at most {MAX_COUNT:,}")
        for key, value, lowest in (("every", every, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value is not None and value < lowest:
                raise ValueError(f"{key}={value}: must be at least {lowest}{', or null' if key == 'every' else ''}")
        self.references = {name: path for name, path in (references or {}).items() if path is not None}
        for name, path in self.references.items():
            if name not in self.extractors:
                raise ValueError(f"references.{name}={path}: must be one of {', '.join(self.extractors) or 'none'}")
        self.counts, self.every, self.weights = sorted(set(counts)), every, weights
        self.every_counts = sorted(set(every_counts or self.counts[:1]))
        self.batch_size, self.seed, self.bits_per_dim = batch_size, seed, bits_per_dim
        self._references: dict[tuple[str, ...], tuple[Reference | None, Reference | None]] = {}
        self._floors: dict[tuple[Any, ...], dict[str, Value]] = {}

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
            ValueError: if weights or statistics are missing or wrong, or an extractor is not for such images; the message
                begins with "extractors.<name>." or "references.<name>=" unless it is about the data.
        """
        for name, extractor in self.extractors.items():
            try:
                extractor.check(channels=channels, resolution=resolution)
            except ValueError as error:
                about_data = str(error).partition("=")[0] in ("channels", "resolution")
                raise ValueError(f"{'' if about_data else f'extractors.{name}.'}{error}") from error
            known = extractor.num_classes
            if known is not None and num_classes not in (0, known):
                raise ValueError(f"num_classes={num_classes}: the {extractor.name} extractor knows {known} classes")
        labels = [extractor.label for extractor in self.extractors.values()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"extractors={list(self.extractors)}: must have different labels, not {', '.join(labels)}")
        for name, path in self.references.items():
            try:
                real = published(Path(path))
            except ValueError as error:
                raise ValueError(f"references.{name}={error}") from error
            height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
            found = self.extractors[name](torch.zeros(1, channels, height, width, dtype=torch.uint8))
            if found.features.shape[1:] != real.moments.mean.shape:
                theirs, ours = real.moments.mean.shape[0], found.features.shape[1]
                raise ValueError(f"references.{name}={path}: has {theirs} features, the extractor {ours}")
            if found.spatial is None:
                continue
            if real.spatial is None and any(isinstance(m, SpatialFrechet) for m in self.measures.values()):
                raise ValueError(f"references.{name}={path}: has no mu_s and sigma_s; leave spatial_frechet out")
            if real.spatial is not None and found.spatial.shape[1:] != real.spatial.mean.shape:
                theirs, ours = real.spatial.mean.shape[0], found.spatial.shape[1]
                raise ValueError(f"references.{name}={path}: has {theirs} spatial features, the extractor {ours}")

    def measure(
        self,
        source: Source,
        labels: Tensor,
        data: Data,
        protocol: dict[str, Any],
        *,
        counts: Sequence[int] | None = None,
        shards: Path | None = None,
        advance: Callable[[int], None] | None = None,
        counting: Counting | None = None,
    ) -> Measured:
        """The numbers of a set of images; to be called on every rank.

        Args:
            source: of the images, by their numbers.
            labels: the classes that were asked for, int64 of shape (N,), N at least the largest count; -1 is none.
            data: what the images are compared with.
            protocol: how the images were made (sampler, nfe, guidance, weights, seed), plain values.
            counts: other counts than `self.counts`.
            shards: a folder in which finished features are kept, so that the same call goes on from there.
            advance: told how many images were just finished on this rank.
            counting: what the source asks, if it counts; the protocol then says what a sample spent.

        Raises:
            ValueError: if there are too few images.
        """
        counts, clock = sorted(counts or self.counts), Clock()
        if not counts:
            return Measured([], {}, [])
        if len(labels) < counts[-1]:
            raise ValueError(f"counts={counts}: must be at most {len(labels)}, the number of images")
        labels = labels[: counts[-1]].cpu()
        found = collect(
            source,
            self.extractors,
            counts[-1],
            batch_size=self.batch_size,
            shards=shards,
            advance=advance,
            clock=clock,
        )
        if counting is not None:
            protocol = protocol | {"nfe_spent": counting.mean()}
        with clock("reference"):
            references = {name: self._real(name, extractor, data) for name, extractor in self.extractors.items()}
        result: tuple[list[Number], list[Pair]] | None = None
        pictures: Tensor | None = None
        if ranks()[0] == 0:
            numbers: list[Number] = []
            closest: list[Pair] = []
            for name, extractor in self.extractors.items():
                train, test = references[name]
                assert train is not None
                every = found[name]
                images = FeatureSet(every.features, labels, every.logits, every.spatial, extractor.num_classes)
                for count in counts:
                    some = images.take(slice(count))
                    numbers += self._numbers(name, some, data, train, test, protocol, count == counts[-1], clock)
                memory = next((m for m in self.measures.values() if isinstance(m, Memorisation)), None)
                if memory is not None and not closest:
                    with clock("statistics"):
                        closest = memory.closest(images, train, PAIRS)
            result = numbers, closest
            if closest:  # no image was kept, but each can be drawn again
                drawn = torch.cat([batch.cpu() for _, batch in source([pair.sample for pair in closest])])
                real_ones = torch.stack([data.train_set().image(pair.training) for pair in closest])
                pictures = torch.stack((drawn, real_ones), dim=1).flatten(0, 1)
        numbers, closest = broadcast(result)
        return Measured(numbers, clock.seconds, closest, pictures)

    def _real(self, name: str, extractor: Extractor, data: Data) -> tuple[Reference | None, Reference | None]:
        """The references of both splits on rank 0, remembered between measurements; the test split's may be missing."""
        key = (name, data.fingerprint("train"), data.fingerprint("test"))
        if key not in self._references:
            train = reference(data, "train", extractor, batch_size=self.batch_size)
            enough = len(data.test_set()) >= MIN_COUNT
            test = reference(data, "test", extractor, batch_size=self.batch_size) if enough else None
            self._references[key] = train, test
        return self._references[key]

    def _numbers(
        self,
        name: str,
        images: FeatureSet,
        data: Data,
        train: Reference,
        test: Reference | None,
        protocol: dict[str, Any],
        largest: bool,
        clock: Clock,
    ) -> list[Number]:
        """Every number of one count in one extractor's features."""
        extractor, count, numbers = self.extractors[name], len(images), list[Number]()
        given = published(Path(self.references[name])) if name in self.references else None
        for key, measure in self.measures.items():
            if not largest and not measure.every_count:
                continue
            real = given if given is not None and measure.moments_only else train
            with clock("intervals" if measure.slow else "statistics"):
                values = measure(images, real, extractor.label)
            with clock("reference"):
                floors = self._floor(key, name, images.labels, real, test)
            record = {
                **protocol,
                "extractor": extractor.name,
                "extractor_hash": extractor.hash,
                "resize": extractor.resize,
                "quantisation": "uint8",
                "count": count,
                "class_balance": class_balance(images.labels, data.num_classes),
                **real.facts,
                "reference_sample": None if measure.moments_only else len(real.numbers),
                "floor": "test",
                "floor_hash": data.fingerprint("test"),
                "floor_seed": self.seed,
                "measure": {"name": type(measure).__name__, **measure.settings()},
            }
            for base, value in values.items():
                floor = floors.get(base)
                numbers.append(
                    Number(
                        name=f"{base}_{count_name(count)}",
                        value=value.value,
                        floor=None if floor is None else floor.value,
                        protocol=record,
                        interval=value.interval,
                        jackknife=value.jackknife,
                    )
                )
        return numbers

    def _floor(self, key: str, name: str, asked: Tensor, real: Reference, test: Reference | None) -> dict[str, Value]:
        """The values of real test images with the labels `asked`, remembered between measurements."""
        if test is None or test.sample is None:
            return {}
        classes, sizes = asked.unique(return_counts=True)
        facts = (real.facts["reference_hash"], test.facts["reference_hash"], *classes.tolist(), *sizes.tolist())
        if (key, name, *facts) not in self._floors:
            chosen = matching(asked, test.sample.labels, self.seed)
            images = test.sample if chosen is None else test.sample.take(chosen)
            values = self.measures[key](images, real, self.extractors[name].label)
            fair = {base: value for base, value in values.items() if chosen is not None or value.count_free}
            self._floors[(key, name, *facts)] = fair
        return self._floors[(key, name, *facts)]


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
