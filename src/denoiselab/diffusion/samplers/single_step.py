"""One-step samplers: what they need is at p, or asked for on the way."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from denoiselab.diffusion.denoiser import Denoiser, Images, Posterior
from denoiselab.diffusion.grids import Grid
from denoiselab.diffusion.samplers.base import Ask, History, Normal, Point, Sampler

NOT_LEARNED = "variance=learned: the network has no learned variance (objective.learned_variance)"


def ddim(x0: Images, eps: Images, q: Point) -> Images:
    """x_q = α_q·x0 + σ_q·ε: the step that holds x0 and ε."""
    return q.alpha * x0 + q.sigma * eps


def ancestral_variances(p: Point, q: Point) -> tuple[float, float]:
    """The variances of q(x_q | x_p, x0) and of q(x_p | x_q).

    With α_{p|q} = α_p/α_q: σ²_{p|q} = σ_p² − α_{p|q}²·σ_q² is the larger, σ²_{p|q}·σ_q²/σ_p² the smaller (Kingma et al.
    2021, appendix A.2).
    """
    large = max(p.sigma**2 - (p.alpha / q.alpha * q.sigma) ** 2, 0.0)
    return large * (q.sigma / p.sigma) ** 2, large


class Euler(Sampler):
    """Euler in σ/α; DDIM with η = 0. First order."""

    needs_consistent = False

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q = α_q·x0 + σ_q·ε."""
        said = history[-1].posterior
        return ddim(said.x0, said.eps, q)


class DDIM(Sampler):
    """DDIM with η between the ODE (0) and the ancestral sampler (1); η = 1 is k-diffusion's Euler ancestral.

    Args:
        eta: share of the ancestral noise's standard deviation, in [0, 1].
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Song, Meng & Ermon 2021, eq. 12 and 16; for α² + σ² ≠ 1 the variance is η² times the ancestral one.
    """

    needs_consistent = False

    def __init__(self, *, grid: Grid, eta: float = 0.0, nfe: int | None = None, steps: int | None = None) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: must be in [0, 1]")
        self.eta, self.stochastic = eta, eta > 0

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q = α_q·x0 + √(σ_q² − s²)·ε + s·z."""
        p, said = history[-1]
        std = self.eta * math.sqrt(ancestral_variances(p, q)[0])
        mean = q.alpha * said.x0 + math.sqrt(max(q.sigma**2 - std**2, 0.0)) * said.eps
        return mean + std * normal() if std > 0 else mean


class DDPM(Sampler):
    """Ancestral sampling.

    Args:
        variance: "small" is the variance of q(x_q | x_p, x0), right for data at a point; "large" is that of q(x_p | x_q),
            right for standard normal data on variance preserving paths; "learned" is between the two, as the network says.
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Ho, Jain & Abbeel 2020, eq. 6–7 and section 3.2; learned: Nichol & Dhariwal 2021, eq. 15.
    """

    stochastic = True

    def __init__(
        self,
        *,
        grid: Grid,
        variance: Literal["small", "large", "learned"] = "small",
        nfe: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        if variance not in ("small", "large", "learned"):
            raise ValueError(f"variance={variance}: must be small, large or learned")
        self.variance = variance

    def check(self, denoiser: Denoiser) -> None:
        """Also that a learned variance has been learned, as far as the denoiser tells."""
        super().check(denoiser)
        if self.variance == "learned" and not getattr(denoiser, "learned_variance", True):
            raise ValueError(NOT_LEARNED)

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """The posterior mean (α_{p|q}·σ_q²·x_p + α_q·σ²_{p|q}·x0)/σ_p², and noise of one of the variances."""
        p, said = history[-1]
        small, large = ancestral_variances(p, q)
        mean = (p.alpha / q.alpha * q.sigma**2 * x + q.alpha * large * said.x0) / p.sigma**2
        if self.variance != "learned":
            return mean + math.sqrt(small if self.variance == "small" else large) * normal()
        if said.share is None:
            raise ValueError(NOT_LEARNED)
        return mean + math.sqrt(small) * (said.share * (0.5 * math.log(large / small))).exp() * normal()


class EulerT(Sampler):
    """Euler in the path's own time. First order; on rectified flow the same as `Euler`."""

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q = x_p + (t_q − t_p)·ẋ."""
        p, said = history[-1]
        return x + (q.t - p.t) * velocity(p, said)


class HeunT(Sampler):
    """Heun in the path's own time. Second order, two evaluations a step."""

    order = evaluations = 2

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """The mean of the velocities at both ends."""
        p, said = history[-1]
        start = velocity(p, said)
        end = velocity(q, ask(x + (q.t - p.t) * start, q))
        return x + (q.t - p.t) * (start + end) / 2


def velocity(point: Point, posterior: Posterior) -> Images:
    """ẋ = α̇·x0 + σ̇·ε."""
    return point.d_alpha * posterior.x0 + point.d_sigma * posterior.eps


