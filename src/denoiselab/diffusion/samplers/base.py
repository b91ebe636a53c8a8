"""Samplers: from noise to data by asking a denoiser, written once for every path and prediction.

A step goes from point p to point q, with less noise. Write ρ = σ/α for the noise level and ℓ = −ln ρ for half the log-SNR.
With (x0, ε) of the denoiser at p, three exact forms of the same probability-flow ODE are what solvers discretise:

- d(x/α) = ε dρ. Holding ε over the step gives x_q = α_q·x0 + σ_q·ε, which is DDIM with η = 0 and Euler in σ/α on every
  path (Song, Meng & Ermon 2021, eq. 13; Karras et al. 2022, table 1).
- d(x/σ) = x0 de^ℓ, so x_q = (σ_q/σ_p)·x_p + σ_q·∫ e^ℓ·x0 dℓ (Lu et al. 2022b, eq. 8).
- ẋ = α̇·x0 + σ̇·ε in the path's own time.

The last step lands on the clean end (α = 1, σ = 0): x0 itself, which is first order, as in EDM. A step that starts from
pure noise (α = 0) is first order too: ρ and ℓ are infinite there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

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
    def level(self) -> float:
        """ρ = σ/α; ∞ at pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def half_log_snr(self) -> float:
        """ℓ = ln(α/σ); −∞ at pure noise."""
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


MOST = 100_000  # evaluations or steps that a sampler may be asked for
CLEAN = Point(t=0.0, alpha=1.0, sigma=0.0, d_alpha=0.0, d_sigma=0.0)


class Visit(NamedTuple):
    """A point and what the denoiser said there."""

    point: Point
    posterior: Posterior


Normal = Callable[[], Images]
History = deque[Visit]


def points_of(path: Path, times: Tensor) -> list[Point]:
    """The points at decreasing times, float64 of shape (n,)."""
    return [Point(*row) for row in torch.stack((times, *path.coefficients(times)), dim=1).tolist()]


@lru_cache(maxsize=4096)
def point_at_level(path: Path, level: float) -> Point:
    """The point with this σ/α, or the path's nearest end."""
    t = path.t_of_log_snr(torch.tensor([-2 * math.log(level)], dtype=torch.float64))
    return points_of(path, t.clamp(path.t_min, path.t_max))[0]


class Ask:
    """Asks the denoiser for one batch of samples.

    Args:
        denoiser: whom to ask.
        condition: of the batch.
        steps: steps of the whole trajectory.
    """

    def __init__(self, denoiser: Denoiser, condition: Condition, steps: int) -> None:
        self.denoiser, self.condition, self.steps = denoiser, condition, steps

    def __call__(self, x: Images, point: Point) -> Posterior:
        """The posterior at x and a point; one evaluation."""
        return self.denoiser(x, torch.tensor(point.t, dtype=torch.float64), self.condition)

    def point(self, level: float) -> Point:
        """The point with this σ/α, for steps that ask in between."""
        return point_at_level(self.denoiser.path, level)


