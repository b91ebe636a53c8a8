"""Stochastic samplers: their steps are Gaussian, so mean and variance are compared with closed forms and not estimated."""

import math
from itertools import pairwise

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, Mixture, Scripted, law_of

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.grids import Karras, Uniform
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow, VarianceExploding, VPLinear
from denoiselab.diffusion.prediction import Epsilon
from denoiselab.diffusion.samplers import (
    CLEAN,
    DDIM,
    DDPM,
    Ask,
    DPMSolverPP,
    Heun,
    StochasticHeun,
    Visit,
    points_of,
)

GRID = Uniform()
PRESERVING = {"ddpm_linear": DDPMLinear(), "vp_linear": VPLinear(), "cosine": Cosine()}
PATHS = PRESERVING | {"rectified_flow": RectifiedFlow(), "variance_exploding": VarianceExploding()}
NOISE = NoiseSource(seed=0, index=torch.arange(6))
START = NOISE.normal("x", (1, 1, 2), torch.float64)
POINT = Mixture([1.0], [[0.7, -0.4]], [0.0])
ETAS = (0.3, 0.5, 1.0)

every_path = pytest.mark.parametrize("path", PATHS)


def points_on(path, n=12):
    return points_of(PATHS[path], Karras(sigma_min=0.01, sigma_max=60.0)(PATHS[path], n))


def assert_close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def result(sampler, path, points, x=START):
    return sampler.integrate(MIXTURE.denoiser(PATHS[path]), x, points, Condition(), NOISE)


def conditional(p, q):
    """Of x_q given x_p and x0: gain of x_p − α_p·x0, and variance; and the variance of x_p given x_q.

    By Gaussian conditioning: on the way to x_p noise is added to x_q, x_p = (α_p/α_q)·x_q + n, so that Var x_p = σ_p².
    """
    ratio = p.alpha / q.alpha
    covariance = ratio * q.sigma**2
    gain = covariance / p.sigma**2
    return gain, q.sigma**2 - gain * covariance, p.sigma**2 - ratio**2 * q.sigma**2


@every_path
@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_step_of_ddpm_is_the_gaussian_posterior(variance, path):
    for p, q in pairwise(points_on(path)):
        x0 = MIXTURE.denoiser(PATHS[path])(START, torch.tensor(p.t, dtype=torch.float64), Condition()).x0
        gain, small, large = conditional(p, q)
        z = NOISE.at(0).normal("sampler", (1, 1, 2), torch.float64)
        expected = q.alpha * x0 + gain * (START - p.alpha * x0) + math.sqrt(small if variance == "small" else large) * z
        assert_close(result(DDPM(grid=GRID, variance=variance, steps=1), path, [p, q]), expected, 1e-10)


@pytest.mark.parametrize("eta", ETAS)
@every_path
def test_eta_of_ddim_enters_the_variance_as_its_square(path, eta):
    """Song, Meng & Ermon 2021, eq. 16; elsewhere (1 − ᾱ_q)/(1 − ᾱ_p) is σ_q²/σ_p², and ᾱ_p/ᾱ_q the ratio of SNRs."""
    for p, q in pairwise(points_on(path)):
        variance = eta**2 * (q.sigma / p.sigma) ** 2 * (p.sigma**2 - (p.alpha / q.alpha * q.sigma) ** 2)
        if path in PRESERVING:
            published = eta**2 * (1 - q.alpha**2) / (1 - p.alpha**2) * (1 - p.alpha**2 / q.alpha**2)
            assert variance == pytest.approx(published, rel=1e-6)  # 1 − ᾱ has lost digits near the data
        got = law_of(DDIM(grid=GRID, eta=eta, steps=1), GAUSSIAN.denoiser(PATHS[path]), [p, q], 0.0, 0.0)[1]
        assert_close(got, variance)


@pytest.mark.parametrize("eta", [0.0, *ETAS])
@every_path
def test_the_law_of_ddims_samples_follows_from_its_recursion(path, eta):
    """On Gaussian data x0 and ε are affine in x, and so mean and variance go from step to step."""
    points = points_on(path)
    mean, variance = GAUSSIAN.mean, float(GAUSSIAN.stds[0] ** 2)
    m, v = points[0].alpha * mean, points[0].alpha ** 2 * variance + points[0].sigma ** 2
    got = law_of(DDIM(grid=GRID, eta=eta, steps=1), GAUSSIAN.denoiser(PATHS[path]), points, m, v)
    for p, q in pairwise(points):
        noise = eta**2 * conditional(p, q)[1]
        # x0 = mean + (α·variance/total)·(x − α·mean) and ε = (σ/total)·(x − α·mean).
        total = p.alpha**2 * variance + p.sigma**2
        gain = (q.alpha * p.alpha * variance + math.sqrt(q.sigma**2 - noise) * p.sigma) / total
        m, v = q.alpha * mean + gain * (m - p.alpha * mean), gain**2 * v + noise
    assert_close(got[0], m, 1e-10)
    assert_close(got[1], v, 1e-10)


