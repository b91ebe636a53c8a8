"""Formulae as papers print them, against what follows here from the pair (a, b) and from the steps of the samplers."""

import math

import pytest
import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow, VarianceExploding, VPLinear
from denoiselab.diffusion.prediction import EDM, Epsilon
from denoiselab.diffusion.samplers import DDPM, points_of
from denoiselab.diffusion.samplers.single_step import ancestral_variances

SIGMAS = torch.logspace(math.log10(0.002), math.log10(80), 41, dtype=torch.float64)
NOISE = NoiseSource(seed=0, index=torch.arange(5))
X, F = NOISE.normal("xf", (2, 1, 2, 2), torch.float64).unbind(1)
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BARS = (1 - BETAS).cumprod(0)


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def asked_at(path, prediction, sigma):
    """x0 at x_t = α·X from the output F, with what the network was shown and told; at the noise level σ/α = sigma."""
    shown = []

    def network(x, c_noise, condition):
        shown.append((x, c_noise))
        return F

    t = path.t_of_log_snr(-2 * sigma.log())
    denoiser = NetworkDenoiser(network=network, path=path, prediction=prediction)
    return denoiser(path.alpha(t) * X, t, Condition()).x0, *shown[0], t


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("path", [VarianceExploding(), Cosine(), RectifiedFlow()], ids=["ve", "cosine", "flow"])
def test_edms_preconditioning(path, sigma_data):
    """Karras et al. 2022, eq. 7 and table 1, right column: D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) with x = x_t/α."""
    for sigma in SIGMAS:
        variance = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
        c_in, c_noise = 1 / variance.sqrt(), sigma.log() / 4
        x0, x_in, told, _ = asked_at(path, EDM(sigma_data=sigma_data), sigma)
        assert_close(x0, c_skip * X + c_out * F, 1e-11)
        assert_close(x_in, c_in * X)
        assert_close(told, c_noise.expand(5))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edms_target_and_input_have_unit_variance_and_the_errors_least_gain(sigma_data):
    """Karras et al. 2022, eq. 8 and appendix B.6: the target is (y − c_skip·(y + n))/c_out; c_out is as small as can be."""
    path, prediction = VarianceExploding(), EDM(sigma_data=sigma_data)
    c_skip, c_out = (
        sigma_data**2 / (SIGMAS**2 + sigma_data**2),
        SIGMAS * sigma_data / (SIGMAS**2 + sigma_data**2).sqrt(),
    )
    a, b = prediction.ab(path.coefficients(SIGMAS))
    assert_close(a, (1 - c_skip) / c_out)
    assert_close(b, -c_skip * SIGMAS / c_out)
    assert_close(a**2 * sigma_data**2 + b**2, torch.ones_like(a))
    assert_close(prediction.c_in(path.coefficients(SIGMAS)).square() * (sigma_data**2 + SIGMAS**2), torch.ones_like(a))
    for other in (c_skip + 0.01, c_skip - 0.01):  # with another c_skip, unit variance needs a larger c_out
        assert (((1 - other) ** 2 * sigma_data**2 + other**2 * SIGMAS**2).sqrt() > c_out).all()


@pytest.mark.parametrize(("path", "c_noise"), [(VPLinear(), "vp"), (VarianceExploding(), "ve")], ids=["vp", "ve"])
def test_the_other_columns_of_edms_table(path, c_noise):
    """Karras et al. 2022, table 1. VP: c_skip = 1, c_out = −σ, c_in = 1/√(σ² + 1), c_noise = (M − 1)·σ⁻¹(σ) with M = 1000.

    VE: c_skip = 1, c_out = σ, c_in = 1, c_noise = ln(σ/2). Its network outputs −ε.
    """
    for sigma in SIGMAS[5:]:
        x0, x_in, told, t = asked_at(path, Epsilon(), sigma)
        assert_close(x0, X - sigma * F, 1e-10)
        assert_close(x_in, X / (sigma**2 + 1).sqrt() if c_noise == "vp" else X)
        assert_close(told, (999 * t if c_noise == "vp" else (sigma / 2).log()).expand(5))


@pytest.mark.parametrize("i", [1, 2, 10, 500, 999])
def test_the_posterior_of_ddpm(i):
    """Ho, Jain & Abbeel 2020, eq. 6–7, with their β̃_t and β_t as variances (section 3.2)."""
    path = DDPMLinear()
    p, q = points_of(path, torch.tensor([(i + 1) / 1000, i / 1000], dtype=torch.float64))
    beta, now, before = BETAS[i], ALPHA_BARS[i], ALPHA_BARS[i - 1]
    x0 = (X - (1 - now).sqrt() * F) / now.sqrt()
    mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * X
    # and eq. 11, the same in ε
    assert_close(mean, (X - beta / (1 - now).sqrt() * F) / (1 - beta).sqrt(), 1e-9)
    z = NOISE.normal("sampler", (1, 2, 2), torch.float64)
    denoiser = NetworkDenoiser(network=lambda *_: F, path=path, prediction=Epsilon())
    for name, variance in (("small", (1 - before) / (1 - now) * beta), ("large", beta)):
        sampler = DDPM(grid=Uniform(), variance=name, steps=1)
        got = sampler.integrate(denoiser, X, [p, q], Condition(), NOISE)
        assert_close(got, mean + variance.sqrt() * z, 1e-9)


@pytest.mark.parametrize("path", [DDPMLinear(), VPLinear(), Cosine()], ids=["ddpm_linear", "vp_linear", "cosine"])
def test_the_ancestral_variances_of_variational_diffusion_models(path):
    """Kingma et al. 2021, appendix A, on variance preserving paths in γ = −λ.

    σ²_{t|s} = −expm1(softplus γ(s) − softplus γ(t)); with c = −expm1(γ(s) − γ(t)) a sampling step is
    z_s = (α_s/α_t)·(z_t − σ_t·c·ε̂) + √((1 − α_s²)·c)·ε.
    """
    softplus = torch.nn.functional.softplus
    denoiser = NetworkDenoiser(network=lambda *_: F, path=path, prediction=Epsilon())
    z = NOISE.normal("sampler", (1, 2, 2), torch.float64)
    for begin, end in ((0.9, 0.8), (0.5, 0.499), (0.05, 0.002)):
        times = torch.tensor([begin, end], dtype=torch.float64)
        p, q = points_of(path, times)
        gamma_t, gamma_s = -path.log_snr(times)
        c = -torch.expm1(gamma_s - gamma_t)
        small, large = ancestral_variances(p, q)
        assert large == pytest.approx(float(-torch.expm1(softplus(gamma_s) - softplus(gamma_t))), rel=1e-9)
        assert small == pytest.approx(float(torch.sigmoid(gamma_s) * c), rel=1e-9)
        expected = q.alpha / p.alpha * (X - p.sigma * c * F) + (torch.sigmoid(gamma_s) * c).sqrt() * z
        got = DDPM(grid=Uniform(), steps=1).integrate(denoiser, X, [p, q], Condition(), NOISE)
        assert_close(got, expected, 1e-10)
