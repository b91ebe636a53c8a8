"""Densities whose best denoiser is known in closed form."""

import torch

from denoiselab.diffusion.denoiser import NetworkDenoiser, Posterior, per_sample
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow
from denoiselab.diffusion.prediction import X0, Epsilon, V, Velocity

# Narrowed to a closed range on which every prediction can be read.
PATHS = {
    "ddpm_linear": DDPMLinear(),
    "cosine": Cosine(),
    "rectified_flow": RectifiedFlow(t_max=0.999),
}
PREDICTIONS = {"epsilon": Epsilon(), "x0": X0(), "v": V(), "velocity": Velocity()}


class Mixture:
    """A mixture of isotropic Gaussians: weights (K,), means (K, D), standard deviations (K,).

    E[x0 | x_t] = Σ_k r_k·(m_k + α·s_k²/(α²·s_k² + σ²)·(x_t − α·m_k)) with responsibilities r_k of N(α·m_k, α²·s_k² + σ²).
    """

    def __init__(self, weights, means, stds):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)

    def x0(self, x, alpha, sigma):
        variance = alpha**2 * self.stds**2 + sigma**2
        difference = x[:, None] - alpha * self.means
        log_r = (
            self.weights.log() - difference.square().sum(-1) / (2 * variance) - self.means.shape[1] / 2 * variance.log()
        )
        each = self.means + (alpha * self.stds**2 / variance)[:, None] * difference
        return (log_r.softmax(1)[..., None] * each).sum(1)

    def denoiser(self, path):
        return ExactDenoiser(path, self)

    def network(self, path, prediction):
        """A network that outputs F = a·x0 + b·ε of the best denoiser."""
        denoiser = self.denoiser(path)

        def network(x, c_noise, condition):
            # The tests' paths have c_noise = 1000·t, or 1000·t − 1 on DDPM's grid.
            t = (c_noise + 1 if isinstance(path, DDPMLinear) else c_noise) / 1000
            x0, eps = denoiser(x, t, condition)
            a, b = prediction.ab(path, t)
            return per_sample(a, x) * x0 + per_sample(b, x) * eps

        return network

    def network_denoiser(self, path, prediction):
        return NetworkDenoiser(network=self.network(path, prediction), path=path, prediction=prediction)


class ExactDenoiser:
    def __init__(self, path, mixture):
        self.path, self.mixture = path, mixture

    def __call__(self, x, t, condition):
        if t.ndim and len(set(t.tolist())) > 1:
            parts = [self(x[i : i + 1], t[i], condition) for i in range(len(x))]
            return Posterior(torch.cat([p.x0 for p in parts]), torch.cat([p.eps for p in parts]))
        t = t.flatten()[0] if t.ndim else t
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        x0 = self.mixture.x0(x.flatten(1), alpha, sigma).reshape(x.shape)
        return Posterior(x0, (x - alpha * x0) / sigma)

    def evaluations(self, t):
        return 1


MIXTURE = Mixture([0.3, 0.5, 0.2], [[1.0, -0.5], [-1.2, 0.4], [0.3, 1.5]], [0.3, 0.5, 0.2])
GAUSSIAN = Mixture([1.0], [[0.7, -0.4]], [0.5])
