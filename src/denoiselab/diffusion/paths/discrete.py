"""Tables of T betas, exact at their T points and smooth between.

ᾱ_i = Π_{j ≤ i} (1 − β_j) stands at t = (i + 1)/T. λ(t) is the not-a-knot cubic spline through the T values of ln(ᾱ/(1 − ᾱ))
(a piecewise-linear one would destroy second-order convergence), and goes on straight beyond its ends, where only a shifted
path asks. Below the first point there is no data: t_min ≥ 1/T.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from denoiselab.diffusion.paths.base import Time, VariancePreserving

ROUNDS = 8  # of Newton's method: enough for the last digit in an interval of the table, and no device is waited for


class BetaTable(VariancePreserving):
    """A variance preserving path through a table of betas.

    c_noise is DDPM's step number i = 1000·t − 1, and 1000·i/T for other T: improved DDPM's networks of T = 4000 were told
    that (its `rescale_timesteps`).

    Args:
        betas: float64 of shape (T,), in (0, 1).
        t_min: data end, at least 1/T; None is 1/T.
        t_max: noise end, at most 1.
    """

    def __init__(self, *, betas: Tensor, t_min: float | None, t_max: float) -> None:
        self.steps = len(betas)
        self.lowest = 1 / self.steps
        super().__init__(t_min=self.lowest if t_min is None else t_min, t_max=t_max)
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        self._knots = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        self._slopes = _spline_slopes(self._knots)
        self._tables = {self._knots.device: (self._knots, self._slopes)}

    def _piece(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Place in units of the interval, in [0, 1] (beyond at the ends), the value at its left knot and Hermite's three."""
        if t.device not in self._tables:
            self._tables[t.device] = (self._knots.to(t.device), self._slopes.to(t.device))
        knots, slopes = self._tables[t.device]
        position = t * self.steps - 1
        i = position.floor().clamp(0, self.steps - 2).long()
        rise, m0, m1 = knots[i + 1] - knots[i], slopes[i], slopes[i + 1]
        return position - i, knots[i], m0, 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise

    def log_snr(self, t: Time) -> Time:
        """The cubic through the two neighbouring points; a straight line beyond the ends."""
        place, y, first, second, third = self._piece(t)
        u = place.clamp(0, 1)
        slope = first + u * (2 * second + u * 3 * third)
        return (y + u * (first + u * (second + u * third)) + (place - u) * slope).to(t.dtype)

    def d_log_snr(self, t: Time) -> Time:
        """The derivative of that."""
        place, _, first, second, third = self._piece(t)
        u = place.clamp(0, 1)
        return ((first + u * (2 * second + u * 3 * third)) * self.steps).to(t.dtype)

    def t_of_log_snr(self, log_snr: Time) -> Time:
        """Safeguarded Newton inside the interval that holds the value (λ falls with t); a straight line beyond the ends."""
        knots = self._knots.to(log_snr.device)
        wanted = log_snr.double()
        value = wanted.clamp(knots[-1], knots[0])
        i = (torch.searchsorted(-knots, -value).clamp(1, self.steps - 1) - 1).double()
        low, high = (i + 1) / self.steps, (i + 2) / self.steps
        t = (low + high) / 2
        for _ in range(ROUNDS):
            error = self.log_snr(t) - value
            low, high = torch.where(error > 0, t, low), torch.where(error > 0, high, t)
            t = (t - error / self.d_log_snr(t)).maximum(low).minimum(high)
        return (t + (wanted - value) / self.d_log_snr(t)).to(log_snr.dtype)

    def c_noise(self, t: Time) -> Time:
        """1000·i/T with i = T·t − 1."""
        return 1000 * t - 1000 / self.steps


