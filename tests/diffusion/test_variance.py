import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from denoiselab.diffusion.paths import Cosine, DDPMCosine, DDPMLinear, RectifiedFlow, VarianceExploding, ZeroTerminalSNR
from denoiselab.diffusion.variance import chain_step, decoder_nll, normal_kl, variational_bound

LEVELS = -1 + 2 * torch.arange(256, dtype=torch.float64) / 255
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BARS = (1 - BETAS).cumprod(0)
GRID = (torch.arange(1000, dtype=torch.float64) + 1) / 1000


def test_the_variances_are_ddpms_tables():
    step = chain_step(DDPMLinear(), GRID, 1000)
    assert step.first.tolist() == [True] + [False] * 999
    torch.testing.assert_close(step.log_large.exp(), BETAS, rtol=1e-9, atol=0)
    # Ho et al. 2020, eq. 7; the first one is taken from the second (Nichol & Dhariwal's code).
    small = BETAS[1:] * (1 - ALPHA_BARS[:-1]) / (1 - ALPHA_BARS[1:])
    torch.testing.assert_close(step.log_small.exp(), torch.cat([small[:1], small]), rtol=1e-9, atol=0)
    gain = ALPHA_BARS[:-1].sqrt() * BETAS[1:] / (1 - ALPHA_BARS[1:])  # of x0 in the posterior mean
    torch.testing.assert_close(step.gain[1:], gain, rtol=1e-9, atol=0)


def test_gradients_are_finite_up_to_pure_noise():
    """Far out the guess is many thousand grey levels off, where the decoder's likelihood has no gradient."""
    path = DDPMCosine(steps=4000)
    t = torch.linspace(path.t_max - 0.01, path.t_max, 32, dtype=torch.float64)
    t[:4] = 1 / 4000
    x0 = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    share = torch.full_like(x0, 0.3, requires_grad=True)
    guess = x0 + (path.sigma(t) / path.alpha(t)).float().reshape(-1, 1, 1, 1) * error
    bound = variational_bound(path, t, x0, guess, share, 4000)
    bound.sum().backward()
    assert bound.isfinite().all()
    assert share.grad.isfinite().all()


def test_the_variances_are_those_of_diffusers():
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, variance_type="learned_range")
    step = chain_step(DDPMLinear(), GRID, 1000)
    for i in (1, 10, 500, 999):
        for raw in (-1.0, 0.3, 1.0):
            share = (raw + 1) / 2
            want = scheduler._get_variance(i, torch.tensor(raw))  # a logarithm
            got = share * step.log_large[i] + (1 - share) * step.log_small[i]
            assert abs(got - want) < 5e-4  # its tables are float32, with 1 − ᾱ near the data from a difference


@pytest.mark.parametrize(
    "path",
    [Cosine(), RectifiedFlow(), VarianceExploding(), ZeroTerminalSNR(path=DDPMLinear())],
    ids=["cosine", "flow", "ve", "zero_snr"],
)
def test_the_step_is_the_gaussian_posterior_on_every_path(path):
    steps = 50
    grid = torch.linspace(path.t_min, path.t_max, steps, dtype=torch.float64)
    step = chain_step(path, grid, steps)
    assert step.first.tolist() == [True] + [False] * (steps - 1)
    t, s = grid[1:], grid[:-1]
    alpha, sigma, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    # Condition x_s on x_t and x0 by hand: x_s has prior N(α_s·x0, σ_s²), x_t = r·x_s + N(0, large), r = α_t/α_s.
    ratio, large = alpha / alpha_s, step.log_large[1:].exp()
    torch.testing.assert_close(large, sigma**2 - (ratio * sigma_s) ** 2, rtol=1e-9, atol=1e-12)
    precision = 1 / sigma_s**2 + ratio**2 / large
    torch.testing.assert_close(step.log_small[1:].exp(), 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.gain[1:], alpha_s / sigma_s**2 / precision, rtol=1e-9, atol=0)
    # Both variances are ordered, also in the first step, and between the points of the grid.
    between = chain_step(path, torch.linspace(path.t_min, path.t_max, 777, dtype=torch.float64), steps)
    assert all(value.isfinite().all() for value in between)
    assert (between.log_small[~between.first] <= between.log_large[~between.first]).all()


