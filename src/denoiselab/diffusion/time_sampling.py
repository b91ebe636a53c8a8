"""At which times the training loss is asked: distributions on [t_min, t_max].

A distribution is its inverse CDF applied to uniform numbers. Stratified numbers, (place + u)/B over the *global* batch of
B, put one sample into each of B equal slices of probability: the same expectation with less variance (Kingma et al. 2021,
appendix I.1, does it with one shared u).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path, Time


class TimeSampling(nn.Module):
    """A distribution of training times; a module, so that what it has learned is saved. A subclass is one `quantile`.

    Args:
        stratified: spread the draws over the global batch.
    """

    observes = False  # whether `observe` wants to be told the losses

    def __init__(self, *, stratified: bool = True) -> None:
        super().__init__()
        self.stratified = stratified

    def forward(self, path: Path, noise: NoiseSource) -> Time:
        """Times in [t_min, t_max], float64 of shape (B,)."""
        u = noise.uniform("time")
        if self.stratified:
            u = (noise.index + u) / (noise.total or len(u))
        return self.times(path, u)

    def times(self, path: Path, u: Time) -> Time:
        """The inverse CDF: probabilities in (0, 1) to times."""
        return path.t_min + (path.t_max - path.t_min) * self.quantile(u)

    def quantile(self, u: Time) -> Time:
        """The inverse CDF of a law that is the same on every path: probabilities to fractions of the range, in [0, 1]."""
        raise NotImplementedError

    def weight(self, path: Path, t: Time) -> Time:
        """What the losses at t are multiplied by, so that their mean is that of the law meant, not of the law drawn from."""
        return torch.ones_like(t)

    def observe(self, path: Path, t: Time, loss: Float[Tensor, " N"]) -> None:
        """Learn from the weighted losses of a whole global batch, in order of place; once per optimizer step.

        They are NaN after a step that did not count.
        """


class Uniform(TimeSampling):
    """Uniform in t."""

    def quantile(self, u: Time) -> Time:
        """The identity."""
        return u


class LogitNormal(TimeSampling):
    """logit of the fraction is normal: more training in the middle of the path.

    Args:
        mean: of the logit; above 0 means noisier.
        std: of the logit, positive.
        stratified: spread the draws over the global batch.

    Source: Esser et al. 2024, eq. 19, where (0, 1) did best.
    """

    def __init__(self, *, mean: float = 0.0, std: float = 1.0, stratified: bool = True) -> None:
        super().__init__(stratified=stratified)
        if not std > 0:
            raise ValueError(f"std={std}: must be positive")
        self.mean, self.std = mean, std

    def quantile(self, u: Time) -> Time:
        """sigmoid(mean + std·Φ⁻¹(u))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Mode(TimeSampling):
    """Dense in the middle of the path (scale > 0) or at its ends (scale < 0), and nowhere zero between.

    Args:
        scale: in [−1, 2/(π − 2)], where the inverse CDF rises; 0 is uniform, 1.29 was the paper's best.
        stratified: spread the draws over the global batch.

    Source: Esser et al. 2024, eq. 20, with u for their 1 − u.
    """

    def __init__(self, *, scale: float = 1.29, stratified: bool = True) -> None:
        super().__init__(stratified=stratified)
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale={scale}: must be in [-1, 2/(pi - 2) = 1.7519]")
        self.scale = scale

    def quantile(self, u: Time) -> Time:
        """The fraction u − scale·(sin²(πu/2) − u)."""
        return u - self.scale * ((math.pi / 2 * u).sin().square() - u)


class CosMap(TimeSampling):
    """The law under which the straight path has the log-SNR of the cosine path.

    Source: Esser et al. 2024, eq. 21.
    """

    def quantile(self, u: Time) -> Time:
        """1 − 1/(tan(πu/2) + 1), which is sin/(sin + cos)."""
        angle = math.pi / 2 * u
        return angle.sin() / (angle.sin() + angle.cos())


class Beta(TimeSampling):
    """Beta-distributed fractions of the range.

    Args:
        alpha: power of the fraction, positive; larger means noisier.
        beta: power of 1 − fraction, positive.
        stratified: spread the draws over the global batch.
    """

    def __init__(self, *, alpha: float, beta: float, stratified: bool = True) -> None:
        super().__init__(stratified=stratified)
        for key, value in (("alpha", alpha), ("beta", beta)):
            if not value > 0:
                raise ValueError(f"{key}={value}: must be positive")
        self.alpha, self.beta = alpha, beta

    def quantile(self, u: Time) -> Time:
        """The inverse of the regularised incomplete beta function."""
        from scipy.special import betaincinv

        return torch.as_tensor(betaincinv(self.alpha, self.beta, u.cpu().numpy()), device=u.device)


