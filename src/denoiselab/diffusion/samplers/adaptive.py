"""An adaptive solver: the Runge-Kutta pair of Dormand & Prince in the path's own time, with an error control per sample.

Each sample has a time and a step size of its own, so that sample i does not depend on what else is in its batch, and the
denoiser is asked at a different time for each. A step from t to t − h is accepted where the difference of the fifth- and the
fourth-order result, measured against atol + rtol·|x|, has a root mean square of at most 1; the next step is
h·0.9·error^(−1/5), between a fifth and ten times h, or h at most where one has just been refused. Samples that have arrived
wait for the others.

Source: Dormand & Prince 1980; Hairer, Nørsett & Wanner 1993, sections II.4 and II.5; for diffusion: Song et al. 2021,
appendix D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser, Images, per_sample
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path
from denoiselab.diffusion.samplers.base import CLEAN, Ask, History, Normal, Point, Sampler, Visit, points_of

PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
LESS_FOURTH = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)  # FIFTH less the fourth order


class DormandPrince(Sampler):
    """Dormand-Prince 5(4) from t_max to t_min, then x0. The number of evaluations is the solver's choice.

    Args:
        rtol: relative tolerance, positive.
        atol: absolute tolerance, positive.
        max_steps: accepted and refused steps together, at least 1; more are an error.
    """

    order = 5
    adaptive = True

    def __init__(self, *, rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 10_000) -> None:
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value}: must be in (0, 1)")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps}: must be at least 1")
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps
        self.nfe = self.steps = None

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """Steps are chosen per sample, see `integrate`."""
        raise AssertionError

    def check(self, denoiser: Denoiser) -> None:
        """Also that it is an ODE which is solved."""
        super().check(denoiser)
        if getattr(denoiser, "remembers", False):
            raise ValueError("_target_=DormandPrince: APG with a momentum follows no ODE; use guidance.momentum=0")

    def points(self, path: Path, steps: int) -> list[Point]:
        """Both ends of the path, and the clean end; nobody knows the steps beforehand."""
        return [*points_of(path, torch.tensor([path.t_max, path.t_min], dtype=torch.float64)), CLEAN]

    def plan(self, denoiser: Denoiser) -> tuple[list[Point], int | None]:
        """Nobody knows the number of evaluations beforehand."""
        self.check(denoiser)
        return self.points(denoiser.path, 0), None

    def integrate(
        self,
        denoiser: Denoiser,
        x: Images,
        points: Sequence[Point],
        condition: Condition,
        noise: NoiseSource,
        before: Sequence[Visit] = (),
    ) -> Images:
        """From x at the first point to the last one, or to the one before it and then onto `CLEAN`.

        Its steps are its own: neither points between, nor noise, nor earlier visits count.

        Raises:
            RuntimeError: if `max_steps` do not suffice, or the denoiser says NaN.
        """
        denoiser, path = denoiser.fresh(), denoiser.path
        end = points[-1].t if points[-1].sigma > 0 else points[-2].t

        def velocity(x: Images, t: Tensor) -> Images:
            said = denoiser(x, t, condition)
            c = path.coefficients(t)
            return per_sample(c.d_alpha, x) * said.x0 + per_sample(c.d_sigma, x) * said.eps

        def size(v: Images, scale: Images) -> Tensor:
            return (v / scale).double().flatten(1).square().mean(1).sqrt()

        t = torch.full((len(x),), points[0].t, dtype=torch.float64, device=x.device)
        slope = velocity(x, t)
        scale = self.atol + self.rtol * x.abs()
        h = (0.01 * size(x, scale) / size(slope, scale).clamp(min=1e-12)).clamp(min=1e-6 * (points[0].t - end))
        taken, refused = 0, torch.zeros_like(t, dtype=torch.bool)
        while bool(((left := t - end) > 0).any()):
            if taken == self.max_steps:
                raise RuntimeError(f"max_steps={self.max_steps}: not enough for rtol={self.rtol}, atol={self.atol}")
            taken += 1
            h = torch.minimum(h, left)
            slopes = [slope]
            for place, row in zip(PLACES[1:], STAGES[1:], strict=True):
                slopes.append(velocity(_combine(x, h, row, slopes), (t - place * h).clamp(min=end)))
            new = _combine(x, h, FIFTH, slopes)
            arrived = torch.where(h == left, end, t - h)
            slopes.append(velocity(new, arrived))
            scale = self.atol + self.rtol * torch.maximum(x.abs(), new.abs())
            error = size(_combine(torch.zeros_like(x), h, LESS_FOURTH, slopes), scale)
            if bool(error.isnan().any()):  # or it would try ever smaller steps until max_steps
                raise RuntimeError("the denoiser's answer is not a number")
            accept = (error <= 1) & (left > 0)
            t = torch.where(accept, arrived, t)
            mask = accept.reshape(-1, *(1,) * (x.ndim - 1))
            x, slope = torch.where(mask, new, x), torch.where(mask, slopes[-1], slope)
            h = h * torch.where(refused, 1.0, 10.0).minimum(0.9 * error.clamp(min=1e-12) ** -0.2).clamp(min=0.2)
            refused = ~accept
        return x if points[-1].sigma > 0 else denoiser(x, t, condition).x0


def _combine(x: Images, h: Tensor, row: Sequence[float], slopes: Sequence[Images]) -> Images:
    """X − h·Σ a_i·v_i: time runs backwards."""
    for a, slope in zip(row, slopes, strict=False):
        if a:
            x = x - per_sample(h * a, x) * slope
    return x
