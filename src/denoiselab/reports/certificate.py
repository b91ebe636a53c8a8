"""Certificates: what the paths, predictions and samplers claim, measured in float64 on densities with known answers.

- *conversion*: x0 and ε are read back from the prediction of random x0 and ε; largest error over the path. Pairs that are
  *refused* lose more than that.
- *order*: the probability-flow ODE of a mixture is solved between two noise levels inside the path; the slope of the
  error under halved steps. Multistep samplers are given exact starting values; *shipped* is the order with the start that
  their YAML has.
- *moments*: data is one Gaussian, for which every step is affine in x and the noise, so that the law of the samples is
  computed and not estimated: error of mean and standard deviation, relative to the latter, and how it falls with the steps.
- *few steps*: distance from the exact ODE solution at few evaluations, relative to the data's own spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser, Posterior, per_sample
from denoiselab.diffusion.exact import GAUSSIAN, MIXTURE, ExactDenoiser
from denoiselab.diffusion.grids import Karras
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path
from denoiselab.diffusion.prediction import Prediction, check_legal
from denoiselab.diffusion.samplers import CLEAN, Point, RungeKutta4, Sampler, Visit, points_of
from denoiselab.diffusion.samplers.base import point_at_level

LEVELS = (1.7, 1.05)  # σ/α between which orders are measured; the Laplace path has a kink at 1
START_LEVEL = 3.0
STEPS = (96, 192, 384, 768)  # halved until the slope has settled
GIVEN = 3  # starting values of multistep samplers
FEW = 10  # evaluations
# The bound on the distance from the ODE's solution at few steps is 0.5, but for samplers whose second slope is asked far from
# the solution. In the Laplace path's time nearly all noise levels lie at its two ends: there anything may happen.
NEAR = {"heun": 1.5, "heun_t": 1.5, "dpm_2": 1.5}
ANYTHING = {("euler_t", "laplace"), ("heun_t", "laplace"), ("pndm", "laplace")}
KARRAS = Karras(sigma_min=0.002, sigma_max=80.0)


@dataclass(frozen=True)
class Row:
    """One certified number.

    Args:
        subject: which prediction or sampler.
        path: on which path.
        check: conversion, refused, order, shipped, moments, rate, few steps or nfe.
        value: what was measured.
        low: the least it may be.
        high: the most it may be.
    """

    subject: str
    path: str
    check: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def inside(self) -> bool:
        """Whether it is inside its bound; NaN is not."""
        return self.low <= self.value <= self.high


def conversion(path: Path, prediction: Prediction) -> float:
    """Largest error of x0 and ε as they are read back; ∞ where they cannot be, or the network cannot be asked."""
    t = torch.linspace(path.t_min, path.t_max, 257, dtype=torch.float64)
    if not bool(prediction.c_noise(path, t).isfinite().all()):
        return math.inf
    x0, eps = NoiseSource(seed=0, index=torch.arange(257)).normal("pair", (2, 1, 2, 2), torch.float64).unbind(1)
    pair = prediction.pair(path, t)
    alpha, sigma, a, b = (per_sample(c, x0) for c in pair)
    output = a * x0 + b * eps
    said = NetworkDenoiser(network=lambda *_: output, path=path, prediction=prediction)(
        alpha * x0 + sigma * eps, t, Condition()
    )
    error = torch.maximum((said.x0 - x0).abs(), (said.eps - eps).abs())
    return float(error.nan_to_num(nan=math.inf).max())


def _noise(count: int) -> NoiseSource:
    return NoiseSource(seed=0, index=torch.arange(count))


def _start(point: Point, count: int = 64) -> Tensor:
    """Points of the mixture's law at a point of the path, (count, 1, 1, 2)."""
    noise = _noise(count)
    x0 = MIXTURE.sample(noise.normal("x0", (2,), torch.float64), noise.uniform("part"))
    return (point.alpha * x0 + point.sigma * noise.normal("eps", (2,), torch.float64)).reshape(count, 1, 1, 2)


def _between(path: Path, steps: int) -> list[Point]:
    """Points at equal times between the two levels, with `GIVEN` more of the same spacing before them."""
    first, last = (point_at_level(path, level).t for level in LEVELS)
    times = first + (last - first) / steps * torch.arange(-GIVEN, steps + 1, dtype=torch.float64)
    return points_of(path, times)


