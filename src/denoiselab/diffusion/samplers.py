"""Samplers: from noise to data by asking a denoiser, written once for every path and prediction.

A step goes from point p to point q (α_q/σ_q > α_p/σ_p). With D = (x0, ε) at p:

- Probability-flow ODE. d(x/α) = ε·d(σ/α) is exact; holding ε over the step gives x_q = α_q·x0 + σ_q·ε, which is DDIM with
  η = 0 and Euler in σ/α on every path (Song, Meng & Ermon 2021, eq. 13; Karras et al. 2022, table 1). The same ODE in the
  path's own time is ẋ = α̇·x0 + σ̇·ε.
- Ancestral. q(x_q | x_p, x0) is Gaussian with, for α_{p|q} = α_p/α_q and σ²_{p|q} = σ_p² − α_{p|q}²·σ_q²,
  mean (α_{p|q}·σ_q²·x_p + α_q·σ²_{p|q}·x0)/σ_p² and variance σ²_{p|q}·σ_q²/σ_p² (Kingma et al. 2021, appendix A.2).
- Exponential integrator. With ℓ = ln(α/σ), x_q = (σ_q/σ_p)·x_p + σ_q·∫ e^ℓ·x0 dℓ is exact (Lu et al. 2022b, eq. 8).

The last step lands on the clean end (α = 1, σ = 0): x0 itself, which is first order, as in EDM. A step that starts from
pure noise (α = 0) is first order too: σ/α and ℓ are infinite there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser, Images, Posterior
from denoiselab.diffusion.grids import Grid
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path


class Point(NamedTuple):
    """A time with the path's coefficients there, as plain numbers: no device is asked for them inside the loop."""

    t: float
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float

    @property
    def half_log_snr(self) -> float:
        """ℓ = ln(α/σ); −∞ at pure noise."""
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


CLEAN = Point(t=0.0, alpha=1.0, sigma=0.0, d_alpha=0.0, d_sigma=0.0)

Predict = Callable[[Images, Point], Posterior]
Normal = Callable[[], Images]
History = Sequence[tuple[Point, Posterior]]


def points_of(path: Path, times: Tensor) -> list[Point]:
    """The points at decreasing times, float64 of shape (n,)."""
    columns = (times, path.alpha(times), path.sigma(times), path.d_alpha(times), path.d_sigma(times))
    return [Point(*row) for row in torch.stack(columns, dim=1).tolist()]


