"""Power in octaves of spatial frequency, and a random field whose best denoiser is a Wiener filter.

A stationary Gaussian field has independent Fourier coefficients of variance P(k). Its best denoiser scales each of them by
α·P/(α²·P + σ²): a linear filter, in closed form. So a sampler that asks it is a linear filter of its noise: the Fourier
transform of its response to a unit impulse is its transfer function, and the spectrum of what it draws is the sum of the
squared transfer functions of all its draws of noise: the start, and one a step where it is stochastic. It is computed, not
estimated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Images, Posterior, per_sample
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path, Time
from denoiselab.diffusion.samplers import Sampler


def radii(height: int, width: int) -> Tensor:
    """|k| of each Fourier coefficient in cycles over the shorter side, float64 of shape (H, W)."""
    side = min(height, width)
    ky, kx = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) * side / n for n in (height, width))
    return torch.hypot(ky[:, None], kx[None])


def octaves(height: int, width: int) -> dict[str, Tensor]:
    """The octaves 1–2, 2–4, … of cycles per image: which coefficients are in each, bool of shape (H, W).

    The mean is in none; an octave's upper end belongs to the next one, and the last one reaches into the corners.
    """
    k = radii(height, width)
    count = int(math.log2(float(k.max()))) + 1
    return {f"{2**i}–{2 ** (i + 1)}": (k >= 2**i) & (k < 2 ** (i + 1)) for i in range(count)}


def in_octaves(power: Tensor) -> Tensor:
    """The mean of a spectrum (…, H, W) in each octave, (…, octaves)."""
    return torch.stack([power[..., chosen].mean(-1) for chosen in octaves(*power.shape[-2:]).values()], dim=-1)


def octave_power(images: Tensor) -> Tensor:
    """The power of each image in each octave, float64 of shape (B, octaves); white noise of variance 1 has 1 in each.

    Args:
        images: of shape (B, C, H, W); the channels are averaged over.
    """
    return in_octaves(torch.fft.fft2(images.double(), norm="ortho").abs().square().mean(1))


def decibels(power: Tensor, reference: Tensor) -> Tensor:
    """10·log10 of a ratio of powers."""
    return 10 * torch.log10(power / reference)


class Field:
    """A stationary Gaussian random field with P(k) ∝ |k|^−slope, on a torus.

    Args:
        side: pixels a side, at least 4.
        slope: of the spectrum; natural images have about 2.
        std: standard deviation of a pixel, positive.
    """

    def __init__(self, *, side: int, slope: float, std: float = 0.5) -> None:
        if side < 4:
            raise ValueError(f"side={side}: must be at least 4")
        if not std > 0:
            raise ValueError(f"std={std}: must be positive")
        power = radii(side, side).clamp(min=1) ** -slope
        self.power = power * std**2 / power.mean()  # (H, W); the variance of a pixel is the mean of P

    def sample(self, white: Tensor) -> Tensor:
        """Draws of the field from white noise of shape (B, C, H, W)."""
        return torch.fft.ifft2(torch.fft.fft2(white.double()) * self.power.sqrt()).real

    def denoiser(self, path: Path) -> WienerDenoiser:
        """Its best denoiser on a path."""
        return WienerDenoiser(path, self.power)


class WienerDenoiser:
    """The best denoiser of a stationary Gaussian field, in float64.

    Args:
        path: any.
        power: the field's spectrum, shape (H, W).
    """

    consistent = True

    def __init__(self, path: Path, power: Tensor) -> None:
        self.path, self.power = path, power

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """E[x0 | x_t] and the ε that goes with it."""
        alpha, sigma = (per_sample(c, x.double()) for c in (self.path.alpha(t), self.path.sigma(t)))
        gain = alpha * self.power / (alpha**2 * self.power + sigma**2)
        x0 = torch.fft.ifft2(torch.fft.fft2(x.double()) * gain).real
        return Posterior(x0, (x - alpha * x0) / sigma)

    def evaluations(self, t: float) -> int:
        """One."""
        return 1

    def fresh(self) -> WienerDenoiser:
        """Itself."""
        return self


class _Impulses(NoiseSource):
    """Row 1 + k of the batch hears a unit impulse at step k, and nothing else."""

    def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        z = torch.zeros(len(self.index), *shape, dtype=torch.float64)
        z[1 + self.step :, ..., 0, 0][:1] = 1
        return z


class Response:
    """How a sampler with a field's best denoiser filters its noise, exactly.

    Args:
        sampler: not an adaptive one, which is no linear filter.
        path: any.
        field: the data.
        steps: of the sampler.
    """

    def __init__(self, sampler: Sampler, path: Path, field: Field, steps: int) -> None:
        assert not sampler.adaptive
        points = sampler.points(path, steps)
        rows = 1 + (len(points) - 1 if sampler.stochastic else 0)
        x = torch.zeros(rows, 1, *field.power.shape, dtype=torch.float64)
        x[0, ..., 0, 0] = points[0].sigma
        noise = _Impulses(seed=0, index=torch.arange(rows))
        end = sampler.integrate(field.denoiser(path), x, points, Condition(), noise)
        self.transfer = torch.fft.fft2(end[:, 0])  # (rows, H, W)
        self.stochastic, self.start, self.should = sampler.stochastic, points[0], field.power

    @property
    def power(self) -> Tensor:
        """The spectrum of what is drawn, (H, W)."""
        return self.transfer.abs().square().sum(0)

    @property
    def squared_distance(self) -> Tensor:
        """Squared distance of each coefficient from the right one, (H, W).

        Without noise of its own: of the transfer function from that of the ODE, along which x_t keeps in proportion to
        √(α²·P + σ²). With it: of the two laws, (√drawn − √P)², the squared 2-Wasserstein distance of Gaussians.
        """
        if self.stochastic:
            return (self.power.sqrt() - self.should.sqrt()).square()
        alpha, sigma = self.start.alpha, self.start.sigma
        right = sigma * (self.should / (alpha**2 * self.should + sigma**2)).sqrt()
        return (self.transfer[0] - right).abs().square()
