"""Study (c): does a network copy its training images less the more of them there are?

A sample is a copy if it is nearer to one training image than a third of its distance to any other (Yoon et al. 2023). What
looks like a copy need not be one: in a small or clustered set anything new may be near one image alone. So each rate stands
beside two controls: samples against as many real images that were never trained on, and real test images against the same
training images. The exact case has both extremes: the best denoiser of n points copies them, always, and the best denoiser of
the density that they are from does not know them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.data.digits import in_turn
from denoiselab.diffusion.exact import Mixture
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.features import Extractor
from denoiselab.evaluation.intervals import wilson
from denoiselab.evaluation.neighbours import two_nearest
from denoiselab.reports.studies.claims import Claim, Interval, above, shares
from denoiselab.reports.studies.figures import plot_copying
from denoiselab.reports.studies.study import (
    Findings,
    Laboratory,
    Model,
    Picture,
    Study,
    at_least,
    increasing,
    real_images,
)
from denoiselab.reports.studies.texts import COPYING, COPYING_CAPTION

RATIO = 1 / 3  # of the distances to the nearest and the second nearest, below which a sample is a copy
SAMPLES, HELD_OUT, REAL = "samples, training images", "samples, images held out", "real images, training images"
IDEAL, DENSITY, FRESH = "ideal denoiser of the training set", "ideal denoiser of the density", "fresh draws"
MOST_IDEAL = 300  # samples of the ideal denoiser of images, which compares each with every one
SPREAD, PARTS, DIMENSIONS = 0.25, 10, 16  # of the exact density: a mixture of Gaussians whose means are standard normal


@dataclass(frozen=True)
class Rate:
    """How many of some images are copies.

    Args:
        space: where distances are measured.
        size: of the training set.
        what: which images, and what they are compared with.
        copies: how many of them are copies.
        count: of how many.
        others: with how many they are compared.
    """

    space: str
    size: int
    what: str
    copies: int
    count: int
    others: int

    @property
    def share(self) -> tuple[int, int]:
        """Copies and count."""
        return self.copies, self.count

    @property
    def value(self) -> float:
        """The share of copies."""
        return self.copies / self.count

    @property
    def interval(self) -> Interval:
        """Of 95 %, by itself."""
        return wilson(self.share[0] / self.share[1], self.share[1])

    def row(self) -> dict[str, Any]:
        """Of the table."""
        low, high = self.interval
        return vars(self) | {"rate": self.value, "low": low, "high": high}


def copies(points: Tensor, others: Tensor) -> int:
    """How many of the points (N, D) are copies of one of the others (M, D), M at least 2."""
    return int((two_nearest(points, others).ratios() < RATIO).sum())


@dataclass(frozen=True)
class Strip:
    """Samples of one run over the training images nearest to them.

    Args:
        size: of the training set.
        samples: uint8 of shape (n, C, H, W).
        nearest: of the same shape.
    """

    size: int
    samples: Tensor
    nearest: Tensor


class Copying(Study):
    """Copy rate against the size of the training set.

    Args:
        sizes: increasing, from 2 on; `datamodule.train_size` of the runs.
        steps: of the training of each run, at least 1.
        train: further overrides of these runs, as for `train.py`.
        extractor: of the features in which copies are looked for, beside pixels.
        sampler: of the exact part.
        path: of the exact part.
        images: drawn from each run, at least 20.
        points: drawn from the exact density, at least 20.
        margin: a rate is "no more than the control" if it exceeds it by less than this, in (0, 1).
        batch_size: samples per network call.
        seed: of training and of noise.
    """

    def __init__(
        self,
        *,
        sizes: list[int],
        steps: int,
        train: list[str],
        extractor: Extractor,
        sampler: Sampler,
        path: Path,
        images: int = 500,
        points: int = 2500,
        margin: float = 0.05,
        batch_size: int = 250,
        seed: int = 0,
    ) -> None:
        at_least({"steps": (steps, 1), "images": (images, 20), "points": (points, 20)})
        at_least({"batch_size": (batch_size, 1), "seed": (seed, 0)})
        increasing("sizes", sizes, 2)
        if not 0 < margin < 1:
            raise ValueError(f"margin={margin}: must be in (0, 1)")
        self.sizes, self.steps, self.train, self.extractor = sizes, steps, train, extractor
        self.sampler, self.path, self.images, self.points, self.margin = sampler, path, images, points, margin
        self.batch_size, self.seed = batch_size, seed

    def _plan(self, laboratory: Laboratory, size: int) -> Any:
        changes = [f"datamodule.train_size={size}", f"trainer.max_steps={self.steps}", f"seed={self.seed}", *self.train]
        return laboratory.plan(f"copying_{size}", changes)

    def check(self, laboratory: Laboratory) -> None:
        """That every run can be trained."""
        for size in self.sizes:
            self._plan(laboratory, size)

    def measure(self, laboratory: Laboratory) -> Findings:
        """Train, draw and compare, then the exact part."""
        models: dict[int, Model] = {}
        for size in self.sizes:
            laboratory.say(f"training on {size} images")
            models[size] = self._plan(laboratory, size)()
        rates, strips = list[Rate](), list[Strip]()
        everything = real_images(models[self.sizes[-1]].data, "train")
        for size, model in models.items():
            laboratory.say(f"samples of the run on {size} images")
            found, strip = self._of_run(model, size, everything)
            rates += found
            strips.append(strip)
        for size in self.sizes:
            laboratory.say(f"exact: {size} points")
            rates += self._of_density(size)
        return Findings(
            title="Size of the training set and copies",
            about=COPYING.format(steps=self.steps, images=self.images, parts=PARTS, dimensions=DIMENSIONS),
            claims=self._claims(rates),
            rows=[rate.row() for rate in rates],
            tables={"Numbers": _table(rates, self.sizes)},
            pictures=[Picture("figure.png", plot_copying(rates, strips), COPYING_CAPTION)],
            facts={
                "runs": {size: model.facts["run"] for size, model in models.items()},
                "sampler": models[self.sizes[0]].facts["sampler"],
                "extractor": self.extractor.name,
                "extractor_hash": self.extractor.hash,
                "ratio": RATIO,
                "images": self.images,
                "points": self.points,
                "seed": self.seed,
            },
        )

    def _of_run(self, model: Model, size: int, everything: tuple[Tensor, Tensor]) -> tuple[list[Rate], Strip]:
        self.extractor.to(model.device)
        train, _ = real_images(model.data, "train")
        test, test_labels = real_images(model.data, "test")
        held_out = _never_trained_on(train, everything, (test, test_labels))
        samples = model.images(model.sampler, count=self.images, seed=self.seed, batch_size=self.batch_size)
        points = model.codec.encode(train).flatten(1)
        ideal = self._drawn(Mixture([1 / size] * size, points.tolist(), [0.0] * size), min(self.images, MOST_IDEAL))
        ideal_images = model.codec.decode(ideal.reshape(-1, *model.shape)).cpu()
        found = list[Rate]()
        for space in ("pixels", f"{self.extractor.name} features"):

            def at(images: Tensor, space: str = space) -> Tensor:
                """Where images are in this space."""
                if space == "pixels":
                    return images.flatten(1).double() / 255
                return self.extractor(images, self.batch_size).features

            for what, images, others in (
                (SAMPLES, samples, train),
                (HELD_OUT, samples, held_out),
                (REAL, test, train),
                (IDEAL, ideal_images, train),
            ):
                found.append(Rate(space, size, what, copies(at(images), at(others)), len(images), len(others)))
        shown = samples[:6]
        nearest = two_nearest(shown.flatten(1).double(), train.flatten(1).double()).indices[:, 0]
        return found, Strip(size, shown, train[nearest])

    def _drawn(self, mixture: Mixture, count: int) -> Tensor:
        """Points that the sampler draws with a mixture's best denoiser."""
        denoiser, parts = mixture.denoiser(self.path), list[Tensor]()
        points = self.sampler.plan(denoiser)[0]
        for index in torch.arange(count).split(50):  # every point is compared with every part
            noise = NoiseSource(seed=self.seed, index=index)
            x = points[0].sigma * noise.normal("start", mixture.means.shape[1:], torch.float64)
            parts.append(self.sampler.integrate(denoiser, x, points, Condition(), noise))
        return torch.cat(parts)

    def _of_density(self, size: int) -> list[Rate]:
        def drawn(purpose: str, count: int) -> Tensor:
            noise = NoiseSource(seed=self.seed, index=torch.arange(count))
            normal = noise.normal(f"{purpose} normal", (DIMENSIONS,), torch.float64)
            return normal if purpose == "means" else density.sample(normal, noise.uniform(purpose))

        density = Mixture([1 / PARTS] * PARTS, drawn("means", PARTS).tolist(), [SPREAD] * PARTS)
        train, fresh = drawn("train", size), drawn("fresh", self.points)
        empirical = Mixture([1 / size] * size, train.tolist(), [0.0] * size)
        sets = {IDEAL: self._drawn(empirical, self.points), DENSITY: self._drawn(density, self.points), FRESH: fresh}
        return [Rate("exact", size, what, copies(points, train), len(points), size) for what, points in sets.items()]

    def _claims(self, rates: list[Rate]) -> list[Claim]:
        by = {(rate.space, rate.what, rate.size): rate.share for rate in rates}
        spaces = list(dict.fromkeys(rate.space for rate in rates if rate.space != "exact"))
        first, last = self.sizes[0], self.sizes[-1]
        claims = list[Claim]()
        for space in spaces:

            def share(what: str, size: int, space: str = space) -> tuple[int, int]:
                return by[space, what, size]

            claims += [
                Claim(
                    f"The copy rate is lower with {last} training images than with {first}",
                    space,
                    [shares(f"{first} → {last} images", share(SAMPLES, first), share(SAMPLES, last))],
                ),
                Claim(
                    f"It falls with each increase of the training set ({', '.join(map(str, self.sizes))})",
                    space,
                    [
                        shares(f"{few} → {more} images", share(SAMPLES, few), share(SAMPLES, more))
                        for few, more in pairwise(self.sizes)
                    ],
                ),
                Claim(
                    f"With {first} training images it is above both controls",
                    space,
                    [shares(f"less {what}", share(SAMPLES, first), share(what, first)) for what in (HELD_OUT, REAL)],
                ),
                Claim(
                    f"With {last} training images it exceeds that of real test images by less than {self.margin:.0%}",
                    space,
                    [shares(f"{REAL}, plus {self.margin:.0%}", share(REAL, last), share(SAMPLES, last), self.margin)],
                ),
            ]
        margin = f"{self.margin:.0%}"
        always = [
            above(f"{space}, {size}", by[space, IDEAL, size], 1 - self.margin)
            for space in (*spaces, "exact")
            for size in self.sizes
        ]
        never = [
            shares(f"{size} points, plus {margin}", by["exact", FRESH, size], by["exact", DENSITY, size], self.margin)
            for size in self.sizes
        ]
        return [
            *claims,
            Claim(f"The ideal denoiser of the training set copies all the time but {margin}", "all three", always),
            Claim(f"That of the density copies less than {margin} more often than fresh draws do", "exact", never),
        ]


def _never_trained_on(train: Tensor, everything: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Tensor:
    """As many images as were trained on, or all there are, that were not: classes in turn."""
    known = {image.numpy().tobytes() for image in train}
    fresh = torch.tensor([image.numpy().tobytes() not in known for image in everything[0]])
    images, labels = (torch.cat((part[fresh], more)) for part, more in zip(everything, test, strict=True))
    return images[in_turn(labels, min(len(train), len(images)))]


def _table(rates: list[Rate], sizes: list[int]) -> list[list[str]]:
    by = {(rate.space, rate.what, rate.size): rate for rate in rates}
    kinds = list(dict.fromkeys((rate.space, rate.what) for rate in rates))

    def cell(rate: Rate) -> str:
        low, high = rate.interval
        short = f" (of {rate.others})" if rate.others < rate.size else ""
        return f"{100 * rate.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]{short}"

    headings = ["space", "copies among", *(f"{size} images" for size in sizes)]
    return [headings, *([*kind, *(cell(by[*kind, size]) for size in sizes)] for kind in kinds)]