@every_path
def test_ancestral_sampling_has_three_names(path):
    points = [*points_on(path), CLEAN]
    if path == "rectified_flow":  # from pure noise, too
        points = [*points_of(PATHS[path], GRID(PATHS[path], 12)), CLEAN]
    x = points[0].sigma * START
    first = result(DDPM(grid=GRID, steps=1), path, points, x)
    for other in (DDIM(grid=GRID, eta=1.0, steps=1), DPMSolverPP(grid=GRID, order=1, eta=1.0, steps=1)):
        assert_close(result(other, path, points, x), first, 1e-10)


@pytest.mark.parametrize("eta", [*ETAS, 2.5])
@every_path
def test_eta_of_the_sde_enters_the_variance_as_it_is(path, eta):
    """With h the step in half log-SNR, e^{−2ηh} of σ_q² is kept from x_p (Xue et al. 2023, with τ² = η)."""
    for p, q in pairwise(points_on(path)):
        variance = q.sigma**2 * (1 - (q.level / p.level) ** (2 * eta))
        got = law_of(DPMSolverPP(grid=GRID, eta=eta, steps=1), POINT.denoiser(PATHS[path]), [p, q], 0.0, 0.0)[1]
        assert_close(got, variance)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("order", "corrector", "degree"), [(1, False, 0), (3, False, 2), (2, True, 2), (3, True, 3)])
@every_path
def test_the_drift_of_the_sde_is_exact_for_polynomials(path, order, corrector, degree, eta):
    coefficients = (0.3, -0.6, 0.4, 0.2)[: degree + 1]
    denoiser = Scripted(PATHS[path], "x0", lambda s: sum(c * s**k for k, c in enumerate(coefficients)))
    levels = torch.tensor([2.9, 2.4, 2.1, 1.6, 1.3, 0.7], dtype=torch.float64)
    points = points_of(PATHS[path], PATHS[path].t_of_log_snr(-2 * levels.log()))
    before = [Visit(p, denoiser(START, torch.tensor(p.t, dtype=torch.float64), Condition())) for p in points[:3]]

    class Silence(NoiseSource):
        def normal(self, purpose, shape, dtype=torch.float32):
            return torch.zeros(6, *shape, dtype=dtype)

    sampler = DPMSolverPP(grid=GRID, order=order, eta=eta, corrector=corrector, steps=1)
    silence = Silence(seed=0, index=NOISE.index)
    end = sampler.integrate(denoiser, START, points[3:], Condition(), silence, before)
    assert_close(end, denoiser.solution(START, points[3], points[-1], eta))


@pytest.mark.parametrize(
    "sampler",
    [
        *(DDIM(grid=GRID, eta=eta, steps=1) for eta in ETAS),
        DDPM(grid=GRID, steps=1),
        *(DPMSolverPP(grid=GRID, order=order, eta=eta, steps=1) for order in (1, 2, 3) for eta in (0.5, 1.0, 2.0)),
        *(DPMSolverPP(grid=GRID, order=order, eta=1.0, corrector=True, steps=1) for order in (1, 2, 3)),
        StochasticHeun(grid=GRID, steps=1),
    ],
)
@every_path
def test_data_at_a_point_has_the_right_law_whatever_the_steps(path, sampler):
    points = points_on(path, 5)
    first, last = points[0], points[-1]
    mean, variance = law_of(sampler, POINT.denoiser(PATHS[path]), points, first.alpha * POINT.mean, first.sigma**2)
    assert_close(mean, last.alpha * POINT.mean, 1e-10)
    assert_close(variance, last.sigma**2, 1e-10)


@pytest.mark.parametrize("path", PRESERVING)
def test_the_large_variance_is_right_for_standard_normal_data(path):
    data = Mixture([1.0], [[0.0, 0.0]], [1.0])
    sampler = DDPM(grid=GRID, variance="large", steps=1)
    mean, variance = law_of(sampler, data.denoiser(PATHS[path]), points_on(path, 5), 0.0, 1.0)
    assert_close(mean, 0.0)
    assert_close(variance, 1.0)


def learned(path, raw):
    """A network with a learned variance: half of its output is the share, from −1 to 1."""

    def network(x, c_noise, condition):
        return torch.cat((x.sin(), torch.full_like(x, raw)), dim=1)

    return NetworkDenoiser(network=network, path=path, prediction=Epsilon(), learned_variance=True)


@pytest.mark.parametrize("path", ["cosine", "variance_exploding"])
def test_the_learned_variance_lies_between_the_two(path):
    """Nichol & Dhariwal 2021, eq. 15."""
    points = points_on(path)

    def drawn(variance, raw):
        sampler = DDPM(grid=GRID, variance=variance, steps=1)
        return sampler.integrate(learned(PATHS[path], raw), START, points[:2], Condition(), NOISE)

    small, large = drawn("small", 0.0), drawn("large", 0.0)
    assert_close(drawn("learned", -1.0), small, 1e-14)
    assert_close(drawn("learned", 1.0), large, 1e-14)
    _, variance, beta = conditional(*points[:2])
    z = NOISE.normal("sampler", (1, 1, 2), torch.float64)
    mean = small - math.sqrt(variance) * z
    assert_close(drawn("learned", -0.5), mean + variance ** (3 / 8) * beta ** (1 / 8) * z)


