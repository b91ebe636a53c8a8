"""Multistep samplers: one evaluation a step, and the earlier answers for the order.

The answers at the last points are interpolated by a polynomial in some coordinate s and the polynomial is integrated over
the step, exactly up to rounding: with nodes s_j and Lagrange polynomials L_j the step is a weighted sum of the answers with

    w_j = ∫_{s_p}^{s_q} κ(s)·L_j(s) ds                                                                              (1)

- `Adams`: d(x/α) = ε dρ, with ε a polynomial in s = ρ (κ = 1: linear multistep, LMS) or in s = ln ρ (κ = e^s: DEIS), or
  averaged over s = t (PNDM).
- `DPMSolverPP`: d(x/σ) = x0 de^ℓ and its stochastic relatives. The reverse SDE with η times the noise variance of the
  ancestral one, written for x/σ·e^{ηℓ}, gives for h = ℓ_q − ℓ_p (Gonzalez et al. 2023; Xue et al. 2023, eq. 12 with τ² = η)

      x_q = (σ_q/σ_p)·e^{−ηh}·x_p + (1+η)·σ_q·e^{−ηℓ_q}·∫ e^{(1+η)ℓ}·x0 dℓ + σ_q·√(1 − e^{−2ηh})·z.                       (2)

Order. n nodes make a global order n, and a corrector, which adds the answer at q to the nodes, one more. The first steps have
fewer nodes; steps of order r there keep a method of order r + 1 whole. Where the published start (`start: lower_order`) is of
lower order than that, Runge-Kutta steps in the same variable make it (`start: runge_kutta`), for one or two evaluations more.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from itertools import islice
from typing import Literal

import torch

from denoiselab.diffusion.denoiser import Images
from denoiselab.diffusion.grids import Grid
from denoiselab.diffusion.samplers.base import Ask, History, Normal, Point, Sampler, Visit
from denoiselab.diffusion.samplers.single_step import ddim

Start = Literal["lower_order", "runge_kutta"]


@lru_cache(maxsize=1)
def _gauss_legendre(n: int = 24) -> tuple[tuple[float, float], ...]:
    """Places and weights on [0, 1]; from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    i = torch.arange(1, n, dtype=torch.float64)
    beta = i / (4 * i**2 - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return tuple(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


@lru_cache(maxsize=4096)
def weights(nodes: tuple[float, ...], start: float, end: float, rate: float) -> tuple[float, ...]:
    """Equation (1) with κ = e^{rate·(s − end)}.

    Args:
        nodes: the s_j, one to four of them.
        start: s_p.
        end: s_q.
        rate: of the exponential.
    """
    totals = [0.0] * len(nodes)
    for place, weight in _gauss_legendre():
        s = start + place * (end - start)
        kernel = (end - start) * weight * math.exp(rate * (s - end))
        for j, node in enumerate(nodes):
            totals[j] += kernel * math.prod((s - other) / (node - other) for other in nodes if other != node)
    return tuple(totals)


class _Multistep(Sampler):
    """What the families share: their order and how they start."""

    def __init__(self, *, grid: Grid, order: int, most: int, start: Start, nfe: int | None, steps: int | None) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        if not 1 <= order <= most:
            raise ValueError(f"order={order}: must be from 1 to {most}")
        if start not in ("lower_order", "runge_kutta"):
            raise ValueError(f"start={start}: must be lower_order or runge_kutta")
        self.nodes, self.order, self.start = order, order, start

    def _latest(self, history: History) -> list[Visit]:
        """The latest visits, newest first, as many as the order wants and pure noise left out."""
        return [visit for visit in islice(reversed(history), self.nodes) if visit.point.alpha > 0]

    def _too_few(self, history: History) -> bool:
        return self.start == "runge_kutta" and len(self._latest(history)) < self.nodes - 1

    def _starting_step(self, x: Images, q: Point, history: History, ask: Ask) -> Images:
        """The Runge-Kutta step of order 2 or 3 that integrates lines through p and the latest stage, in s.

        Stages at ½, or at ⅓ and ⅔: with κ = 1 these are the midpoint rule and Heun's method of third order.
        """
        start = history[-1]
        visits = [start]
        for place in (1 / 2,) if self.order == 3 else (1 / 3, 2 / 3):
            m = ask.point(self._level_between(start.point, q, place))
            visits = [start, Visit(m, ask(self._advance(x, start.point, m, visits), m))]
        return self._advance(x, start.point, q, visits)

    def _level_between(self, p: Point, q: Point, place: float) -> float:
        """The σ/α of a place on the way in s: here the logarithm of σ/α."""
        return math.exp(-p.half_log_snr - place * (q.half_log_snr - p.half_log_snr))

    @abstractmethod
    def _advance(self, x: Images, p: Point, q: Point, visits: list[Visit]) -> Images:
        """From p to q along the ODE, with the polynomial through the visits."""


class Adams(_Multistep):
    """Adams-Bashforth on ε: LMS, DEIS and PNDM.

    Args:
        variable: what ε is a polynomial in: "level" is σ/α (linear multistep, k-diffusion's LMS), "log_level" its logarithm
            (DEIS), "time" the path's own time with the mean of ε taken over it (PNDM's pseudo linear multistep, at
            most second order).
        order: number of answers used, 1 to 4.
        start: how the first steps are made, see the module.
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Zhang & Chen 2023, section 3.3 (ρAB-DEIS, tAB-DEIS); Liu et al. 2022 (PNDM), eq. 9 and 12.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        variable: Literal["level", "log_level", "time"],
        order: int = 3,
        start: Start = "runge_kutta",
        nfe: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(grid=grid, order=order, most=4, start=start, nfe=nfe, steps=steps)
        if variable not in ("level", "log_level", "time"):
            raise ValueError(f"variable={variable}: must be level, log_level or time")
        self.variable = variable
        if variable == "time":
            self.order = min(order, 2)

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q/α_q = x_p/α_p + Σ w_j·ε_j."""
        p, said = history[-1]
        if p.alpha == 0:
            return ddim(said.x0, said.eps, q)
        if self._too_few(history):
            return self._starting_step(x, q, history, ask)
        return self._advance(x, p, q, self._latest(history))

    def _level_between(self, p: Point, q: Point, place: float) -> float:
        """Between σ/α itself where that is the variable."""
        return (
            p.level + place * (q.level - p.level) if self.variable == "level" else super()._level_between(p, q, place)
        )

    def _advance(self, x: Images, p: Point, q: Point, visits: list[Visit]) -> Images:
        for visit, w in zip(visits, self._weights(p, q, visits), strict=True):
            x = x + (p.alpha * w) * visit.posterior.eps
        return (q.alpha / p.alpha) * x

    def _weights(self, p: Point, q: Point, latest: list[Visit]) -> list[float]:
        """Of x/α; they sum to ρ_q − ρ_p."""
        if self.variable == "level":
            return list(weights(tuple(v.point.level for v in latest), p.level, q.level, 0.0))
        if self.variable == "log_level":  # the kernel e^s is scaled to 1 at s_q
            nodes = tuple(-v.point.half_log_snr for v in latest)
            return [q.level * w for w in weights(nodes, -p.half_log_snr, -q.half_log_snr, 1.0)]
        rate = (q.level - p.level) / (q.t - p.t)
        return [rate * w for w in weights(tuple(v.point.t for v in latest), p.t, q.t, 0.0)]


class DPMSolverPP(_Multistep):
    """DPM-Solver++(2M, 3M), its SDE form, UniPC and SA-Solver: a polynomial of x0 in log-SNR, equation (2).

    With two nodes the slope is integrated as h/2·∫ e^ℓ dℓ, as published, instead of exactly: the order is the same. With three
    nodes it is exact, and so of third order; the published 3M update, which diffusers and k-diffusion follow, has half the
    second derivative and is of second order.

    Args:
        order: number of earlier answers used, 1 to 3.
        eta: variance of the noise in units of the ancestral SDE's, at least 0: 0 follows the ODE. `DDIM`'s η is of standard
            deviations instead.
        corrector: redo each step with the answer at its end, which is kept as the next step's (one evaluation a step).
        start: how the first steps are made, see the module; with noise always "lower_order".
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: 2M: Lu et al. 2022b, algorithm 2; UniPC: Zhao et al. 2023, section 3 (B(h) = e^h − 1); SA-Solver: Xue et al. 2023,
    algorithm 1, with constant τ² = eta.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        order: int = 2,
        eta: float = 0.0,
        corrector: bool = False,
        start: Start = "runge_kutta",
        nfe: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(grid=grid, order=order, most=3, start=start, nfe=nfe, steps=steps)
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta={eta}: must be at least 0")
        self.eta, self.corrector, self.stochastic = eta, corrector, eta > 0
        self.order = min(order, 2) if eta > 0 else order + corrector

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """Equation (2) with the latest answers; again with the new one if there is a corrector."""
        p, said = history[-1]
        if p.alpha == 0:  # h is infinite: with noise, nothing is left of x
            return ddim(said.x0, normal() if self.eta > 0 else said.eps, q)
        if self.eta == 0 and self._too_few(history):
            return self._starting_step(x, q, history, ask)
        h = q.half_log_snr - p.half_log_snr
        base = (q.sigma / p.sigma * math.exp(-self.eta * h)) * x
        if self.eta > 0:
            base = base + (q.sigma * math.sqrt(-math.expm1(-2 * self.eta * h))) * normal()
        latest = self._latest(history)
        predicted = self._add(base, p, q, latest)
        if not self.corrector:
            return predicted
        answer = Visit(q, ask(predicted, q))
        history.append(answer)
        return self._add(base, p, q, [*latest, answer])

    def _advance(self, x: Images, p: Point, q: Point, visits: list[Visit]) -> Images:
        return self._add((q.sigma / p.sigma) * x, p, q, visits, exact=True)

    def _add(self, base: Images, p: Point, q: Point, visits: list[Visit], *, exact: bool = False) -> Images:
        """The integral of equation (2), added to the rest; two nodes as published, or exactly."""
        start, end, rate = p.half_log_snr, q.half_log_snr, 1 + self.eta
        nodes = tuple(v.point.half_log_snr for v in visits)
        if len(nodes) == 2 and not exact:
            total, other = -math.expm1(-rate * (end - start)), nodes[1]
            slope = total * (end - start) / 2 / (other - start)
            ws: tuple[float, ...] = (total - slope, slope)
        else:
            ws = tuple(rate * w for w in weights(nodes, start, end, rate))
        for visit, w in zip(visits, ws, strict=True):
            base = base + (q.alpha * w) * visit.posterior.x0
        return base
