"""The likelihood of a denoiser: log-density and bits per dimension by the probability-flow ODE.

The ODE ẋ = α̇·x0 + σ̇·ε carries data at t_min to noise at t_max, and along it d ln p/dt = −∇·ẋ (Chen et al. 2018, eq. 8;
Song et al. 2021, eq. 39). Every path is the same ODE in z = x/√(α² + σ²) and the angle θ = arctan(σ/α),

    dz/dθ = cos θ·ε − sin θ·x0,

which is bounded everywhere, pure noise (θ = π/2) included, and free of the path's changes of scale. It is integrated over
ln θ, which spreads the steps evenly over the noise levels near the data and over the angle near the noise, by the classical
Runge-Kutta method: fourth order in z and in ln p.

The model is what the samplers draw: noise N(0, σ²) at t_max, moved to t_min and divided by α there. With D dimensions

    ln p(x0) = ln N(z_max; 0, sin²θ_max) + ∫ ∇·(dz/dθ) dθ + D·ln cos θ_min,   z_min = cos θ_min·x0.

Its two differences from the data's own density are small. The noise at t_min: on rectified flow σ/α = 0.001, where grey
levels are 0.008 apart. And the signal at t_max, which N(0, σ²) ignores: for a perfect denoiser −E ln p grows by at most
½·(α/σ)²·E|x0|², which with E|x0|² = D/4 is 0 on rectified flow, 5e-6 nats per dimension on DDPM's linear path, 2e-5 on
variance exploding and 6e-4 on the scaled-linear path; a single sample's ln p moves by about (α/σ)·x0·ε_max.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Denoiser, Images
from denoiselab.diffusion.noise import NoiseSource


class Likelihood(NamedTuple):
    """A number for each sample, float64 of shape (B,), and its standard error over the probes.

    Args:
        value: nats, or bits per dimension.
        error: 0 where the trace is exact, NaN for a single probe.
    """

    value: Float[Tensor, " B"]
    error: Float[Tensor, " B"]


def log_density(
    denoiser: Denoiser,
    x0: Images,
    condition: Condition,
    noise: NoiseSource,
    *,
    steps: int = 50,
    probes: int = 1,
    exact: bool = False,
) -> Likelihood:
    """The log-density ln p(x0) in nats.

    The divergence is its trace, or Hutchinson's estimate vᵀJv with signs v that stay the same along the ODE (Grathwohl et al.
    2019, section 3.1): unbiased in ln p, and its only randomness.

    Args:
        denoiser: x_t = α·x0 + σ·ε must hold for what it answers; differentiable in x.
        x0: data as the network sees it, shape (B, C, H, W).
        condition: of the batch.
        noise: of the signs; those of sample i depend on (seed, i) alone.
        steps: of the solver, each four evaluations; at least 1.
        probes: vectors v per sample, each one backward pass per evaluation; at least 1.
        exact: take the trace, in D backward passes per evaluation, instead of probes.

    Raises:
        ValueError: if a value is out of its range, or the denoiser has no probability-flow ODE (CFG++).
    """
    for name, number in (("steps", steps), ("probes", probes)):
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1")
    if not denoiser.consistent:
        raise ValueError("guidance=CFG++: renoises with another ε than it removes, so it has no density")
    if getattr(denoiser, "remembers", False):
        raise ValueError("guidance=APG: with a momentum it follows no ODE, so it has no density; use momentum=0")
    denoiser, path, dimension = denoiser.fresh(), denoiser.path, x0[0].numel()
    ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    ends = torch.atan2(path.sigma(ends), path.alpha(ends)).log()
    fractions = torch.linspace(0, 1, 2 * steps + 1, dtype=torch.float64)  # of the way, middles of the steps included
    log_theta = torch.lerp(ends[0], ends[1], fractions)
    t = path.t_of_log_snr(-2 * log_theta.exp().tan().log())
    t[0], t[-1] = path.t_min, path.t_max  # to the last digit: pure noise is pure noise
    alpha, sigma = path.alpha(t), path.sigma(t)
    scale = torch.hypot(alpha, sigma)
    places = torch.stack((scale, torch.atan2(sigma, alpha), alpha / scale, sigma / scale), dim=1).tolist()
    probe = _directions(x0) if exact else _signs(noise, probes, x0)  # (K, B, C, H, W)

    def slope(z: Images, i: int) -> tuple[Images, Tensor]:
        """dz/d ln θ (B, C, H, W) and the estimates of its divergence (K, B), at place i."""
        scale, theta, cosine, sine = places[i]
        with torch.enable_grad():
            x = (scale * z).detach().requires_grad_()
            said = denoiser(x, t[i], condition)
            dz = theta * (cosine * said.eps - sine * said.x0)
            rows = [torch.autograd.grad(dz, x, v, retain_graph=True)[0] for v in probe]
        return dz.detach(), scale * torch.stack([_dot(row, v) for row, v in zip(rows, probe, strict=True)])

    h = float(ends[1] - ends[0]) / steps
    z, total = places[0][2] * x0, torch.zeros(len(probe), len(x0), dtype=torch.float64, device=x0.device)
    for i in range(0, 2 * steps, 2):
        k1, d1 = slope(z, i)
        k2, d2 = slope(z + h / 2 * k1, i + 1)
        k3, d3 = slope(z + h / 2 * k2, i + 1)
        k4, d4 = slope(z + h * k3, i + 2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total += h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    cosine, sine = places[0][2], places[-1][3]
    prior = -_dot(z, z) / (2 * sine**2) - dimension * math.log(math.sqrt(2 * math.pi) * sine)
    value = prior + total.mean(0) + dimension * math.log(cosine)
    spread = (total - total.mean(0)).square().sum(0)
    return Likelihood(value, torch.zeros_like(value) if exact else (spread / (probes * (probes - 1))).sqrt())


def bits_per_dim(
    denoiser: Denoiser,
    x0: Images,
    condition: Condition,
    noise: NoiseSource,
    *,
    steps: int = 50,
    probes: int = 1,
    exact: bool = False,
    levels: int = 256,
) -> Likelihood:
    """Bits per dimension of images of grey levels, by uniform dequantisation: an upper bound on −log₂ P(image)/D.

    The levels are w = 2/(levels − 1) apart in [−1, 1]. P(image) is p integrated over a bin of that width around each value, so
    by Jensen's inequality −log₂ P ≤ −E log₂ p(x0 + w·(u − ½)) − D·log₂ w with u uniform on [0, 1], and

        bits/dim = −log₂ p/D + log₂(1/w),

    6.994 = log₂ 127.5 for 256 levels. (Where (k + u)/256 is scaled to [−1, 1], the bins are 2/256 wide and it is 7, with a
    density that is larger by as much: bits/dim do not depend on the scale.) One u is drawn for each value.

    Args:
        denoiser: as for `log_density`.
        x0: images in [−1, 1] as the codec encodes them, shape (B, C, H, W).
        condition: of the batch.
        noise: of u and the signs.
        steps: of the solver.
        probes: per sample.
        exact: take the trace instead of probes.
        levels: grey levels, at least 2.

    Raises:
        ValueError: if a value is out of its range, or the denoiser has no probability-flow ODE (CFG++).

    Source: Theis et al. 2016, section 3.1; Song et al. 2021, appendix D.2.
    """
    if levels < 2:
        raise ValueError(f"levels={levels}: must be at least 2")
    width = 2 / (levels - 1)
    x0 = x0 + width * (noise.uniform("dequantise", x0.shape[1:]) - 0.5).to(x0.dtype)
    nats = log_density(denoiser, x0, condition, noise, steps=steps, probes=probes, exact=exact)
    per_bit = x0[0].numel() * math.log(2)
    return Likelihood(-nats.value / per_bit - math.log2(width), nats.error / per_bit)


def _dot(a: Images, b: Images) -> Tensor:
    """The scalar products of the samples: float64 of shape (B,)."""
    return (a.double() * b.double()).flatten(1).sum(1)


def _signs(noise: NoiseSource, probes: int, x0: Images) -> Tensor:
    """±1 with equal probability: (K, B, C, H, W)."""
    signs = 2 * (noise.uniform("probes", (probes, *x0.shape[1:])) < 0.5).to(x0.dtype) - 1
    return signs.transpose(0, 1)


def _directions(x0: Images) -> Tensor:
    """√D times each unit vector, so that the mean of vᵀJv is the trace: (D, B, C, H, W)."""
    dimension = x0[0].numel()
    units = math.sqrt(dimension) * torch.eye(dimension, dtype=x0.dtype, device=x0.device)
    return units.reshape(dimension, 1, *x0.shape[1:]).expand(-1, *x0.shape)
