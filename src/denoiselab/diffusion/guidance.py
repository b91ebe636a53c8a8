"""Guidance: a denoiser that wraps a denoiser.

Both ends of the path are affine in each other at fixed x_t, so any combination of two posteriors whose weights sum to one
is again a consistent pair (x0, ε).
"""

from __future__ import annotations

import math

import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser, Images, Posterior, per_sample
from denoiselab.diffusion.paths import Time


def unguided(denoiser: Denoiser) -> Denoiser:
    """No guidance: the conditional model as it is."""
    return denoiser


class ClassifierFree:
    """Classifier-free guidance: unconditional + scale·(conditional − unconditional), in one batched network call.

    Scale 1 is exactly the conditional model and scale 0 the unconditional one; both cost one evaluation. Outside the interval
    the conditional model is asked alone.

    Args:
        denoiser: the conditional denoiser; trained with label dropout.
        scale: guidance scale, at least 0.
        sigma_min: guide only where σ/α is at least this. None: from the data end.
        sigma_max: guide only where σ/α is at most this. None: from the noise end.

    Source: Ho & Salimans 2022, eq. 6 with scale = 1 + w; interval: Kynkäänniemi et al. 2024, eq. 6.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        scale: float,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale={scale}: must be at least 0")
        if sigma_min is not None and not sigma_min >= 0:
            raise ValueError(f"sigma_min={sigma_min}: must be at least 0")
        if sigma_max is not None and not sigma_max > (sigma_min or 0.0):
            raise ValueError(f"sigma_max={sigma_max}: must be above sigma_min={sigma_min or 0.0}")
        self.denoiser, self.path, self.scale = denoiser, denoiser.path, scale
        self.sigma_min = 0.0 if sigma_min is None else sigma_min
        self.sigma_max = math.inf if sigma_max is None else sigma_max

    @property
    def needs_null(self) -> bool:
        """Whether the network is asked without labels, so that it must have been trained so."""
        return self.scale != 1

    def _scale(self, t: Time) -> Time:
        """The scale at t: 1 outside the interval."""
        noise_level = self.path.sigma(t) / self.path.alpha(t)
        inside = (noise_level >= self.sigma_min) & (noise_level <= self.sigma_max)
        return torch.where(inside, self.scale, 1.0).to(t.dtype)

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """The guided pair."""
        scale = self._scale(t)
        if bool((scale == 1).all()):
            return self.denoiser(x, t, condition)
        if bool((scale == 0).all()):
            return self.denoiser(x, t, condition.null())
        twice = self.denoiser(
            torch.cat((x, x)), t.repeat(2) if t.ndim else t, Condition.cat((condition, condition.null()))
        )
        (x0, x0_null), (eps, eps_null) = twice.x0.chunk(2), twice.eps.chunk(2)
        s = per_sample(scale, x)
        return Posterior(x0_null + s * (x0 - x0_null), eps_null + s * (eps - eps_null))

    def evaluations(self, t: float) -> int:
        """Two where it guides, else one."""
        scale = float(self._scale(torch.tensor(t, dtype=torch.float64)))
        return self.denoiser.evaluations(t) * (1 if scale in (0.0, 1.0) else 2)
