"""The exact densities of the library, networks that output what they say, and laws propagated through affine steps."""

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser, per_sample
from denoiselab.diffusion.exact import GAUSSIAN, MIXTURE, ExactDenoiser, Mixture
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow, VarianceExploding
from denoiselab.diffusion.prediction import X0, Epsilon, V, Velocity

import torch

__all__ = [
    "GAUSSIAN",
    "MIXTURE",
    "PATHS",
    "PREDICTIONS",
    "ExactDenoiser",
    "Mixture",
    "law_of",
    "network",
    "network_denoiser",
]

# Narrowed to a closed range on which every prediction can be read.
PATHS = {
    "ddpm_linear": DDPMLinear(),
    "cosine": Cosine(),
    "rectified_flow": RectifiedFlow(t_max=0.999),
}
PREDICTIONS = {"epsilon": Epsilon(), "x0": X0(), "v": V(), "velocity": Velocity()}


def _time_told(path, c_noise):
    """The time that a network is told on the tests' paths."""
    if isinstance(path, VarianceExploding):
        return 2 * c_noise.exp()
    return (c_noise + 1 if isinstance(path, DDPMLinear) else c_noise) / 1000


def network(mixture, path, prediction):
    """A network that outputs F = a·x0 + b·ε of the best denoiser."""
    denoiser = mixture.denoiser(path)

    def output(x, c_noise, condition):
        t = _time_told(path, c_noise)
        said = denoiser(x, t, condition)
        a, b = prediction.ab(path, t)
        return per_sample(a, x) * said.x0 + per_sample(b, x) * said.eps

    return output


def network_denoiser(mixture, path, prediction):
    return NetworkDenoiser(network=network(mixture, path, prediction), path=path, prediction=prediction)


def law_of(sampler, denoiser, points, mean, variance):
    """Mean and variance of the sampler's result in each coordinate, from a start with these, independent and normal.

    For data at a point or of one Gaussian every step is affine in x and the noise, so that the law is computed and not
    estimated: row 0 of the batch is silent, row 1 starts at 1, row 2 + k hears noise 1 at step k.
    """
    rows = len(points) + 1

    class Impulse(NoiseSource):
        def normal(self, purpose, shape, dtype=torch.float64):
            z = torch.zeros(rows, *shape, dtype=torch.float64)
            z[2 + self.step] = 1
            return z

    x = torch.zeros(rows, 1, 1, denoiser.mixture.means.shape[1], dtype=torch.float64)
    x[1] = 1
    noise = Impulse(seed=0, index=torch.arange(rows))
    end = sampler.integrate(denoiser, x, points, Condition(), noise).flatten(1)
    gains = end[1:] - end[0]
    return end[0] + gains[0] * mean, gains[0] ** 2 * variance + gains[1:].square().sum(0)
