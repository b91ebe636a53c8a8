"""Densities whose best denoiser is known in closed form: what every claim about paths and samplers is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Images, Posterior, per_sample
from denoiselab.diffusion.paths import Path, Time


class Mixture:
    """A mixture of isotropic Gaussians.

    E[x0 | x_t] = Σ_k r_k·(m_k + α·s_k²/(α²·s_k² + σ²)·(x_t − α·m_k)), with r_k the responsibilities of N(α·m_k, α²·s_k² + σ²).

    Args:
        weights: K positive numbers that sum to 1.
        means: K points of D coordinates.
        stds: K standard deviations.
    """

    def __init__(self, weights: Sequence[float], means: Sequence[Sequence[float]], stds: Sequence[float]) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """Of the mixture: (D,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Of the mixture: (D, D)."""
        centred = self.means - self.mean
        within = (self.weights @ self.stds.square()) * torch.eye(len(self.mean), dtype=torch.float64)
        return (self.weights[:, None] * centred).T @ centred + within

    def sample(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """Points (N, D) of standard normal (N, D) and uniform (N,) numbers."""
        k = torch.searchsorted(self.weights.cumsum(0), uniform).clamp(max=len(self.weights) - 1)
        return self.means[k] + self.stds[k, None] * normal

    def log_prob(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """The log-density of x_t in nats at points (N, D)."""
        return torch.logsumexp(self._log_parts(x, torch.as_tensor(alpha), torch.as_tensor(sigma))[0], dim=1)

    def _log_parts(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ln(weight·density) of each part (N, K), the points relative to its mean (N, K, D), and the variances (1 or N, K)."""
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        variance = alpha.square() * self.stds.square() + sigma.square()
        difference = x[:, None] - alpha[..., None] * self.means
        square = difference.square().sum(-1) / variance
        return (
            self.weights.log() - (square + self.means.shape[1] * (2 * torch.pi * variance).log()) / 2,
            difference,
            variance,
        )

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] at points (N, D), with coefficients of shape () or (N,)."""
        log_parts, difference, variance = self._log_parts(x, alpha, sigma)
        gain = alpha.reshape(-1, 1) * self.stds.square() / variance
        each = self.means + gain[..., None] * difference
        return (log_parts.softmax(1)[..., None] * each).sum(1)

    def denoiser(self, path: Path) -> ExactDenoiser:
        """Its denoiser on a path."""
        return ExactDenoiser(path, self)


class ExactDenoiser:
    """The best denoiser of a mixture, on any path; images are flattened to points, in float64.

    Args:
        path: any.
        mixture: the data.
    """

    consistent = True

    def __init__(self, path: Path, mixture: Mixture) -> None:
        self.path, self.mixture = path, mixture

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """E[x0 | x_t] and the ε that goes with it."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        x0 = self.mixture.x0(x.flatten(1).double(), alpha, sigma).reshape(x.shape).to(x.dtype)
        return Posterior(x0, (x - per_sample(alpha, x) * x0) / per_sample(sigma, x))

    def evaluations(self, t: float) -> int:
        """One."""
        return 1

    def fresh(self) -> ExactDenoiser:
        """Itself."""
        return self


# Two that are used throughout: neither is symmetric, and their parts overlap.
MIXTURE = Mixture([0.3, 0.5, 0.2], [[1.0, -0.5], [-1.2, 0.4], [0.3, 1.5]], [0.3, 0.5, 0.2])
GAUSSIAN = Mixture([1.0], [[0.7, -0.4]], [0.5])
