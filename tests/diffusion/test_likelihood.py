"""Log-densities against closed forms: of the data, and of what the probability-flow ODE makes of the prior."""

import itertools
import math

import pytest
import torch
from torch import nn

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.exact import GAUSSIAN, MIXTURE
from denoiselab.diffusion.guidance import ClassifierFree
from denoiselab.diffusion.likelihood import bits_per_dim, log_density
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import DDPMLinear, DDPMScaledLinear, RectifiedFlow, VarianceExploding, ZeroTerminalSNR
from denoiselab.diffusion.prediction import Velocity

PATHS = {
    "vp": DDPMLinear(),
    "vp_scaled": DDPMScaledLinear(),
    "vp_to_pure_noise": ZeroTerminalSNR(path=DDPMLinear()),
    "rectified_flow": RectifiedFlow(),
    "ve": VarianceExploding(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
BITS = 2 * math.log(2)  # nats in a bit per dimension, of two dimensions


def noise(n, seed=0):
    return NoiseSource(seed=seed, index=torch.arange(n))


def sample(mixture, n):
    source = noise(n, seed=1)
    return mixture.sample(source.normal("x", (2,), torch.float64), source.uniform("part"))


def density(mixture, path, x, n=64, **options):
    return log_density(mixture.denoiser(path), x.reshape(-1, 1, 1, 2), Condition(), noise(len(x)), **options)


def ends(path):
    t = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    return zip(path.alpha(t).tolist(), path.sigma(t).tolist(), strict=True)


@every_path
def test_a_gaussian_is_transported_exactly(path):
    """The ODE keeps the standardised point: x_T = α_T·m + √(V_T/V)·(x − α·m), with the prior N(0, σ_T²) there."""
    x, (mean, std) = sample(GAUSSIAN, 32), (GAUSSIAN.means[0], 0.5)
    (alpha, sigma), (alpha_T, sigma_T) = ends(path)
    gain = math.sqrt((alpha_T**2 * std**2 + sigma_T**2) / (alpha**2 * std**2 + sigma**2))
    end = alpha_T * mean + gain * alpha * (x - mean)
    prior = torch.distributions.Normal(0, sigma_T).log_prob(end).sum(1)
    expected = prior + 2 * math.log(gain * alpha)
    for steps, bound in ((50, 1e-4), (200, 1e-6)):
        found = density(GAUSSIAN, path, x, steps=steps, exact=True)
        assert ((found.value - expected) / BITS).abs().max() < bound
        assert (found.error == 0).all()


@every_path
def test_the_nats_of_a_gaussian_are_its_entropy(path):
    """ln p is a quadratic here, and three Gauss-Hermite points a dimension integrate it exactly."""
    nodes, weights = torch.tensor([-1.0, 0, 1]).double() * math.sqrt(3), torch.tensor([1.0, 4, 1]).double() / 6
    x = GAUSSIAN.means[0] + 0.5 * torch.cartesian_prod(nodes, nodes)
    mean = (torch.cartesian_prod(weights, weights).prod(1) * density(GAUSSIAN, path, x, exact=True).value).sum()
    entropy = 2 * math.log(0.5 * math.sqrt(2 * math.pi * math.e))
    # The excess is the noise at the data end and the signal that the prior ignores at the noise end, which both grow -E ln p.
    (alpha, sigma), (alpha_T, sigma_T) = ends(path)
    second = 0.25 + GAUSSIAN.means.square().mean().item()
    excess = (sigma / alpha / 0.5) ** 2 / 2 + (alpha_T / sigma_T) ** 2 * second / 2  # nats per dimension, upper bounds
    assert -1e-5 < (-mean - entropy).item() / 2 < excess + 1e-4
    if not isinstance(path, DDPMScaledLinear):  # which is for latents, not to be measured in bits
        assert abs(-mean - entropy) / BITS < 1e-3


@pytest.mark.parametrize("path", ["rectified_flow", "vp_to_pure_noise"])
def test_a_mixture_has_its_density(path):
    """These paths end in pure noise, so the prior is exact; the noise at the data end is that of the closed form."""
    path = PATHS[path]
    x = torch.cat((sample(MIXTURE, 48), torch.tensor([[0.0, 0.0], [1.5, -1.5]]).double()))
    (alpha, sigma), _ = ends(path)
    smooth = MIXTURE.log_prob(x, torch.tensor(1.0), torch.tensor(sigma / alpha))
    found = density(MIXTURE, path, x, exact=True).value
    assert ((found - smooth) / BITS).abs().max() < 3e-4
    if isinstance(path, RectifiedFlow):
        assert ((found - MIXTURE.log_prob(x)) / BITS).abs()[:48].max() < 1e-3


@every_path
def test_the_density_of_a_mixture_integrates_to_one(path):
    """Whatever the prior is: the rectangle rule on a smooth function is exact to many digits."""
    side = torch.arange(-4, 4, 0.125, dtype=torch.float64)
    total = density(MIXTURE, path, torch.cartesian_prod(side, side), exact=True).value.exp().sum() * 0.125**2
    assert abs(total - 1) < 1e-4


def test_the_solver_is_of_fourth_order():
    x = sample(MIXTURE, 16)
    exact = density(MIXTURE, PATHS["rectified_flow"], x, steps=640, exact=True).value
    errors = [
        (density(MIXTURE, PATHS["rectified_flow"], x, steps=n, exact=True).value - exact).abs().mean()
        for n in (40, 80, 160)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.7 < math.log2(coarse / fine) < 4.6


@pytest.mark.parametrize("path", ["vp", "rectified_flow", "ve"])
def test_hutchinson_lies_in_its_interval(path):
    x = sample(MIXTURE, 16)
    exact = density(MIXTURE, PATHS[path], x, steps=20, exact=True).value
    found = density(MIXTURE, PATHS[path], x, steps=20, probes=24)
    assert (found.error > 0).any()
    assert ((found.value - exact).abs() <= 4 * found.error + 1e-9).all()
    # In two dimensions vᵀJv is the trace ± (J₁₂ + J₂₁): a single probe is off by as much as the error says of 24.
    one = density(MIXTURE, PATHS[path], x, steps=20, probes=1)
    assert one.error.isnan().all()
    assert ((one.value - exact).abs() / (found.error * math.sqrt(24)) - 1).abs().median() < 0.1


def test_the_standard_error_is_that_of_repeated_draws():
    x, repeats = sample(MIXTURE, 8), 60
    found = density(MIXTURE, PATHS["rectified_flow"], x.repeat(repeats, 1), steps=20, probes=8)
    spread = found.value.reshape(repeats, 8).std(0)
    said = found.error.reshape(repeats, 8).square().mean(0).sqrt()
    assert ((spread / said - 1).abs() < 0.35).all()  # a standard deviation of 60 draws is known to 9 %


def test_sample_i_has_its_own_probes():
    x, path = sample(MIXTURE, 6), PATHS["rectified_flow"]
    together = density(MIXTURE, path, x, probes=2, steps=10)
    alone = [
        log_density(
            MIXTURE.denoiser(path),
            x[i].reshape(1, 1, 1, 2),
            Condition(),
            NoiseSource(seed=0, index=torch.tensor([i])),
            probes=2,
            steps=10,
        )
        for i in range(6)
    ]
    torch.testing.assert_close(torch.cat([a.value for a in alone]), together.value, rtol=1e-12, atol=1e-12)


def test_dequantisation():
    """The bits of a grey level are those of the mass in its bin."""
    path, repeats, width = PATHS["rectified_flow"], 256, 2 / 255
    x = torch.tensor([[3.0, 200.0], [128.0, 127.0], [90.0, 255.0]]).double() / 127.5 - 1
    law = torch.distributions.Normal(GAUSSIAN.means[0], 0.5)
    mass = (law.cdf(x + width / 2) - law.cdf(x - width / 2)).log2().sum(1)
    images, source = x.repeat(repeats, 1).reshape(-1, 1, 1, 2), noise(3 * repeats)
    found = bits_per_dim(GAUSSIAN.denoiser(path), images, Condition(), source, exact=True).value
    draws = found.reshape(repeats, 3)
    assert (draws.std(0) > 1e-3).all()  # p changes by some per cent over a bin
    error = 4 * draws.std(0) / math.sqrt(repeats) + 1e-4
    assert ((draws.mean(0) + mass / 2).abs() < error).all()
    moved = images + width * (source.uniform("dequantise", (1, 1, 2)) - 0.5)
    nats = log_density(GAUSSIAN.denoiser(path), moved, Condition(), source, exact=True).value
    torch.testing.assert_close(found, -nats / BITS + math.log2(127.5), rtol=1e-12, atol=0)


class Network(nn.Module):
    """In float32, with weights, labels and a second channel."""

    def __init__(self):
        super().__init__()
        self.layer, self.labels = nn.Linear(8, 8), nn.Embedding(4, 8)

    def forward(self, x, t, condition):
        y = self.layer(x.flatten(1)) + self.labels(condition.label + 1) + 1e-3 * t[:, None]
        return y.tanh().reshape(x.shape)


@pytest.mark.parametrize("guided", [False, True])
def test_a_network_in_float32_without_gradients(guided):
    denoiser = NetworkDenoiser(network=Network(), path=RectifiedFlow(), prediction=Velocity())
    if guided:
        denoiser = ClassifierFree(denoiser, scale=2.0)
    x0, condition = noise(5).normal("x0", (2, 2, 2)), Condition(label=torch.tensor([0, 1, 2, 0, 1]))
    with torch.no_grad():
        exact = bits_per_dim(denoiser, x0, condition, noise(5), steps=10, exact=True)
        found = bits_per_dim(denoiser, x0, condition, noise(5), steps=10, probes=32)
    assert exact.value.dtype == torch.float64
    assert not exact.value.requires_grad
    assert exact.value.isfinite().all()
    assert ((found.value - exact.value).abs() < 4 * found.error).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"probes": 0}, "probes=0: must be at least 1"),
        ({"levels": 1}, "levels=1: must be at least 2"),
    ],
)
def test_ranges_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(GAUSSIAN.denoiser(RectifiedFlow()), torch.zeros(1, 1, 1, 2), Condition(), noise(1), **options)


def test_what_has_no_density_is_refused():
    denoiser = GAUSSIAN.denoiser(RectifiedFlow())
    denoiser.consistent = False
    with pytest.raises(ValueError, match=r"^guidance=CFG\+\+: .* no density"):
        log_density(denoiser, torch.zeros(1, 1, 1, 2), Condition(), noise(1))
