"""Guidance: a denoiser that wraps a denoiser.

At fixed x_t = α·x0 + σ·ε the two ends are affine in each other. So two posteriors combined with weights that sum to one are
a consistent pair again, and guidance that is defined on x0 takes ε along: where x0 moves by δ, ε moves by −(α/σ)·δ. All of
it works on x0 and ε, whatever the network predicts. Only CFG++ returns an inconsistent pair, and says so.

- A `Contrast` follows the difference of a better and a worse prediction beyond the better one, inside an interval of σ/α:
  guided = worse + scale·(better − worse). The worse one is the same network without labels, or another network.
- `Rescale` and `DynamicThreshold` mend a guided prediction.
- `chain` puts one over the other: the first wraps the network's denoiser.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser, Images, Posterior, per_sample
from denoiselab.diffusion.paths import Time


def unguided(denoiser: Denoiser) -> Denoiser:
    """No guidance: the conditional model as it is."""
    return denoiser


def chain(denoiser: Denoiser, *, parts: dict[str, Callable[..., Denoiser] | None]) -> Denoiser:
    """One guidance over the other, by any names, in order: each makes a denoiser of a denoiser; None leaves one out."""
    for part in parts.values():
        denoiser = denoiser if part is None else part(denoiser)
    return denoiser


class Guidance(ABC):
    """A denoiser over a denoiser, which must not be CFG++: a pair that does not make up x_t cannot be guided further."""

    consistent: bool = True

    def __init__(self, denoiser: Denoiser) -> None:
        if not denoiser.consistent:
            raise ValueError(
                f"denoiser={type(denoiser).__name__}: cannot be guided further, since it breaks x_t = α·x0 + σ·ε; use it "
                "alone"
            )
        self.denoiser, self.path = denoiser, denoiser.path

    @property
    def needs_null(self) -> bool:
        """Whether the network is asked without labels, so that it must have been trained so."""
        return getattr(self.denoiser, "needs_null", False)

    @property
    def learned_variance(self) -> bool:
        """Whether its answers have a variance share."""
        return getattr(self.denoiser, "learned_variance", False)

    @property
    def remembers(self) -> bool:
        """Whether an answer depends on earlier ones, so that it is no ODE that a sampler follows."""
        return getattr(self.denoiser, "remembers", False)

    @abstractmethod
    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """The guided pair."""

    def evaluations(self, t: float) -> int:
        """As many as what it wraps."""
        return self.denoiser.evaluations(t)

    def fresh(self) -> Self:
        """A copy that remembers no earlier samples."""
        other = copy.copy(self)
        other.denoiser = self.denoiser.fresh()
        return other

    def _moved(self, posterior: Posterior, x0: Images, t: Time) -> Posterior:
        """The pair at the same x_t with another x0."""
        ratio = per_sample(self.path.alpha(t) / self.path.sigma(t), x0)
        return posterior._replace(x0=x0, eps=posterior.eps + ratio * (posterior.x0 - x0))


class Contrast(Guidance):
    """Guidance away from a worse prediction, where σ/α lies in an interval.

    Outside the interval, and at scale 1, the better prediction is asked alone.

    Args:
        denoiser: what it asks.
        scale: guidance scale, at least 0.
        sigma_min: guide only where σ/α is at least this. None: from the data end.
        sigma_max: guide only where σ/α is at most this. None: from the noise end.

    Source: of the interval: Kynkäänniemi et al. 2024, eq. 6.
    """

    scales: tuple[float, float] = (0.0, math.inf)  # that are allowed

    def __init__(
        self, denoiser: Denoiser, *, scale: float, sigma_min: float | None = None, sigma_max: float | None = None
    ) -> None:
        super().__init__(denoiser)
        lowest, highest = self.scales
        if not (lowest <= scale <= highest and scale < math.inf):
            allowed = f"at least {lowest:g}" if highest == math.inf else f"in [{lowest:g}, {highest:g}]"
            raise ValueError(f"scale={scale}: must be {allowed}")
        if sigma_min is not None and not sigma_min >= 0:
            raise ValueError(f"sigma_min={sigma_min}: must be at least 0")
        if sigma_max is not None and not sigma_max > (sigma_min or 0.0):
            raise ValueError(f"sigma_max={sigma_max}: must be above sigma_min={sigma_min or 0.0}")
        self.scale = scale
        self.sigma_min = 0.0 if sigma_min is None else sigma_min
        self.sigma_max = math.inf if sigma_max is None else sigma_max

    @property
    def idle(self) -> bool:
        """Whether it is the better prediction everywhere."""
        return self.scale == 1

    def _guides(self, t: Time) -> Tensor:
        """Where it guides: bool of the shape of t."""
        level = self.path.sigma(t) / self.path.alpha(t)
        return (level >= self.sigma_min) & (level <= self.sigma_max) & (not self.idle)

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """The guided pair."""
        return self.both(x, t, condition)[0]

    def both(self, x: Images, t: Time, condition: Condition) -> tuple[Posterior, Posterior]:
        """The guided and the better pair; one and the same object where nothing guides."""
        guides = self._guides(t)
        if not bool(guides.any()):
            alone = self.denoiser(x, t, condition)
            return alone, alone
        better, worse = self._pair(x, t, condition)
        per_row = guides.to(x.device) if t.ndim else torch.ones(1, dtype=torch.bool, device=x.device)
        rows = per_row.reshape(-1, *(1,) * (x.ndim - 1))
        guided = self._combine(better, worse, t, rows)
        x0, eps = torch.where(rows, guided.x0, better.x0), torch.where(rows, guided.eps, better.eps)
        return better._replace(x0=x0, eps=eps), better

    def _combine(self, better: Posterior, worse: Posterior, t: Time, rows: Tensor) -> Posterior:
        """The guided pair; only the samples of `rows`, bool of shape (B, 1, 1, 1) or (1, 1, 1, 1), count."""
        x0 = worse.x0 + self.scale * (better.x0 - worse.x0)
        return Posterior(x0, worse.eps + self.scale * (better.eps - worse.eps))

    @abstractmethod
    def _pair(self, x: Images, t: Time, condition: Condition) -> tuple[Posterior, Posterior]:
        """The better and the worse prediction."""

    def evaluations(self, t: float) -> int:
        """Of both predictions where it guides, else of the better one."""
        time = torch.tensor(t, dtype=torch.float64)
        return self.denoiser.evaluations(t) + (self._more_evaluations(time) if bool(self._guides(time)) else 0)

    @abstractmethod
    def _more_evaluations(self, t: Time) -> int:
        """What the worse prediction costs."""


class ClassifierFree(Contrast):
    """Classifier-free guidance: unconditional + scale·(conditional − unconditional), in one batched network call.

    Scale 1 is exactly the conditional model and scale 0 the unconditional one; both cost one evaluation.

    Args: see `Contrast`; the network must have been trained with label dropout.

    Source: Ho & Salimans 2022, eq. 6 with scale = 1 + w.
    """

    @property
    def needs_null(self) -> bool:
        """Whether the network is asked without labels, so that it must have been trained so."""
        return not self.idle or super().needs_null

    def both(self, x: Images, t: Time, condition: Condition) -> tuple[Posterior, Posterior]:
        """The guided and the conditional pair; at scale 0 there is only one, without labels inside the interval."""
        if self.scale > 0:
            return super().both(x, t, condition)
        alone = self.denoiser(x, t, condition.drop(self._guides(t).to(x.device).expand(len(x))))
        return alone, alone

    def _pair(self, x: Images, t: Time, condition: Condition) -> tuple[Posterior, Posterior]:
        twice = torch.cat((x, x)), t.repeat(2) if t.ndim else t, Condition.cat((condition, condition.null()))
        halves = zip(*((None, None) if end is None else end.chunk(2) for end in self.denoiser(*twice)), strict=True)
        better, worse = (Posterior(*half) for half in halves)
        return better, worse

    def _more_evaluations(self, t: Time) -> int:
        return self.denoiser.evaluations(float(t)) if self.scale > 0 else 0


class CFGPlusPlus(ClassifierFree):
    """CFG++: x0 between the unconditional and the conditional one, renoised with the unconditional ε.

    The pair does not make up x_t, so only samplers whose whole step is x_q = α_q·x0 + σ_q·ε (+ noise) may use it.

    Args: see `Contrast`; the scale is λ in [0, 1].

    Source: Chung et al. 2024, algorithm 2.
    """

    consistent = False
    idle = False  # at λ = 1, too, ε is the unconditional one
    scales = (0.0, 1.0)

    def _combine(self, better: Posterior, worse: Posterior, t: Time, rows: Tensor) -> Posterior:
        return super()._combine(better, worse, t, rows)._replace(eps=worse.eps)


class APG(ClassifierFree):
    """Adaptive projected guidance: x0 = conditional + (scale − 1)·update.

    The update is the difference Δ of the two predictions of x0, in three steps: a momentum over the calls of one batch of
    samples, Δ + β·(the update before); its norm cut to a threshold; its part along the conditional x0, which saturates
    images, weighed by η. Every call counts for the momentum: it is meant for samplers with one evaluation a step.

    Args:
        denoiser: what it asks.
        scale: guidance scale, at least 1.
        eta: η, weight of the parallel part; 0 in the paper, 1 leaves it as it is.
        momentum: β in (−1, 1); negative in the paper.
        norm_threshold: r, the largest norm of an update, positive; it grows with the root of the number of pixels, and the
            paper chooses it for each model. None: no limit.
        sigma_min: lower end of the interval, see `Contrast`.
        sigma_max: upper end of the interval.

    Source: Sadat et al. 2024, section 4.
    """

    scales = (1.0, math.inf)

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        scale: float,
        eta: float = 0.0,
        momentum: float = -0.5,
        norm_threshold: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__(denoiser, scale=scale, sigma_min=sigma_min, sigma_max=sigma_max)
        if not -1 < momentum < 1:
            raise ValueError(f"momentum={momentum}: must be in (-1, 1)")
        if norm_threshold is not None and not norm_threshold > 0:
            raise ValueError(f"norm_threshold={norm_threshold}: must be positive, or null")
        self.eta, self.momentum, self.norm_threshold = eta, momentum, norm_threshold
        self._before: Images | None = None

    @property
    def remembers(self) -> bool:
        """With a momentum."""
        return self.momentum != 0 or super().remembers

    def fresh(self) -> Self:
        """A copy without the update before."""
        other = super().fresh()
        other._before = None
        return other

    def _combine(self, better: Posterior, worse: Posterior, t: Time, rows: Tensor) -> Posterior:
        update = better.x0 - worse.x0
        if self.momentum:
            before = torch.zeros_like(update) if self._before is None else self._before
            update = update + self.momentum * before
            self._before = torch.where(rows, update, before).detach()
        if self.norm_threshold is not None:
            update = update * (self.norm_threshold / _norm(update)).clamp(max=1)
        along = better.x0 / _norm(better.x0)
        parallel = (update * along).sum(_inner(update), keepdim=True) * along
        return self._moved(better, better.x0 + (self.scale - 1) * (update + (self.eta - 1) * parallel), t)


class Autoguidance(Contrast):
    """Autoguidance: guide + scale·(denoiser − guide), where the guide is a smaller or less trained network.

    The guide is asked with the same condition at the same noise level σ/α, on its own path; where that does not reach, the
    denoiser is asked alone.

    Args:
        denoiser: the better denoiser.
        scale: guidance scale, at least 0; 1 is the better denoiser alone.
        guide: the worse denoiser. In a config: the run folder or the checkpoint file of its network.
        guide_weights: in a config: which of its weights, "raw" or an average's name; None is the first average.
        guide_sha256: in a config: of those weights; filled in where it is not given.
        sigma_min: lower end of the interval, see `Contrast`.
        sigma_max: upper end of the interval.

    Source: Karras et al. 2024b, section 4.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        scale: float,
        guide: Denoiser | str | None = None,  # a string never gets here, see app/build.py
        guide_weights: str | None = None,
        guide_sha256: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__(denoiser, scale=scale, sigma_min=sigma_min, sigma_max=sigma_max)
        if guide is None or isinstance(guide, str):
            given = "null" if guide is None else guide
            raise ValueError(f"guide={given}: must be the run folder or the checkpoint file of a worse network")
        self.guide: Denoiser = guide
        ends = torch.tensor([guide.path.t_min, guide.path.t_max], dtype=torch.float64)
        most, least = self._reach = guide.path.log_snr(ends).tolist()
        # A little wider: two paths may mean the same end and differ in the last digit.
        self.sigma_min = max(self.sigma_min, math.exp(-most / 2) * (1 - 1e-9))
        self.sigma_max = min(self.sigma_max, math.exp(-least / 2) * (1 + 1e-9))
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"guide={type(guide.path).__name__}: its path reaches no noise level of the interval")

    def fresh(self) -> Self:
        """A copy in which the guide, too, remembers nothing."""
        other = super().fresh()
        other.guide = self.guide.fresh()
        return other

    def _guide_time(self, t: Time) -> Time:
        """The guide's time of the same noise level."""
        most, least = self._reach
        path = self.guide.path
        return path.t_of_log_snr(self.path.log_snr(t).clamp(least, most)).clamp(path.t_min, path.t_max)

    def _pair(self, x: Images, t: Time, condition: Condition) -> tuple[Posterior, Posterior]:
        time = self._guide_time(t)
        there = per_sample(self.guide.path.sigma(time) / self.path.sigma(t), x) * x
        return self.denoiser(x, t, condition), self.guide(there, time, condition)

    def _more_evaluations(self, t: Time) -> int:
        return self.guide.evaluations(float(self._guide_time(t)))