# An explicit Runge-Kutta method: for each further stage its place in the step and its row of coefficients; the weights.
Tableau = tuple[tuple[tuple[float, tuple[float, ...]], ...], tuple[float, ...]]
HEUN: Tableau = (((1.0, (1.0,)),), (1 / 2, 1 / 2))
RK4: Tableau = (((1 / 2, (1 / 2,)), (1 / 2, (0.0, 1 / 2)), (1.0, (0.0, 0.0, 1.0))), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def runge_kutta(tableau: Tableau, x: Images, q: Point, history: History, ask: Ask) -> Images:
    """One step of d(x/α) = ε dρ. From pure noise, where ρ is infinite: the first-order step."""
    p, said = history[-1]
    if p.alpha == 0:
        return ddim(said.x0, said.eps, q)
    stages, weights = tableau
    h = q.level - p.level
    slopes = [said.eps]
    for place, row in stages:
        m = q if place == 1 else ask.point(p.level + place * h)
        slopes.append(ask(_move(x, p, m, h, row, slopes), m).eps)
    return _move(x, p, q, h, weights, slopes)


def _move(x: Images, p: Point, m: Point, h: float, row: tuple[float, ...], slopes: list[Images]) -> Images:
    """α_m·(x/α_p + h·Σ a_i·ε_i)."""
    for a, slope in zip(row, slopes, strict=True):
        if a:
            x = x + (p.alpha * h * a) * slope
    return (m.alpha / p.alpha) * x


class Heun(Sampler):
    """Heun in σ/α (EDM's deterministic sampler). Second order, two evaluations a step.

    Source: Karras et al. 2022, algorithm 1 in x/α.
    """

    order = evaluations = 2
    tableau: ClassVar[Tableau] = HEUN

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q/α_q = x_p/α_p + (ρ_q − ρ_p)·(ε_p + ε_q)/2."""
        return runge_kutta(self.tableau, x, q, history, ask)


class RungeKutta4(Heun):
    """The classical Runge-Kutta method in σ/α. Fourth order, four evaluations a step."""

    order = evaluations = 4
    tableau = RK4


class StochasticHeun(Heun):
    """EDM's stochastic sampler: before each step the noise level is raised to ρ·(1 + γ) by fresh noise.

    Args:
        s_churn: overall amount; γ = min(s_churn/steps, √2 − 1). At least 0; 0 is `Heun`.
        s_min: raise only where ρ is at least this.
        s_max: raise only where ρ is at most this. None: everywhere.
        s_noise: standard deviation of the fresh noise, positive; slightly above 1 makes up for lost detail.
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Karras et al. 2022, algorithm 2 and table 5.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        s_churn: float = 40.0,
        s_min: float = 0.05,
        s_max: float | None = 50.0,
        s_noise: float = 1.0,
        nfe: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        for name, value in (("s_churn", s_churn), ("s_min", s_min)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: must be at least 0")
        if s_max is not None and not s_max > s_min:
            raise ValueError(f"s_max={s_max}: must be above s_min={s_min}")
        if not 0 < s_noise < math.inf:
            raise ValueError(f"s_noise={s_noise}: must be positive")
        self.s_churn, self.s_min, self.s_noise = s_churn, s_min, s_noise
        self.stochastic, self.order = s_churn > 0, 1 if s_churn > 0 else 2
        self.s_max = math.inf if s_max is None else s_max

    def perturb(self, x: Images, p: Point, ask: Ask, normal: Normal) -> tuple[Images, Point]:
        """x̂/α̂ = x/α + √(ρ̂² − ρ²)·s_noise·z; no further than the path's noise end."""
        gamma = min(self.s_churn / ask.steps, math.sqrt(2) - 1)
        if gamma == 0 or p.alpha == 0 or not self.s_min <= p.level <= self.s_max:
            return x, p
        up = ask.point(p.level * (1 + gamma))
        spread = self.s_noise * math.sqrt(max(up.level**2 - p.level**2, 0.0))
        return (up.alpha / p.alpha) * x + up.alpha * spread * normal(), up


class Midpoint(Sampler):
    """The midpoint rule in σ/α. Second order, two evaluations a step.

    Args:
        middle: "arithmetic" is halfway in σ/α; "geometric" is halfway in log-SNR: DPM-Solver-2, k-diffusion's DPM-2.
        grid: where the times lie.
        nfe: network evaluations per sample.
        steps: steps instead.

    Source: Karras et al. 2022, algorithm 3 with α = 1/2; DPM-Solver-2: Lu et al. 2022a, algorithm 1.
    """

    order = evaluations = 2

    def __init__(
        self,
        *,
        grid: Grid,
        middle: Literal["arithmetic", "geometric"] = "arithmetic",
        nfe: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(grid=grid, nfe=nfe, steps=steps)
        if middle not in ("arithmetic", "geometric"):
            raise ValueError(f"middle={middle}: must be arithmetic or geometric")
        self.middle = middle

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q/α_q = x_p/α_p + (ρ_q − ρ_p)·ε_m."""
        p, said = history[-1]
        if p.alpha == 0:
            return ddim(said.x0, said.eps, q)
        m = ask.point((p.level + q.level) / 2 if self.middle == "arithmetic" else math.sqrt(p.level * q.level))
        guess = _move(x, p, m, m.level - p.level, (1.0,), [said.eps])
        return _move(x, p, q, q.level - p.level, (1.0,), [ask(guess, m).eps])


class DPMSolverPP2S(Sampler):
    """DPM-Solver++(2S): the exponential midpoint rule on x0 in log-SNR. Second order, two evaluations a step.

    Source: Lu et al. 2022b, algorithm 1 with r = 1/2.
    """

    order = evaluations = 2

    def step(self, x: Images, q: Point, history: History, ask: Ask, normal: Normal) -> Images:
        """x_q = (σ_q/σ_p)·x_p + (α_q − α_p·σ_q/σ_p)·x0_m."""
        p, said = history[-1]
        if p.alpha == 0:
            return ddim(said.x0, said.eps, q)
        m = ask.point(math.sqrt(p.level * q.level))
        return _hold_x0(x, p, q, ask(_hold_x0(x, p, m, said.x0), m).x0)


def _hold_x0(x: Images, p: Point, q: Point, x0: Images) -> Images:
    ratio = q.sigma / p.sigma
    return ratio * x + (q.alpha - ratio * p.alpha) * x0
