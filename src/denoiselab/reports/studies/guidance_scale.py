"""Study (b): what a guidance scale does to adherence and to diversity, guiding always and in an interval of noise levels.

Adherence is the share of samples that are classified as asked; diversity is the distance between samples of one class, and
recall, the share of real images with a sample near them. On a density with classes both denoisers and the classifier are the
best ones, in closed form; on a trained run the classifier is the feature extractor's. All settings share noise and labels, so
their differences are paired; errors are those of a jackknife over blocks of samples with all classes in each. (On
Gaussians intervals of 95 % cover 95 % for diversity, and 99 % for recall, which is no smooth function of the samples.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser
from denoiselab.diffusion.guidance import ClassifierFree
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.features import Extractor, FeatureSet
from denoiselab.evaluation.generate import balanced_labels
from denoiselab.evaluation.intervals import jackknife_interval, wilson
from denoiselab.evaluation.measures import Adherence
from denoiselab.evaluation.neighbours import precision_recall
from denoiselab.reports.studies.claims import Claim, Difference, Interval, estimated
from denoiselab.reports.studies.classes import three_arcs
from denoiselab.reports.studies.figures import plot_guidance
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
from denoiselab.reports.studies.texts import GUIDANCE, GUIDANCE_CAPTION

NEIGHBOURS = 3  # a ball of recall reaches up to this one
MOST_BLOCKS = 20
ALWAYS, LIMITED, REAL = "everywhere", "in the interval", "real"
MEASURES = ("accuracy", "class_diversity", "recall")


@dataclass(frozen=True)
class Found:
    """One measure of the samples of one setting.

    Args:
        data: which.
        guided: at all noise levels or in the interval; or real images instead of samples.
        scale: of the guidance.
        measure: one of `MEASURES`.
        value: of all samples.
        left_out: with each block of samples left out, float64 of shape (blocks,).
        count: of the samples.
    """

    data: str
    guided: str
    scale: float
    measure: str
    value: float
    left_out: Tensor
    count: int

    @property
    def interval(self) -> Interval:
        """Of 95 %, by itself: Wilson's for a share of samples, the jackknife's otherwise."""
        if self.measure == "accuracy":
            return wilson(self.value, self.count)
        low, high = jackknife_interval(self.value, self.left_out.tolist())
        return (low, min(high, 1.0)) if self.measure == "recall" else (low, high)

    def row(self) -> dict[str, Any]:
        """Of the table."""
        low, high = self.interval
        kept = {key: value for key, value in vars(self).items() if key != "left_out"}
        return kept | {"low": low, "high": high}


def jackknife_error(left_out: Tensor) -> float:
    """The standard error of a number that was computed with each of B blocks left out (Efron & Tibshirani 1993, eq. 11.5)."""
    blocks = len(left_out)
    return float((left_out - left_out.mean()).square().sum() * (blocks - 1) / blocks) ** 0.5


def measured(images: FeatureSet, real: Tensor) -> list[float]:
    """Accuracy, class diversity and recall of samples, as they are measured of any run; `real` is (M, D)."""
    nothing: Any = None  # to compare with: the first two are of the samples alone
    found = Adherence()(images, nothing, "")
    recall = precision_recall(images.features, real, neighbours=NEIGHBOURS)[1]
    return [found["accuracy"].value, found["class_diversity"].value, recall]


def measurements(images: FeatureSet, real: Tensor, data: str, guided: str, scale: float) -> list[Found]:
    """All measures of one setting, also with each block of samples left out in turn.

    Args:
        images: samples with their labels, the classes in turn.
        real: features of real images, (M, D).
        data: which.
        guided: how.
        scale: of the guidance.
    """
    count, classes = len(images), int(images.labels.max()) + 1
    blocks = min(MOST_BLOCKS, count // classes)
    block = torch.arange(count) // classes % blocks  # a turn of the classes stays together
    left_out = [measured(images.take(block != b), real) for b in range(blocks)]
    columns = torch.tensor(left_out, dtype=torch.float64).T
    return [
        Found(data, guided, scale, *each, count) for each in zip(MEASURES, measured(images, real), columns, strict=True)
    ]


class GuidanceScale(Study):
    """Adherence and diversity against the guidance scale, with and without an interval.

    Args:
        scales: increasing, from 1 (no guidance) on.
        sigma_min: lower end of the interval of σ/α, at least 0.
        sigma_max: its upper end.
        extractor: a classifier of the data's classes.
        sampler: of the exact part.
        path: of the exact part.
        images: drawn from the run for each setting, at least 20 a class.
        points: drawn from the exact density for each setting, at least 60.
        margin: adherence is "kept" if less than this is lost, in (0, 1).
        batch_size: images per network call.
        seed: of the noise.
    """

    def __init__(
        self,
        *,
        scales: list[float],
        sigma_min: float,
        sigma_max: float,
        extractor: Extractor,
        sampler: Sampler,
        path: Path,
        images: int = 1000,
        points: int = 2000,
        margin: float = 0.02,
        batch_size: int = 250,
        seed: int = 0,
    ) -> None:
        at_least({"images": (images, 20), "points": (points, 60), "batch_size": (batch_size, 1), "seed": (seed, 0)})
        increasing("scales", scales, 1)
        if scales[0] != 1:
            raise ValueError(f"scales={scales}: must begin with 1, which is no guidance")
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min}: must be at least 0 and below sigma_max={sigma_max}")
        if not 0 < margin < 1:
            raise ValueError(f"margin={margin}: must be in (0, 1)")
        self.scales, self.sigma_min, self.sigma_max, self.margin = scales, sigma_min, sigma_max, margin
        self.extractor, self.sampler, self.path = extractor, sampler, path
        self.images, self.points, self.batch_size, self.seed = images, points, batch_size, seed

    def check(self, laboratory: Laboratory) -> None:
        """That the run can be guided and classified."""
        model = laboratory.run()
        run, data = model.facts["run"], model.data
        if not model.knows_null:
            raise ValueError(
                f"run={run}: was not trained without labels at times (objective.label_dropout), or has none"
            )
        if self.extractor.num_classes != data.num_classes:
            known = self.extractor.num_classes
            raise ValueError(f"run={run}: has {data.num_classes} classes, and {self.extractor.name} knows {known}")
        self.extractor.check(channels=data.channels, resolution=data.resolution)
        if self.images < 20 * data.num_classes:
            raise ValueError(f"images={self.images}: must be at least {20 * data.num_classes}, 20 a class")

    def measure(self, laboratory: Laboratory) -> Findings:
        """The exact density, then the run."""
        model = laboratory.run()
        exact = self._on_density(laboratory.say)
        run = self._on_run(model, laboratory.say)
        steps = self._with_steps(model.sampler, model.denoiser).steps
        limits = {"low": self.sigma_min, "high": self.sigma_max}
        return Findings(
            title="Guidance scale, adherence and diversity",
            about=GUIDANCE.format(images=self.images, points=self.points, scales=self.scales[1:], **limits),
            claims=[*self._claims("exact density", exact), *self._claims("run", run)],
            rows=[found.row() for found in exact + run],
            tables={"Numbers": _table(exact + run)},
            pictures=[Picture("figure.png", plot_guidance(exact + run), GUIDANCE_CAPTION.format(**limits))],
            facts=model.facts
            | {"extractor": self.extractor.name, "extractor_hash": self.extractor.hash, "steps": steps}
            | {"images": self.images, "points": self.points, "seed": self.seed},
        )

    def _settings(self, denoiser: Denoiser) -> list[tuple[str, float, Denoiser]]:
        """Each way to guide, at scale 1 once."""
        found: list[tuple[str, float, Denoiser]] = [(ALWAYS, 1.0, denoiser), (LIMITED, 1.0, denoiser)]
        for scale in self.scales[1:]:
            low, high = self.sigma_min, self.sigma_max
            found.append((ALWAYS, scale, ClassifierFree(denoiser, scale=scale)))
            found.append((LIMITED, scale, ClassifierFree(denoiser, scale=scale, sigma_min=low, sigma_max=high)))
        return found

    def _measured(
        self,
        data: str,
        denoiser: Denoiser,
        draw: Callable[[Denoiser], FeatureSet],
        real: Tensor,
        say: Callable[[str], None],
    ) -> list[Found]:
        found = list[Found]()
        for guided, scale, guided_denoiser in self._settings(denoiser):
            if guided == LIMITED and scale == 1:  # the same samples
                found += [replace(f, guided=LIMITED) for f in found]
                continue
            say(f"{data}, scale {scale:g} {guided}")
            found += measurements(draw(guided_denoiser), real, data, guided, scale)
        return found

    def _on_density(self, say: Callable[[str], None]) -> list[Found]:
        data, classes, labels = "exact density", three_arcs(), torch.arange(self.points) % 3
        denoiser, real = classes.denoiser(self.path), classes.sample(labels, self.seed)
        points, index = self.sampler.plan(denoiser)[0], torch.arange(self.points)

        def seen(x: Tensor) -> FeatureSet:
            return FeatureSet(x, labels, classes.log_posterior(x), classes=len(classes.mixtures))

        def draw(guided: Denoiser) -> FeatureSet:
            noise = NoiseSource(seed=self.seed, index=index)
            start = points[0].sigma * noise.normal("start", (2,), torch.float64)
            return seen(self.sampler.integrate(guided, start, points, Condition(label=labels), noise))

        found = self._measured(data, denoiser, draw, real, say)
        return found + measurements(seen(classes.sample(labels, self.seed + 1)), real, data, REAL, 0.0)

    def _on_run(self, model: Model, say: Callable[[str], None]) -> list[Found]:
        sampler = self._with_steps(model.sampler, model.denoiser)
        self.extractor.to(model.device)
        labels = balanced_labels(self.images, model.data.num_classes)
        assert labels is not None
        real = self.extractor(real_images(model.data, "train")[0], self.batch_size).features

        def seen(images: Tensor, asked: Tensor) -> FeatureSet:
            found = self.extractor(images, self.batch_size)
            return FeatureSet(found.features, asked, found.logits, classes=model.data.num_classes)

        def draw(guided: Denoiser) -> FeatureSet:
            how = {"count": self.images, "seed": self.seed, "batch_size": self.batch_size}
            return seen(model.images(sampler, denoiser=guided, **how), labels)

        found = self._measured("run", model.denoiser, draw, real, say)
        # recall depends on the number of images, and there are not as many real ones
        test = measurements(seen(*real_images(model.data, "test")), real, "run", REAL, 0.0)
        return found + [value for value in test if value.measure != "recall"]

    @staticmethod
    def _with_steps(sampler: Sampler, denoiser: Denoiser) -> Sampler:
        """The sampler with as many steps, guided or not, as its budget allows without guidance."""
        fixed = copy.copy(sampler)
        if not sampler.adaptive:
            fixed.nfe, fixed.steps = None, len(sampler.plan(denoiser)[0]) - 1
        return fixed

    def _claims(self, on: str, found: list[Found]) -> list[Claim]:
        by = {(f.guided, f.scale, f.measure): f for f in found}
        last = self.scales[-1]

        def less(measure: str, more: tuple[str, float], than: tuple[str, float], margin: float = 0.0) -> Difference:
            """How much more of a measure there is in one setting than in another; blocks are paired."""
            a, b = by[*more, measure], by[*than, measure]
            what = f"{measure}, {a.guided} at {a.scale:g} less {b.guided} at {b.scale:g}"
            error, freedom = jackknife_error(a.left_out - b.left_out), len(a.left_out) - 1
            return estimated(
                what + (f", plus {margin:g}" if margin else ""), a.value - b.value + margin, error, freedom
            )

        steps, above_one = list(pairwise(self.scales)), self.scales[1:]
        texts = {
            f"Guidance at scale {last:g} makes more samples read as asked than none": [
                less("accuracy", (ALWAYS, last), (ALWAYS, 1.0))
            ],
            "So does each increase of the scale": [
                less("accuracy", (ALWAYS, high), (ALWAYS, low)) for low, high in steps
            ],
            "Each increase of the scale makes samples of one class more alike": [
                less("class_diversity", (ALWAYS, low), (ALWAYS, high)) for low, high in steps
            ],
            "Each increase of the scale lowers recall": [
                less("recall", (ALWAYS, low), (ALWAYS, high)) for low, high in steps
            ],
            "At equal scale, guiding in the interval alone keeps more diversity and recall": [
                less(measure, (LIMITED, scale), (ALWAYS, scale)) for measure in MEASURES[1:] for scale in above_one
            ],
            f"… and loses less than {self.margin:.0%} of adherence": [
                less("accuracy", (LIMITED, scale), (ALWAYS, scale), self.margin) for scale in above_one
            ],
        }
        return [Claim(text, on, differences) for text, differences in texts.items()]


def _table(found: list[Found]) -> list[list[str]]:
    by: dict[tuple[str, str, float], dict[str, Found]] = {}
    for f in found:
        by.setdefault((f.data, f.guided, f.scale), {})[f.measure] = f

    def cell(f: Found | None) -> str:
        return "" if f is None else f"{f.value:.3f} [{f.interval[0]:.3f}, {f.interval[1]:.3f}]"

    lines = [["data", "guided", "scale", *MEASURES]]
    for (data, guided, scale), values in by.items():
        if guided == LIMITED and scale == 1:
            continue
        lines.append([data, guided, f"{scale:g}" if scale else "–", *(cell(values.get(m)) for m in MEASURES)])
    return lines