@lru_cache(maxsize=64)
def _exact(path: Path, steps: int) -> tuple[Tensor, ...]:
    """The ODE's solution at the first points of `_between` and at the last one, by Runge-Kutta with small steps."""
    solver, denoiser, points = RungeKutta4(grid=KARRAS, steps=1), MIXTURE.denoiser(path), _between(path, steps)
    xs = [_start(point_at_level(path, START_LEVEL))]
    stops = [point_at_level(path, START_LEVEL), *points[: GIVEN + 1], points[-1]]
    for (p, q), fine in zip(pairwise(stops), (64, 16, 16, 16, 1280), strict=True):
        between = points_of(path, torch.linspace(p.t, q.t, fine + 1, dtype=torch.float64))
        xs.append(solver.integrate(denoiser, xs[-1], between, Condition(), _noise(len(xs[0]))))
    return tuple(xs[1:])


def orders(sampler: Sampler, path: Path) -> tuple[float, float]:
    """The measured orders: from exact starting values, and with the sampler's own start.

    The steps are halved until both slopes are within a tenth of a whole number, or are the finest.
    """
    coarse, slopes = _ode_errors(sampler, path, STEPS[0]), (math.nan, math.nan)
    for steps in STEPS[1:]:
        fine = _ode_errors(sampler, path, steps)
        slopes = math.log2(coarse[0] / fine[0]), math.log2(coarse[1] / fine[1])
        if all(abs(slope - round(slope)) < 0.1 for slope in slopes):
            break
        coarse = fine
    return slopes


def _ode_errors(sampler: Sampler, path: Path, steps: int) -> tuple[float, float]:
    denoiser, points, xs = MIXTURE.denoiser(path), _between(path, steps), _exact(path, steps)
    before = [
        Visit(p, denoiser(x, torch.tensor(p.t, dtype=torch.float64), Condition()))
        for p, x in zip(points[:GIVEN], xs, strict=False)
    ]
    first, second = (
        sampler.integrate(denoiser, xs[GIVEN], points[GIVEN:], Condition(), _noise(len(xs[0])), given) - xs[-1]
        for given in (before, [])
    )
    return float(first.square().mean().sqrt()), float(second.square().mean().sqrt())


def moment_error(sampler: Sampler, path: Path, steps: int) -> float:
    """Error of mean and standard deviation on Gaussian data at the path's data end, propagated exactly.

    Row 0 of the batch is silent, row 1 starts one standard deviation off, row 2 + k hears noise 1 at step k: by linearity
    these are the gains.
    """
    path = _narrow(path)
    points = (sampler.points(path, steps) if sampler.adaptive else [*points_of(path, KARRAS(path, steps)), CLEAN])[:-1]
    rows = 2 + (steps if sampler.stochastic else 0)

    class Impulse(NoiseSource):
        def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
            z = torch.zeros(rows, *shape, dtype=torch.float64)
            z[2 + self.step :][:1] = 1
            return z

    def law(point: Point) -> tuple[Tensor, float]:
        """Mean and standard deviation of x_t."""
        return point.alpha * GAUSSIAN.mean, math.hypot(point.alpha * float(GAUSSIAN.stds[0]), point.sigma)

    (first_mean, first_std), (mean, std) = law(points[0]), law(points[-1])
    x = torch.zeros(rows, 1, 1, 2, dtype=torch.float64)
    x[1] = first_std
    noise = Impulse(seed=0, index=torch.arange(rows))
    end = sampler.integrate(GAUSSIAN.denoiser(path), x, points, Condition(), noise).flatten(1)

    gains = end[1:] - end[0]
    got_mean, got_std = end[0] + gains[0] * first_mean / first_std, gains.square().sum(0).sqrt()
    return float(torch.maximum((got_mean - mean).abs(), (got_std - std).abs()).max() / std)


@lru_cache(maxsize=64)
def _narrow(path: Path) -> Path:
    """The path between σ/α = 80 and 0.002, as far as it reaches there: every grid then starts in the same place."""
    narrow = copy(path)
    narrow.t_max, narrow.t_min = (point_at_level(path, level).t for level in (80.0, 0.002))
    return narrow


@lru_cache(maxsize=64)
def _solution(path: Path) -> tuple[Tensor, Tensor]:
    """Points at the noise end of a narrowed path, and the data that the ODE makes of them."""
    points = [*points_of(path, KARRAS(path, 400)), CLEAN]
    x = _start(points[0])
    return x, RungeKutta4(grid=KARRAS, steps=1).integrate(
        MIXTURE.denoiser(path), x, points, Condition(), _noise(len(x))
    )