class Sampler(ABC):
    """A solver with a grid and a budget. A subclass is one `step`.

    Args:
        grid: where the times lie.
        nfe: network evaluations per sample, guidance included: the largest number of steps that stays within it. At least 1.
        steps: the number of steps instead; at least 1. Exactly one of the two is given.
    """

    def __init__(self, *, grid: Grid, nfe: int | None = None, steps: int | None = None) -> None:
        if (nfe is None) == (steps is None):
            raise ValueError(f"nfe={nfe}: give either nfe or steps (steps={steps})")
        for name, value in (("nfe", nfe), ("steps", steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.grid, self.nfe, self.steps = grid, nfe, steps

    @abstractmethod
    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """From x at p to x at q.

        Args:
            x: x_p.
            q: where to go; σ_q > 0.
            history: the latest points with what the denoiser said there; the last entry is (p, posterior at x_p).
            predict: asks the denoiser elsewhere, for one more evaluation.
            normal: fresh standard normal noise of the shape of x; once per step.
        """

    def integrate(
        self,
        denoiser: Denoiser,
        x: Images,
        points: Iterable[Point],
        condition: Condition,
        noise: NoiseSource,
    ) -> Images:
        """From x at the first point to the last one, which may be `CLEAN`."""

        def predict(x: Images, point: Point) -> Posterior:
            return denoiser(x, torch.tensor(point.t, dtype=torch.float64), condition)

        history: deque[tuple[Point, Posterior]] = deque(maxlen=4)
        for i, (p, q) in enumerate(pairwise(points)):
            history.append((p, predict(x, p)))
            if q.sigma == 0:
                return history[-1][1].x0
            normal = partial(noise.at(i).normal, "sampler", x.shape[1:], x.dtype)
            x = self.step(x, q, history, predict, normal)
        return x

    def points(self, path: Path, steps: int) -> list[Point]:
        """The grid's points with the clean end behind them: `steps` + 1 in all."""
        return [*points_of(path, self.grid(path, steps)), CLEAN]

    def plan(self, denoiser: Denoiser) -> tuple[list[Point], int]:
        """The points this sampler visits for a denoiser, and the network evaluations per sample that they cost.

        Raises:
            ValueError: if not even one step fits into `nfe`, or the grid does not fit the path.
        """
        if self.steps is not None:
            points = self.points(denoiser.path, self.steps)
            return points, self._count(denoiser, points)
        assert self.nfe is not None
        best: tuple[list[Point], int] | None = None
        problem = f"nfe={self.nfe}: one step of this sampler already costs more"
        fewest, most = 1, self.nfe
        while fewest <= most:  # bisection: more steps cost more, and a step costs at least one evaluation
            steps = (fewest + most) // 2
            try:
                points = self.points(denoiser.path, steps)
                cost = self._count(denoiser, points)
            except ValueError as error:  # more steps than the grid can place
                cost, problem = self.nfe + 1, str(error)
            if cost <= self.nfe:
                best, fewest = (points, cost), steps + 1
            else:
                most = steps - 1
        if best is None:
            raise ValueError(problem)
        return best

    def _count(self, denoiser: Denoiser, points: list[Point]) -> int:
        """The cost of a plan, by walking it with a denoiser that only counts."""
        counter = _Counter(denoiser)
        nothing = torch.zeros(1, 1)
        self.integrate(counter, nothing, points, Condition(), _Silence())
        return counter.count

    def sample(self, denoiser: Denoiser, shape: Sequence[int], condition: Condition, noise: NoiseSource) -> Images:
        """One sample x0 for each index of `noise`.

        Args:
            denoiser: what to ask.
            shape: (C, H, W).
            condition: of the batch, on the device of `noise.index`.
            noise: sample i depends on (seed, i) alone.
        """
        points, _ = self.plan(denoiser)
        x = points[0].sigma * noise.normal("start", shape)
        return self.integrate(denoiser, x, points, condition, noise)


class Euler(Sampler):
    """Euler in σ/α; DDIM with η = 0. First order."""

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """x_q = α_q·x0 + σ_q·ε."""
        _, (x0, eps) = history[-1]
        return q.alpha * x0 + q.sigma * eps


class DDIM(Sampler):
    """DDIM with η between the ODE (0) and the ancestral sampler (1).

    Args:
        eta: share of the ancestral noise, in [0, 1].
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Song, Meng & Ermon 2021, eq. 12 and 16; for α² + σ² ≠ 1 the variance is η² times the ancestral one.
    """

    def __init__(self, *, grid: Grid, eta: float = 0.0, nfe: int | None = None, steps: int | None = None) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: must be in [0, 1]")
        self.eta = eta

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """x_q = α_q·x0 + √(σ_q² − s²)·ε + s·z."""
        p, (x0, eps) = history[-1]
        std = self.eta * math.sqrt(_ancestral_variances(p, q)[0])
        mean = q.alpha * x0 + math.sqrt(max(q.sigma**2 - std**2, 0.0)) * eps
        return mean + std * normal() if std > 0 else mean


class DDPM(Sampler):
    """Ancestral sampling.

    Args:
        variance: "small" is the variance of q(x_q | x_p, x0), right for data at a point; "large" is that of q(x_p | x_q),
            right for standard normal data.
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Ho, Jain & Abbeel 2020, eq. 6–7 and section 3.2.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        variance: Literal["small", "large"] = "small",
        nfe: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        if variance not in ("small", "large"):
            raise ValueError(f"variance={variance}: must be small or large")
        self.variance = variance

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """The posterior mean and one of the two variances."""
        p, (x0, _) = history[-1]
        small, large = _ancestral_variances(p, q)
        ratio = p.alpha / q.alpha
        mean = (ratio * q.sigma**2 * x + q.alpha * large * x0) / p.sigma**2
        return mean + math.sqrt(small if self.variance == "small" else large) * normal()


def _ancestral_variances(p: Point, q: Point) -> tuple[float, float]:
    """The variances of q(x_q | x_p, x0) and of q(x_p | x_q)."""
    large = max(p.sigma**2 - (p.alpha / q.alpha * q.sigma) ** 2, 0.0)
    return large * (q.sigma / p.sigma) ** 2, large


class Heun(Sampler):
    """Heun in σ/α (EDM's deterministic sampler). Second order, two evaluations a step."""

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """x_q/α_q = x_p/α_p + (σ_q/α_q − σ_p/α_p)·(ε_p + ε_q)/2 (Karras et al. 2022, algorithm 1 in x/α)."""
        p, (x0, eps) = history[-1]
        guess = q.alpha * x0 + q.sigma * eps
        if p.alpha == 0:
            return guess
        mean = (eps + predict(guess, q).eps) / 2
        ratio = q.alpha / p.alpha
        return ratio * x + (q.sigma - ratio * p.sigma) * mean


class EulerT(Sampler):
    """Euler in the path's own time. First order; on rectified flow the same as `Euler`."""

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """x_q = x_p + (t_q − t_p)·ẋ."""
        p, posterior = history[-1]
        return x + (q.t - p.t) * _velocity(p, posterior)


class HeunT(Sampler):
    """Heun in the path's own time. Second order, two evaluations a step."""

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """The mean of the velocities at both ends."""
        p, posterior = history[-1]
        start = _velocity(p, posterior)
        end = _velocity(q, predict(x + (q.t - p.t) * start, q))
        return x + (q.t - p.t) * (start + end) / 2


def _velocity(point: Point, posterior: Posterior) -> Images:
    return point.d_alpha * posterior.x0 + point.d_sigma * posterior.eps


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M). Second order, one evaluation a step; the first step is first order.

    Source: Lu et al. 2022b, algorithm 2.
    """

    def step(self, x: Images, q: Point, history: History, predict: Predict, normal: Normal) -> Images:
        """The exponential integrator on x0 extrapolated to the middle of the step."""
        p, (x0, _) = history[-1]
        if len(history) > 1:
            before, (x0_before, _) = history[-2]
            h, h_before = q.half_log_snr - p.half_log_snr, p.half_log_snr - before.half_log_snr
            x0 = x0 + h / (2 * h_before) * (x0 - x0_before)  # h_before is infinite after pure noise: no correction
        ratio = q.sigma / p.sigma
        return ratio * x + (q.alpha - ratio * p.alpha) * x0


class _Counter:
    """A denoiser that answers nothing and counts what it would have cost."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.path, self.denoiser, self.count = denoiser.path, denoiser, 0

    def __call__(self, x: Images, t: Tensor, condition: Condition) -> Posterior:
        self.count += self.evaluations(float(t))
        return Posterior(x, x)

    def evaluations(self, t: float) -> int:
        return self.denoiser.evaluations(t)


class _Silence(NoiseSource):
    """A noise source that is never asked for real numbers."""

    def __init__(self) -> None:
        super().__init__(seed=0, index=torch.zeros(1, dtype=torch.int64))

    def at(self, step: int) -> NoiseSource:
        return self

    def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, *shape, dtype=dtype)
