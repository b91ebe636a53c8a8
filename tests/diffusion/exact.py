"""The exact densities of the library, networks that output what they say, and laws propagated through affine steps."""

import math

import torch
from scipy.integrate import quad

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser, Posterior, per_sample
from denoiselab.diffusion.exact import GAUSSIAN, MIXTURE, ExactDenoiser, Mixture
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow, VarianceExploding
from denoiselab.diffusion.prediction import X0, Epsilon, V, Velocity
from denoiselab.diffusion.samplers import points_of

__all__ = [
    "GAUSSIAN",
    "MIXTURE",
    "PATHS",
    "PREDICTIONS",
    "ExactDenoiser",
    "Mixture",
    "Scripted",
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
        a, b = prediction.ab(path.coefficients(t))
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


class Scripted:
    """A denoiser that says the same whatever x is.

    Args:
        path: any.
        what: "x0": x0 is a function of half the log-SNR; "level" and "log_level": ε is one of σ/α or of its logarithm.
        function: of one number.
    """

    consistent = True

    def __init__(self, path, what, function):
        self.path, self.what, self.function = path, what, function

    def place(self, point):
        return {"level": point.level, "log_level": -point.half_log_snr, "x0": point.half_log_snr}[self.what]

    def __call__(self, x, t, condition):
        point = points_of(self.path, t.reshape(1))[0]
        value = torch.full_like(x, self.function(self.place(point)))
        if self.what == "x0":
            return Posterior(value, (x - point.alpha * value) / point.sigma)
        return Posterior((x - point.sigma * value) / point.alpha, value)

    def fresh(self):
        return self

    def solution(self, x, p, q, eta=0.0):
        """What becomes of x without noise: the integrals of `base.py` and, with η, equation (2) of `multistep.py`."""
        start, end = self.place(p), self.place(q)
        rate = 0 if self.what == "level" else 1 + eta
        integral, _ = quad(lambda s: math.exp(rate * (s - end)) * self.function(s), start, end, epsabs=0, epsrel=1e-13)
        if self.what == "x0":
            kept = q.sigma / p.sigma * math.exp(-eta * (end - start))
            return kept * x + q.alpha * rate * integral
        return q.alpha * (x / p.alpha + (q.level if self.what == "log_level" else 1) * integral)