class Sampler(ABC):
    """A solver with a grid and a budget. A subclass is one `step` and says its `order`.

    Args:
        grid: where the times lie.
        nfe: network evaluations per sample, guidance included: the largest number of steps that stays within it, 1 to 100,000.
        steps: the number of steps instead, 1 to 100,000. Exactly one of the two is given.
    """

    order: int = 1  # of convergence to the ODE between two times inside the path; with noise, of the moments
    evaluations: int = 1  # of the network in a step, once the start is over
    stochastic: bool = False  # whether steps add noise
    adaptive: bool = False  # whether the solver chooses its own steps, so that their number is not known beforehand
    needs_consistent: bool = True  # whether x_t = α·x0 + σ·ε is relied on

    def __init__(self, *, grid: Grid, nfe: int | None = None, steps: int | None = None) -> None:
        if (nfe is None) == (steps is None):
            raise ValueError(f"nfe={nfe}: give either nfe or steps (steps={steps})")
        for name, value in (("nfe", nfe), ("steps", steps)):
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(f"{name}={value}: must be {'at least 1' if value < 1 else f'at most {MOST:,}'}")
        self.grid, self.nfe, self.steps = grid, nfe, steps

    @abstractmethod
    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """From x at p to x at q.

        Args:
            x: x_p.
            q: where to go; σ_q > 0.
            history: the latest visits, the last one that of p. A step that has asked at q already, and wants that answer
                used as the next visit, appends it.
            ask: asks the denoiser elsewhere, for one more evaluation.
            normal: fresh standard normal noise of the shape of x; once per step.
        """

    def perturb(self, x: Images, p: Point, ask: Ask, normal: Normal) -> tuple[Images, Point]:
        """Where to ask instead of x at p, for samplers that add noise before the step."""
        return x, p

    def integrate(
        self,
        denoiser: Denoiser,
        x: Images,
        points: Sequence[Point],
        condition: Condition,
        noise: NoiseSource,
        before: Sequence[Visit] = (),
    ) -> Images:
        """From x at the first point to the last one, which may be `CLEAN`.

        Args:
            denoiser: whom to ask.
            x: where the trajectory begins.
            points: where it passes.
            condition: of the batch.
            noise: of stochastic samplers.
            before: earlier visits, for multistep samplers that are given their starting values.
        """
        ask = Ask(denoiser.fresh(), condition, len(points) - 1)
        history: History = deque(before, maxlen=4)
        for i, (p, q) in enumerate(pairwise(points)):
            normal = partial(noise.at(i).normal, "sampler", x.shape[1:], x.dtype)
            if not history or history[-1].point is not p:
                x, p = self.perturb(x, p, ask, normal)
                history.append(Visit(p, ask(x, p)))
            if q.sigma == 0:
                return history[-1].posterior.x0
            x = self.step(x, q, history, ask, normal)
        return x

    def points(self, path: Path, steps: int) -> list[Point]:
        """The grid's points with the clean end behind them: `steps` + 1 in all."""
        return [*points_of(path, self.grid(path, steps)), CLEAN]

    def plan(self, denoiser: Denoiser) -> tuple[list[Point], int | None]:
        """The points this sampler visits for a denoiser, and the network evaluations per sample that they cost.

        Raises:
            ValueError: if not even one step fits into `nfe`, or grid or guidance do not fit.
        """
        self.check(denoiser)
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

    def check(self, denoiser: Denoiser) -> None:
        """See to it that the denoiser gives what this sampler relies on.

        Raises:
            ValueError: otherwise.
        """
        if self.needs_consistent and not denoiser.consistent:
            raise ValueError(
                f"_target_={type(self).__name__}: does not fit CFG++, which renoises with another ε than it removes; use "
                "sampler=ddim or sampler=euler"
            )

    def _count(self, denoiser: Denoiser, points: Sequence[Point]) -> int:
        """The cost of a plan, by walking it with a denoiser that only counts."""
        counter = _Counter(denoiser)
        nothing = torch.zeros(1, 1)
        self.integrate(counter, nothing, points, Condition(), _Silence())
        return counter.count

    def sample(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        condition: Condition,
        noise: NoiseSource,
        points: Sequence[Point] | None = None,
    ) -> Images:
        """One sample x0 for each index of `noise`.

        Args:
            denoiser: what to ask.
            shape: (C, H, W).
            condition: of the batch, on the device of `noise.index`.
            noise: sample i depends on (seed, i) alone.
            points: of `plan`, for callers with many batches; None plans anew.
        """
        points = self.plan(denoiser)[0] if points is None else points
        x = points[0].sigma * noise.normal("start", shape)
        return self.integrate(denoiser, x, points, condition, noise)


class _Counter:
    """A denoiser that answers nothing and counts what it would have cost."""

    consistent = True

    def __init__(self, denoiser: Denoiser) -> None:
        self.path, self.denoiser, self.count = denoiser.path, denoiser, 0

    def __call__(self, x: Images, t: Tensor, condition: Condition) -> Posterior:
        self.count += self.evaluations(float(t))
        return Posterior(x, x, x)

    def evaluations(self, t: float) -> int:
        return self.denoiser.evaluations(t)

    def fresh(self) -> _Counter:
        return self


class _Silence(NoiseSource):
    """A noise source that is never asked for real numbers."""

    def __init__(self) -> None:
        super().__init__(seed=0, index=torch.zeros(1, dtype=torch.int64))

    def at(self, step: int) -> NoiseSource:
        return self

    def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, *shape, dtype=dtype)