def _spline_slopes(y: Tensor) -> Tensor:
    """Slopes at the knots (unit spacing) of the not-a-knot cubic spline through y.

    Continuity of the second derivative at inner knots: m[i−1] + 4·m[i] + m[i+1] = 3·(y[i+1] − y[i−1]); of the third at
    the first and last inner knots: m[0] + 2·m[1] = (5·(y[1]−y[0]) + (y[2]−y[1]))/2, and mirrored. Gaussian elimination of
    this tridiagonal system needs no pivoting. Source: de Boor 1978, chapter IV.
    """
    rise = y.diff().tolist()
    above, slopes = [2.0], [(5 * rise[0] + rise[1]) / 2]
    for left, right in pairwise(rise):
        pivot = 4 - above[-1]
        above.append(1 / pivot)
        slopes.append((3 * (left + right) - slopes[-1]) / pivot)
    slopes.append(((5 * rise[-1] + rise[-2]) / 2 - 2 * slopes[-1]) / (1 - 2 * above[-1]))
    for i in reversed(range(len(above))):
        slopes[i] -= above[i] * slopes[i + 1]
    return torch.tensor(slopes, dtype=y.dtype, device=y.device)


def _between(beta_min: float, beta_max: float, steps: int, power: int) -> Tensor:
    """Betas whose roots of this power are equally spaced."""
    if not 0 < beta_min < beta_max < 1:
        raise ValueError(f"beta_min={beta_min}: needs 0 < beta_min < beta_max={beta_max} < 1")
    first, last = beta_min ** (1 / power), beta_max ** (1 / power)
    return (first + (last - first) * _whole(steps) / (steps - 1)) ** power


def _whole(steps: int) -> Tensor:
    """0, 1 … T − 1, on the CPU by name, also while configs are checked under `torch.device("meta")`."""
    if steps < 4:
        raise ValueError(f"steps={steps}: must be at least 4")
    if steps > 100_000:
        raise ValueError(f"steps={steps}: must be at most 100,000")
    return torch.arange(steps, dtype=torch.float64, device="cpu")


class DDPMLinear(BetaTable):
    """DDPM's linear betas (Ho, Jain & Abbeel 2020, section 4).

    Args:
        beta_min: first β, in (0, beta_max).
        beta_max: last β, below 1.
        steps: T, at least 4.
        t_min: data end, at least 1/T; None is 1/T.
        t_max: noise end, at most 1.
    """

    def __init__(
        self,
        *,
        beta_min: float = 1e-4,
        beta_max: float = 0.02,
        steps: int = 1000,
        t_min: float | None = None,
        t_max: float = 1.0,
    ) -> None:
        super().__init__(betas=_between(beta_min, beta_max, steps, power=1), t_min=t_min, t_max=t_max)


class DDPMScaledLinear(BetaTable):
    """Latent diffusion's betas, linear in √β: `DDPMLinear`'s arguments, with the ends of Stable Diffusion's configuration.

    Source: Rombach et al. 2022.
    """

    def __init__(
        self,
        *,
        beta_min: float = 0.00085,
        beta_max: float = 0.012,
        steps: int = 1000,
        t_min: float | None = None,
        t_max: float = 1.0,
    ) -> None:
        super().__init__(betas=_between(beta_min, beta_max, steps, power=2), t_min=t_min, t_max=t_max)


class DDPMCosine(BetaTable):
    """Improved DDPM's betas min(1 − f((i + 1)/T)/f(i/T), 0.999), f(t) = cos²((t + s)/(1 + s)·π/2).

    1 − cos²v/cos²u = sin(v − u)·sin(v + u)/cos²u has no cancellation.

    Args:
        s: offset, positive.
        steps: T, at least 4; 4000 in the paper.
        t_min: data end, at least 1/T; None is 1/T.
        t_max: noise end, at most 1.

    Source: Nichol & Dhariwal 2021, eq. 17 and what follows it.
    """

    def __init__(self, *, s: float = 0.008, steps: int = 1000, t_min: float | None = None, t_max: float = 1.0) -> None:
        if not s > 0:
            raise ValueError(f"s={s}: must be positive")
        u, step = (_whole(steps) / steps + s) * (math.pi / 2 / (1 + s)), math.pi / 2 / (1 + s) / steps
        betas = math.sin(step) * torch.sin(2 * u + step) / torch.cos(u) ** 2
        super().__init__(betas=betas.clamp(max=0.999), t_min=t_min, t_max=t_max)