def solution_error(sampler: Sampler, path: Path, steps: int) -> tuple[float, int]:
    """Distance from the ODE's solution (root mean square, of the data's own), and the evaluations that it took.

    Args:
        sampler: with the grid that its YAML has, or `KARRAS` where the path refuses that one.
        path: any; taken between σ/α = 80 and 0.002.
        steps: of the sampler; an adaptive one takes its own.
    """
    path = _narrow(path)
    x, exact = _solution(path)
    denoiser = _CountingDenoiser(path, MIXTURE)
    try:
        points = sampler.points(path, steps)
    except ValueError:  # its own grid is refused here, or cannot place so many
        points = [*points_of(path, KARRAS(path, steps)), CLEAN]
    end = sampler.integrate(denoiser, x, points, Condition(), _noise(len(x)))
    spread = (exact - exact.mean(0)).square().mean().sqrt()
    return float((end - exact).square().mean().sqrt() / spread), denoiser.count


class _CountingDenoiser(ExactDenoiser):
    """An exact denoiser that counts how often it is asked."""

    count = 0

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Posterior:
        self.count += 1
        return super().__call__(x, t, condition)


def certify_sampler(name: str, sampler: Sampler, on: str, path: Path) -> list[Row]:
    """All rows of a sampler on a path."""
    rows: list[Row] = []

    def add(check: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
        rows.append(Row(name, on, check, value, low, high))

    if sampler.adaptive:
        error, cost = solution_error(sampler, path, 1)
        add("few steps", error, 0, 1e-3)
        add("nfe", cost, 7)
        add("moments", moment_error(sampler, path, 1), 0, 1e-3)
        return rows
    if not sampler.stochastic:
        exact_start, shipped = orders(sampler, path)
        # PNDM averages over the path's time: more than its order where that is σ/α itself.
        at_most = math.inf if getattr(sampler, "variable", None) == "time" else sampler.order + 0.15
        add("order", exact_start, sampler.order - 0.15, at_most)
        add("shipped", shipped, sampler.order - 0.15)
    coarse, fine = (moment_error(sampler, path, steps) for steps in (60, 120))
    add("moments", fine, 0, 0.06 if sampler.order == 1 else 0.01)
    if fine > 1e-3 and (name, on) not in ANYTHING:  # smaller ones may be of a higher order, or not yet settled
        add("rate", math.log2(coarse / fine), min(sampler.order, 2) - 0.25)
    costs = [solution_error(sampler, path, steps)[1] for steps in (4, 12)]
    add("nfe", (costs[1] - costs[0]) / 8, sampler.evaluations, sampler.evaluations)
    if not sampler.stochastic:
        within = [error for error, cost in (solution_error(sampler, path, n) for n in range(1, FEW + 1)) if cost <= FEW]
        add("few steps", within[-1], 0, math.inf if (name, on) in ANYTHING else NEAR.get(name, 0.5))
    return rows


def certify_predictions(predictions: Mapping[str, Prediction], paths: Mapping[str, Path]) -> list[Row]:
    """The conversion error of every pair; where a pair is refused, that it really cannot be read to 11 digits."""
    rows = []
    for name, prediction in predictions.items():
        for on, path in paths.items():
            error = conversion(path, prediction)
            try:
                check_legal(path, prediction)
                rows.append(Row(name, on, "conversion", error, 0, 1e-11))
            except ValueError:
                rows.append(Row(name, on, "refused", error, 1e-11))
    return rows


class Curve(NamedTuple):
    """Error against evaluations of one sampler."""

    path: str
    subject: str
    nfe: list[int]
    error: list[float]


def error_curves(samplers: Mapping[str, Sampler], on: str, path: Path) -> list[Curve]:
    """The distance from the ODE's solution for 5 to 320 steps, of each deterministic sampler with its own grid."""
    curves = []
    for name, sampler in samplers.items():
        if sampler.stochastic or sampler.adaptive:
            continue
        nfe, error = [], []
        for steps in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192):
            distance, cost = solution_error(sampler, path, steps)
            nfe.append(cost)
            error.append(distance)
        curves.append(Curve(on, name, nfe, error))
    return curves
