"""Study (a): does the error of each band of spatial frequency shrink with more steps, and with which sign?

Two quantities for each octave of spatial frequency. *Power*, signed: what a sampler draws over what it should draw, in
decibels; negative where it blurs, positive where it rings. *Distance*, without sign: how far its Fourier coefficients are
from the right ones, relative to these; errors that cancel in the power do not cancel here. On a Gaussian field with a
power law both are computed exactly. On a trained run the right ones are those of the ODE's solution from the same noise,
which an adaptive solver finds; the power is also held against that of the test images, where the network's own error is
in it, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from denoiselab.diffusion.paths import Path
from denoiselab.diffusion.samplers import Sampler
from denoiselab.evaluation.intervals import quantile
from denoiselab.reports.studies.claims import Claim, Difference, Interval, estimated
from denoiselab.reports.studies.figures import plot_frequency
from denoiselab.reports.studies.spectrum import Field, Response, decibels, in_octaves, octave_power, octaves
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
from denoiselab.reports.studies.texts import FREQUENCY, FREQUENCY_DISTANCE, FREQUENCY_POWER

REPLICATES = 1000  # of the bootstrap
SOLUTION, TEST = "run, against its ODE", "run, against test images"
NO_SAMPLER = "ODE solution"


@dataclass(frozen=True)
class Level:
    """One quantity in one band.

    Args:
        data: what was drawn, and what it is compared with.
        quantity: the power over what it should be, in decibels; or the distance, relative.
        sampler: by name.
        steps: of the sampler.
        band: in cycles per image.
        value: of the quantity.
        replicates: the same of each bootstrap sample; none where it is computed exactly.
    """

    data: str
    quantity: Literal["power", "distance"]
    sampler: str
    steps: int
    band: str
    value: float
    replicates: Tensor

    @property
    def interval(self) -> Interval:
        """Of 95 %, by itself."""
        half = quantile() * _spread(self.replicates)
        return self.value - half, self.value + half

    @property
    def name(self) -> str:
        """What it is of, in a few words."""
        return f"{self.data}, {self.sampler}, {self.band} cycles, {self.steps}"

    def row(self) -> dict[str, Any]:
        """Of the table."""
        low, high = self.interval
        return {key: value for key, value in vars(self).items() if key != "replicates"} | {"low": low, "high": high}


def shrinks(few: Level, more: Level) -> Difference:
    """By how many decades the distance is smaller with more steps; the bootstrap samples are paired."""
    error = _spread((few.replicates / more.replicates).log10())
    return estimated(f"{few.name} → {more.steps} steps", math.log10(few.value / more.value), error)


def blurs(level: Level) -> Difference:
    """How much power is missing."""
    return estimated(f"{level.name} steps", -level.value, _spread(level.replicates))


def _spread(replicates: Tensor) -> float:
    return float(replicates.std()) if len(replicates) else 0.0


class Frequency(Study):
    """Power and distance in each octave of spatial frequency against the number of steps.

    Args:
        samplers: by name; their number of steps is the study's. Those with noise of their own are compared with the law of
            the data alone, not with the ODE's solution.
        reference: solves the ODE of the trained run, from the same noise.
        paths: of the exact part, by name.
        steps: increasing, from 2 on.
        side: of the random field, in pixels, at least 4.
        slope: of its spectrum, |k|^−slope.
        images: drawn from the run, at least 20.
        batch_size: images per network call.
        seed: of the noise and the bootstrap.
    """

    def __init__(
        self,
        *,
        samplers: dict[str, Sampler],
        reference: Sampler,
        paths: dict[str, Path],
        steps: list[int],
        side: int = 32,
        slope: float = 2.0,
        images: int = 300,
        batch_size: int = 250,
        seed: int = 0,
    ) -> None:
        at_least({"images": (images, 20), "batch_size": (batch_size, 1), "seed": (seed, 0)})
        increasing("steps", steps, 2)
        for name, sampler in samplers.items():
            if sampler.adaptive:
                raise ValueError(f"samplers={name}: must not choose its own steps")
        if reference.stochastic:
            raise ValueError(f"reference={type(reference).__name__}: must follow the ODE, without noise of its own")
        self.samplers, self.reference, self.paths, self.steps = samplers, reference, paths, steps
        self.field = Field(side=side, slope=slope)
        self.slope, self.images, self.batch_size, self.seed = slope, images, batch_size, seed

    def check(self, laboratory: Laboratory) -> None:
        """That every sampler can take so many steps on every path."""
        model = laboratory.run()
        self.reference.plan(model.denoiser)
        for sampler in self.samplers.values():
            sampler.check(model.denoiser)
            for path in (model.denoiser.path, *self.paths.values()):
                for steps in self.steps:
                    sampler.points(path, steps)

    def measure(self, laboratory: Laboratory) -> Findings:
        """The exact field, then the run."""
        model = laboratory.run()
        exact = [level for name, path in self.paths.items() for level in self._on_field(name, path)]
        run = self._on_run(model, laboratory)
        claims = [*self._claims("exact field", exact), *self._claims("run", run)]
        levels, side = exact + run, len(self.field.power)
        return Findings(
            title="Steps and spatial frequency",
            about=FREQUENCY.format(slope=self.slope, side=side, images=self.images),
            claims=claims,
            rows=[level.row() for level in levels],
            tables={
                "The claims, sampler by sampler": self._by_sampler(exact, run),
                "Power, least … greatest over the bands": _table(levels, self.steps),
            },
            pictures=[
                Picture("power.png", plot_frequency(levels, "power"), FREQUENCY_POWER),
                Picture("distance.png", plot_frequency(levels, "distance"), FREQUENCY_DISTANCE),
            ],
            facts=model.facts | {"images": self.images, "seed": self.seed, "steps": self.steps},
        )

    def _on_field(self, name: str, path: Path) -> list[Level]:
        found, bands = list[Level](), list(octaves(*self.field.power.shape))
        for sampler_name, sampler in self.samplers.items():
            for steps in self.steps:
                response = Response(sampler, path, self.field, steps)
                quantities = {
                    "power": decibels(in_octaves(response.power), in_octaves(self.field.power)),
                    "distance": (in_octaves(response.squared_distance) / in_octaves(self.field.power)).sqrt(),
                }
                found += [
                    Level(f"exact, {name}", quantity, sampler_name, steps, band, value, torch.empty(0))  # type: ignore[arg-type]
                    for quantity, values in quantities.items()
                    for band, value in zip(bands, values.tolist(), strict=True)
                ]
        return found

    def _on_run(self, model: Model, laboratory: Laboratory) -> list[Level]:
        test = octave_power(real_images(model.data, "test")[0].float() / 127.5)
        random = np.random.default_rng(self.seed)
        own, others = _resampled(self.images, random), _resampled(len(test), random)
        to_solution, to_test = list[Level](), list[Level]()

        def draw(sampler: Sampler, steps: int | None) -> tuple[Tensor, Tensor]:
            """What the network draws, and the powers of the images that are made of it."""
            x = model.latents(sampler, steps=steps, count=self.images, seed=self.seed, batch_size=self.batch_size)
            return x, octave_power(model.codec.decode(x).float() / 127.5)

        def against_test(name: str, steps: int, power: Tensor) -> None:
            value, replicates = decibels(power.mean(0), test.mean(0)), decibels(own @ power, others @ test)
            for band, *both in zip(octaves(*model.data.size), value.tolist(), replicates.T, strict=True):
                to_test.append(Level(TEST, "power", name, steps, band, *both))

        def against_solution(name: str, steps: int, x: Tensor) -> None:
            power, squared = octave_power(x), octave_power(x - solution)
            value, replicates = decibels(power.mean(0), right.mean(0)), decibels(own @ power, own @ right)
            away, spread = (squared.mean(0) / right.mean(0)).sqrt(), (own @ squared / (own @ right)).sqrt()
            for i, band in enumerate(octaves(*model.shape[1:])):
                to_solution.append(Level(SOLUTION, "power", name, steps, band, float(value[i]), replicates[:, i]))
                to_solution.append(Level(SOLUTION, "distance", name, steps, band, float(away[i]), spread[:, i]))

        laboratory.say("the ODE's solution")
        solution, as_images = draw(self.reference, None)
        right = octave_power(solution)
        against_test(NO_SAMPLER, 0, as_images)
        for name, sampler in self.samplers.items():
            for steps in self.steps:
                laboratory.say(f"{name}, {steps} steps")
                x, as_images = draw(sampler, steps)
                against_test(name, steps, as_images)
                if not sampler.stochastic:
                    against_solution(name, steps, x)
        return to_solution + to_test

    def _claims(self, on: str, levels: list[Level]) -> list[Claim]:
        """What texts predict: errors shrink, from the fewest steps to the most and on the way, and few steps blur."""
        curves: dict[tuple[str, str, str, str], dict[int, Level]] = {}
        for level in levels:
            if level.data != TEST:
                key = (level.quantity, level.data, level.sampler, level.band)
                curves.setdefault(key, {})[level.steps] = level
        power, distance = ([c for key, c in curves.items() if key[0] == name] for name in ("power", "distance"))
        first, last = self.steps[0], self.steps[-1]
        texts = {
            f"From {first} to {last} steps the error of every band shrinks": [
                shrinks(curve[first], curve[last]) for curve in distance
            ],
            f"It shrinks with each increase of the steps ({', '.join(map(str, self.steps))})": [
                shrinks(curve[few], curve[more]) for curve in distance for few, more in pairwise(self.steps)
            ],
            f"With {first} steps every sampler blurs: every band has too little power": [
                blurs(curve[first]) for curve in power
            ],
        }
        return [Claim(text, on, differences) for text, differences in texts.items() if differences]

    def _by_sampler(self, exact: list[Level], run: list[Level]) -> list[list[str]]:
        """The verdicts on each sampler alone."""
        lines: list[list[str]] = []
        for name in self.samplers:
            claims = [self._claims("", [level for level in levels if level.sampler == name]) for levels in (exact, run)]
            cells = [[str(claim.verdict) for claim in found] or [""] * 3 for found in claims]
            lines.append([name, *cells[0], *cells[1]])
        first, last = self.steps[0], self.steps[-1]
        headings = (f"shrinks, {first} → {last}", "with each increase", f"blurs with {first} steps")
        return [["sampler", *(f"{on}: {heading}" for on in ("exact", "run") for heading in headings)], *lines]


def _resampled(count: int, random: np.random.Generator) -> Tensor:
    """The share of each of `count` images in each bootstrap sample, float64 of shape (replicates, count)."""
    drawn = random.multinomial(count, np.full(count, 1 / count), size=REPLICATES)
    return torch.from_numpy(drawn / count)


def _table(levels: list[Level], steps: list[int]) -> list[list[str]]:
    """Sampler by data: the least and the greatest signed error over the bands with the fewest and with the most steps."""
    power = [level for level in levels if level.quantity == "power"]
    kinds, names = (list(dict.fromkeys(getattr(level, key) for level in power)) for key in ("data", "sampler"))
    lines = [["sampler", "steps", *kinds]]
    for name in names:
        for count in [0] if name == NO_SAMPLER else [steps[0], steps[-1]]:
            cells = []
            for kind in kinds:
                found = [e.value for e in power if (e.data, e.sampler, e.steps) == (kind, name, count)]
                cells.append(f"{min(found):+.2f} … {max(found):+.2f} dB" if found else "")
            lines.append([name, str(count or "adaptive"), *cells])
    return lines