def test_the_divergence_of_normals():
    mean, mean_other = torch.randn(2, 100, dtype=torch.float64)
    log_variance, log_variance_other = torch.randn(2, 100, dtype=torch.float64)
    want = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(mean_other, (log_variance_other / 2).exp()))
    torch.testing.assert_close(normal_kl(mean - mean_other, log_variance, log_variance_other), want)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 10.0])
@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.123, 0.999, 3.0])
def test_the_grey_levels_have_probabilities_that_sum_to_one(std, mean):
    nll = decoder_nll(LEVELS, torch.tensor(mean).double(), torch.tensor(2 * math.log(std)).double())
    torch.testing.assert_close((-nll).exp().sum(), torch.tensor(1.0).double(), rtol=1e-12, atol=0)
    assert nll.isfinite().all()
    assert (nll >= 0).all()


def test_the_grey_levels_against_the_distribution_function():
    normal = Normal(torch.tensor(0.1).double(), torch.tensor(0.2).double())
    nll = decoder_nll(LEVELS, normal.mean, 2 * normal.stddev.log())
    inner = normal.cdf(LEVELS[1:-1] + 1 / 255) - normal.cdf(LEVELS[1:-1] - 1 / 255)
    torch.testing.assert_close((-nll[1:-1]).exp(), inner, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close((-nll[0]).exp(), normal.cdf(LEVELS[0] + 1 / 255), rtol=1e-9, atol=0)
    torch.testing.assert_close((-nll[-1]).exp(), 1 - normal.cdf(LEVELS[-1] - 1 / 255), rtol=1e-6, atol=0)


def test_the_grey_levels_in_float32_and_with_gradients():
    mean = torch.linspace(-1, 1, 256).requires_grad_()
    log_variance = torch.full((256,), -9.0).requires_grad_()
    pixels = torch.arange(256).float() / 127.5 - 1
    for x in (pixels, pixels.flip(0)):  # a good guess, and one that is off by hundreds of standard deviations
        nll = decoder_nll(x, mean, log_variance)
        exact = decoder_nll(x.double(), mean.double(), log_variance.double())
        torch.testing.assert_close(nll.double(), exact, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(nll.sum(), (mean, log_variance))
        assert all(g.isfinite().all() for g in gradients)


def test_the_bound_is_a_divergence_and_at_the_first_step_a_likelihood():
    path, steps = DDPMLinear(), 1000
    t = torch.tensor([0.001, 0.4], dtype=torch.float64)
    x0 = LEVELS[torch.randint(0, 256, (2, 3, 4, 4))]
    guess, share = x0 + 0.1 * torch.randn_like(x0), torch.rand_like(x0)
    got = variational_bound(path, t, x0, guess, share, steps) * math.log(2)
    step = chain_step(path, t, steps)
    log_variance = share * step.log_large.reshape(2, 1, 1, 1) + (1 - share) * step.log_small.reshape(2, 1, 1, 1)
    torch.testing.assert_close(got[0], decoder_nll(x0, guess, log_variance)[0].mean())
    beta, before, now = BETAS[399], ALPHA_BARS[398], ALPHA_BARS[399]
    x_t = now.sqrt() * x0[1] + (1 - now).sqrt() * torch.randn_like(x0[1])

    def mean(x):  # Ho et al. 2020, eq. 7
        return before.sqrt() * beta / (1 - now) * x + (1 - beta).sqrt() * (1 - before) / (1 - now) * x_t

    posterior = Normal(mean(x0[1]), (beta * (1 - before) / (1 - now)).sqrt())
    model = Normal(mean(guess[1]), (log_variance[1] / 2).exp())
    torch.testing.assert_close(got[1], kl_divergence(posterior, model).mean(), rtol=1e-7, atol=0)


def test_the_divergence_is_least_for_the_true_step():
    path, t = DDPMLinear(), torch.tensor([0.5], dtype=torch.float64)
    x0 = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    true = variational_bound(path, t, x0, x0, torch.zeros_like(x0), 1000)  # x0 known: the small variance is right
    assert true.abs() < 1e-12
    assert variational_bound(path, t, x0, x0, torch.full_like(x0, 0.5), 1000) > 0
    assert variational_bound(path, t, x0, x0 + 0.1, torch.zeros_like(x0), 1000) > 0