class Rescale(Guidance):
    """Takes back part of the contrast that guidance adds: x0 is scaled towards the better prediction's standard deviation.

    The paper scales what its network predicts, v. At zero terminal SNR v is −x0, and this is its rule; with less noise v
    turns into ε, and they differ. Scaling ε would add (σ/α)·(1 − factor)·ε to x0, without bound towards pure noise.

    Args:
        denoiser: a guidance that contrasts two predictions.
        phi: φ in [0, 1]: 0 changes nothing, 1 takes the better prediction's deviation over; 0.7 in the paper.

    Source: Lin et al. 2023, section 3.4.
    """

    denoiser: Contrast

    def __init__(self, denoiser: Denoiser, *, phi: float = 0.7) -> None:
        super().__init__(denoiser)
        if not isinstance(denoiser, Contrast):
            raise ValueError(
                f"denoiser={type(denoiser).__name__}: must be a guidance with two predictions, such as cfg, apg or "
                "autoguidance; put one right before it"
            )
        if not 0 <= phi <= 1:
            raise ValueError(f"phi={phi}: must be in [0, 1]")
        self.phi = phi

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """The guided pair with a milder x0."""
        guided, better = self.denoiser.both(x, t, condition)
        if guided is better:
            return guided
        wanted, given = (_above_zero(p.x0.std(_inner(x), keepdim=True)) for p in (better, guided))
        return self._moved(guided, (self.phi * wanted / given + 1 - self.phi) * guided.x0, t)