class LogNormalSigma(TimeSampling):
    """ln(σ/α) is normal, cut off at the ends of the path.

    Args:
        mean: of ln(σ/α).
        std: of ln(σ/α), positive.
        stratified: spread the draws over the global batch.

    Source: Karras et al. 2022, table 1 and section 5 (P_mean, P_std).
    """

    def __init__(self, *, mean: float = -1.2, std: float = 1.2, stratified: bool = True) -> None:
        super().__init__(stratified=stratified)
        if not std > 0:
            raise ValueError(f"std={std}: must be positive")
        self.mean, self.std = mean, std

    def times(self, path: Path, u: Time) -> Time:
        """From u within the probabilities of the path's ends; σ/α is infinite at pure noise, whose probability is 1."""
        ends = torch.tensor([path.t_min, path.t_max], dtype=u.dtype, device=u.device)
        low, high = torch.special.ndtr((-path.log_snr(ends) / 2 - self.mean) / self.std)
        log_noise = self.mean + self.std * torch.special.ndtri(low + (high - low) * u)
        return path.t_of_log_snr(-2 * log_noise).clamp(path.t_min, path.t_max)


class LossImportance(TimeSampling):
    """More often where the loss is large, with weights under which its mean stays that of uniform times.

    The range is cut into equal bins, drawn with p ∝ √E[L²] over each bin's last 10 losses (and a thousandth uniform);
    uniformly until every bin has 10. Losses are weighted by (1/bins)/p, and observed without that weight.

    Args:
        bins: how many, at least 1; every one has to be visited 10 times before anything happens.
        stratified: spread the draws over the global batch.

    Source: Nichol & Dhariwal 2021, section 3.3 (eq. 18), where each of T = 1000 steps is a bin.
    """

    observes = True
    length, uniform_share = 10, 1e-3
    losses: Tensor
    count: Tensor

    def __init__(self, *, bins: int = 1000, stratified: bool = True) -> None:
        super().__init__(stratified=stratified)
        if bins < 1:
            raise ValueError(f"bins={bins}: must be at least 1")
        self.bins = bins
        self.register_buffer("losses", torch.zeros(bins, self.length, dtype=torch.float64))  # a ring for each bin
        self.register_buffer("count", torch.zeros(bins, dtype=torch.int64))  # losses ever seen

    def probabilities(self) -> Float[Tensor, " bins"]:
        """The probability of each bin."""
        size = self.losses.square().mean(1).sqrt()
        share = size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        learned = (1 - self.uniform_share) * share + self.uniform_share / self.bins
        return torch.where((self.count >= self.length).all(), learned, 1 / self.bins)

    def quantile(self, u: Time) -> Time:
        """Linear within each bin of the cumulative histogram."""
        p = self.probabilities()
        ends = p.cumsum(0)
        i = torch.searchsorted(ends, u * ends[-1], right=True).clamp(max=self.bins - 1)
        within = 1 - (ends[i] - u * ends[-1]) / p[i]
        return (i + within.clamp(0, 1)) / self.bins

    def weight(self, path: Path, t: Time) -> Time:
        """(1/bins)/p of the bin of t."""
        return 1 / (self.bins * self.probabilities()[self._bin(path, t)])

    def _bin(self, path: Path, t: Time) -> Tensor:
        fraction = (t - path.t_min) / (path.t_max - path.t_min)
        return (fraction * self.bins).long().clamp(0, self.bins - 1)

    def observe(self, path: Path, t: Time, loss: Float[Tensor, " N"]) -> None:
        """Put each loss, without its weight, into the ring of its bin; what is not finite is left out."""
        loss = loss.to(self.losses.dtype) / self.weight(path, t)
        finite = loss.isfinite()  # one infinite loss would make all later times undefined
        loss, where = loss[finite], self._bin(path, t[finite])
        order = where.argsort(stable=True)
        new = torch.bincount(where, minlength=self.bins)
        first = new.cumsum(0) - new
        rank = torch.empty_like(where)
        rank[order] = torch.arange(len(where), device=where.device) - first[where[order]]  # among the new of its bin
        kept = rank >= (new - self.length)[where]  # no slot is written twice
        slot = (self.count[where] + rank) % self.length
        self.losses[where[kept], slot[kept]] = loss[kept]
        self.count += new