def test_a_variance_that_was_not_learned_is_refused_before_the_first_step():
    sampler = DDPM(grid=GRID, variance="learned", steps=3)
    plain = NetworkDenoiser(network=lambda x, t, c: x, path=Cosine(), prediction=Epsilon())
    with pytest.raises(ValueError, match="variance=learned: the network has no learned variance"):
        sampler.plan(plain)
    with pytest.raises(ValueError, match="variance=learned: the network has no learned variance"):
        result(sampler, "cosine", points_on("cosine"))  # one that does not tell
    assert len(sampler.plan(learned(Cosine(), 0.0))[0]) == 4


@every_path
def test_churn_keeps_the_marginal(path):
    """x_t of Gaussian data is N(α·mean, α²·variance + σ²); so it is again at the raised noise level."""
    path = PATHS[path]
    sampler = StochasticHeun(grid=GRID, steps=1, s_churn=4.0, s_min=0.1, s_max=1e4)
    ask = Ask(GAUSSIAN.denoiser(path), Condition(), steps=12)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    levels = torch.tensor([79.0, 10.0, 0.5, 0.11], dtype=torch.float64)
    for p in points_of(path, path.t_of_log_snr(-2 * levels.log())):
        moved, up = sampler.perturb(x, p, ask, lambda: torch.zeros_like(x))
        noise = sampler.perturb(x, p, ask, lambda: torch.ones_like(x))[0][0] - moved[0]
        assert up.level == pytest.approx(min(p.level * 4 / 3, points_of(path, _end(path))[0].level), rel=1e-9)
        assert moved[0] == 0  # a mean of 0 stays, and another one follows α
        gain, std = moved[1], GAUSSIAN.stds[0]
        assert_close(gain * p.alpha, up.alpha, 1e-9)
        variance = gain**2 * (p.alpha**2 * std**2 + p.sigma**2) + noise**2
        assert_close(variance, up.alpha**2 * std**2 + up.sigma**2, 1e-9)


def _end(path):
    return torch.tensor([path.t_max], dtype=torch.float64)


def test_churn_is_bounded_and_kept_to_its_interval():
    path = VarianceExploding()
    points = points_of(path, torch.tensor([50.1, 50.0, 1.0, 0.05, 0.04], dtype=torch.float64))

    def raised(steps, **options):
        sampler = StochasticHeun(grid=GRID, steps=1, **options)
        ask = Ask(MIXTURE.denoiser(path), Condition(), steps)
        return [sampler.perturb(START, p, ask, lambda: START)[1].level / p.level for p in points]

    assert raised(100, s_churn=40.0) == pytest.approx([1, 1.4, 1.4, 1.4, 1])
    assert raised(50, s_churn=40.0) == pytest.approx([1, *[2**0.5] * 3, 1])  # at most √2
    assert raised(100, s_churn=10.0, s_max=None, s_min=0.0) == pytest.approx([1.1] * 5)
    assert raised(100, s_churn=0.0) == [1] * 5
    pure = points_of(RectifiedFlow(), torch.ones(1, dtype=torch.float64))[0]
    ask = Ask(MIXTURE.denoiser(RectifiedFlow()), Condition(), 10)
    assert StochasticHeun(grid=GRID, steps=1, s_max=None).perturb(START, pure, ask, lambda: START) == (START, pure)


@pytest.mark.parametrize("n", [5, 18])
def test_the_stochastic_sampler_of_edm_is_its_algorithm_2(n):
    path, denoiser = PATHS["variance_exploding"], MIXTURE.denoiser(VarianceExploding())
    options = {"s_churn": 6.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.007}
    points = [*points_on("variance_exploding", n), CLEAN]
    got = result(StochasticHeun(grid=GRID, steps=1, **options), "variance_exploding", points, 60 * START)

    def slope(x, t):
        return (x - denoiser(x, torch.tensor(t, dtype=torch.float64), Condition()).x0) / t

    x = 60 * START
    for i, (t, end) in enumerate(pairwise([p.sigma for p in points])):
        gamma = min(6.0 / n, math.sqrt(2) - 1) if 0.05 <= t <= 50.0 else 0.0
        raised = t + gamma * t
        x = x + math.sqrt(raised**2 - t**2) * 1.007 * NOISE.at(i).normal("sampler", (1, 1, 2), torch.float64)
        d = slope(x, raised)
        ahead = x + (end - raised) * d
        x = ahead if end == 0 else x + (end - raised) * (d + slope(ahead, end)) / 2
    assert_close(got, x)
    without = result(StochasticHeun(grid=GRID, steps=1, s_churn=0.0), "variance_exploding", points)
    assert torch.equal(without, result(Heun(grid=GRID, steps=1), "variance_exploding", points))
    assert path.t_max == 80