class DynamicThreshold(Guidance):
    """Keeps x0 in [−1, 1]: clipped at s, a percentile of its absolute values of at least 1, and divided by s.

    For pixels, not for latents.

    Args:
        denoiser: what it asks.
        percentile: as a share in (0, 1]; 0.995 in the paper.

    Source: Saharia et al. 2022, section 2.3 and appendix A.
    """

    def __init__(self, denoiser: Denoiser, *, percentile: float = 0.995) -> None:
        super().__init__(denoiser)
        if not 0 < percentile <= 1:
            raise ValueError(f"percentile={percentile}: must be in (0, 1]")
        self.percentile = percentile

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """The pair with x0 in [−1, 1]."""
        posterior = self.denoiser(x, t, condition)
        # Row by row: some versions of torch refuse quantiles of more than 2^24 numbers at once.
        rows = [row.quantile(self.percentile) for row in posterior.x0.abs().flatten(1)]
        s = torch.stack(rows).clamp(min=1).reshape(-1, *(1,) * (x.ndim - 1))
        return self._moved(posterior, posterior.x0.clamp(-s, s) / s, t)


def _inner(x: Images) -> tuple[int, ...]:
    """All dimensions but that of the batch."""
    return tuple(range(1, x.ndim))


def _above_zero(x: Tensor) -> Tensor:
    """To divide by: a sample that is zero, as an untrained network's may be, stays zero."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _norm(x: Images) -> Tensor:
    """The norm of each sample, (B, 1, 1, 1)."""
    return _above_zero(torch.linalg.vector_norm(x, dim=_inner(x), keepdim=True))
