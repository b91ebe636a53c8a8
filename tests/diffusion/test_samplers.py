import math
from functools import cache

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, PATHS, PREDICTIONS

from denoiselab.condition import Condition
from denoiselab.diffusion.grids import Karras, LogSNR, Uniform
from denoiselab.diffusion.guidance import ClassifierFree
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow
from denoiselab.diffusion.samplers import (
    CLEAN,
    DDIM,
    DDPM,
    DPMSolverPP2M,
    Euler,
    EulerT,
    Heun,
    HeunT,
    points_of,
)

GRID = Uniform()


def noise(n, seed=0):
    return NoiseSource(seed=seed, index=torch.arange(n))


@cache
def solve(path, sampler, n):
    """The ODE of the mixture between two interior times, from the same 64 points each time."""
    denoiser = MIXTURE.network_denoiser(PATHS[path], PREDICTIONS["v"])
    x = noise(64).normal("x", (1, 1, 2), torch.float64)
    points = points_of(PATHS[path], torch.linspace(0.8, 0.3, n + 1, dtype=torch.float64))
    return sampler.integrate(denoiser, x, points, Condition(), noise(64))


EXACT = HeunT(grid=GRID, steps=1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDIM(grid=GRID, steps=1), 1),
        (Euler(grid=GRID, steps=1), 1),
        (EulerT(grid=GRID, steps=1), 1),
        (Heun(grid=GRID, steps=1), 2),
        (HeunT(grid=GRID, steps=1), 2),
        (DPMSolverPP2M(grid=GRID, steps=1), 2),
    ],
    ids=["ddim", "euler", "euler_t", "heun", "heun_t", "dpmpp_2m"],
)
def test_order_of_convergence_on_a_mixture(path, sampler, order):
    exact = solve(path, EXACT, 4000)
    errors = [(solve(path, sampler, n) - exact).square().mean().sqrt() for n in (80, 160, 320)]
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(slope - order) < 0.15 for slope in slopes), slopes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(grid=GRID, steps=200),
        DDIM(grid=GRID, eta=1.0, steps=400),
        DDPM(grid=GRID, steps=400),
        DDPM(grid=GRID, variance="large", steps=400),
        Euler(grid=GRID, steps=200),
        EulerT(grid=GRID, steps=400),
        Heun(grid=GRID, steps=80),
        HeunT(grid=GRID, steps=200),
        DPMSolverPP2M(grid=GRID, steps=80),
    ],
    ids=["ddim", "ddim_1", "ddpm", "ddpm_large", "euler", "euler_t", "heun", "heun_t", "dpmpp_2m"],
)
def test_samples_of_a_gaussian_have_its_mean_and_covariance(path, prediction, sampler):
    """Every sampler here is affine in x and noise, so the law of its result is computed, not estimated.

    The sampler is run on the zero vector and on unit vectors (start) with each noise silenced or isolated in turn by
    linearity: result = A·x_T + c + Σ_k B_k·z_k. One coordinate is enough, the Gaussian is isotropic.
    """
    path, prediction = PATHS[path], PREDICTIONS[prediction]
    denoiser = GAUSSIAN.network_denoiser(path, prediction)
    points = sampler.points(path, sampler.steps)
    # Enough independent z streams in one batch: row 0 is silent, row 1 starts at 1, row 2 + k hears noise at step k.
    stochastic = isinstance(sampler, DDPM) or getattr(sampler, "eta", 0) > 0
    rows = 2 + (len(points) if stochastic else 0)

    class Impulse(NoiseSource):
        def normal(self, purpose, shape, dtype=torch.float64):
            z = torch.zeros(rows, *shape, dtype=torch.float64)
            if stochastic:
                z[2 + self.step] = 1
            return z

    x = torch.zeros(rows, 1, 1, 2, dtype=torch.float64)
    x[1] = 1
    result = sampler.integrate(denoiser, x, points, Condition(), Impulse(seed=0, index=torch.arange(rows))).flatten(1)
    c, gains = result[0], result[1:] - result[0]
    start = points[0]
    mean = c + gains[0] * start.alpha * GAUSSIAN.means[0]
    first_variance = start.alpha**2 * 0.25 + start.sigma**2
    variance = gains[0] ** 2 * first_variance + gains[1:].square().sum(0)
    # First-order steps on a coarse grid: a per cent or so; large variances are biased by one step's noise.
    torch.testing.assert_close(mean, GAUSSIAN.means[0], rtol=0, atol=0.02)
    torch.testing.assert_close(variance.sqrt(), torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("sampler", [DDIM(grid=GRID, steps=60), Heun(grid=GRID, steps=30), DDPM(grid=GRID, steps=60)])
def test_drawn_samples_have_the_moments_of_a_mixture(sampler):
    path = RectifiedFlow()
    n = 4000
    x0 = sampler.sample(MIXTURE.denoiser(path), (1, 1, 2), Condition(), noise(n)).double().flatten(1)
    mean = (MIXTURE.weights[:, None] * MIXTURE.means).sum(0)
    centred = MIXTURE.means - mean
    covariance = (MIXTURE.weights[:, None, None] * centred[:, :, None] * centred[:, None, :]).sum(0)
    covariance += (MIXTURE.weights * MIXTURE.stds**2).sum() * torch.eye(2)
    assert (x0.mean(0) - mean).abs().max() < 0.08
    assert (x0.T.cov() - covariance).abs().max() < 0.1


def test_euler_is_ddim_everywhere_and_euler_t_on_rectified_flow():
    x = torch.randn(8, 1, 1, 2, dtype=torch.float64)
    for name, path in {**PATHS, "flow_to_1": RectifiedFlow()}.items():
        denoiser = MIXTURE.denoiser(path)
        solvers = [Euler(grid=GRID, steps=9), DDIM(grid=GRID, steps=9)]
        if "flow" in name:
            solvers.append(EulerT(grid=GRID, steps=9))
        results = [s.integrate(denoiser, x, s.points(path, 9), Condition(), noise(8)) for s in solvers]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "sampler", [Heun(grid=GRID, steps=7), DPMSolverPP2M(grid=GRID, steps=7), DDPM(grid=GRID, steps=7)]
)
def test_a_start_in_pure_noise_and_a_clean_end_stay_finite(sampler):
    path = RectifiedFlow()
    points = sampler.points(path, 7)
    assert points[0].alpha == 0
    assert points[-1] == CLEAN
    x = torch.randn(8, 1, 1, 2, dtype=torch.float64)
    assert sampler.integrate(MIXTURE.denoiser(path), x, points, Condition(), noise(8)).isfinite().all()


@pytest.mark.parametrize("grid", [Uniform(), LogSNR(), Karras()])
@pytest.mark.parametrize("path", PATHS)
def test_grids_fall_from_t_max_and_stay_on_the_path(grid, path):
    path = PATHS[path]
    for n in (1, 2, 10, 100):
        t = grid(path, n)
        assert t.shape == (n,)
        assert math.isclose(t[0], path.t_max, rel_tol=1e-12)
        assert t[0] <= path.t_max
        assert (t.diff() < 0).all()
        assert t[-1] >= path.t_min


def test_grid_spacings():
    path = DDPMLinear()
    log_snr = path.log_snr(LogSNR()(path, 12))
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(11), rtol=1e-9, atol=0)
    sigma = (-path.log_snr(Karras(rho=7.0)(path, 12)) / 2).exp()
    i = torch.arange(12).double() / 11
    karras = (sigma[0] ** (1 / 7) + i * (sigma[-1] ** (1 / 7) - sigma[0] ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma, karras, rtol=1e-9, atol=0)


@pytest.mark.parametrize("grid", [LogSNR, Karras])
def test_noise_levels_are_clamped_to_the_path(grid):
    for path in (RectifiedFlow(), Cosine(), DDPMLinear()):
        t = grid(sigma_min=0.02, sigma_max=80.0)(path, 9)
        levels = path.sigma(t) / path.alpha(t)
        torch.testing.assert_close(levels[[0, -1]], torch.tensor([80.0, 0.02], dtype=torch.float64), rtol=1e-9, atol=0)
    wide = grid(sigma_min=1e-9, sigma_max=1e9)(Cosine(), 9)
    torch.testing.assert_close(wide[[0, -1]], torch.tensor([0.999, 0.001], dtype=torch.float64), rtol=1e-9, atol=0)


def test_grids_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"steps=1001: at most 1000 uniform steps fit above t_min=0.001"):
        Uniform()(DDPMLinear(), 1001)
    for grid in (LogSNR(), Karras()):
        with pytest.raises(ValueError, match=r"needs a largest noise level .*set sampler.grid.sigma_max=80"):
            grid(RectifiedFlow(), 10)


@pytest.mark.parametrize(
    ("sampler", "path", "steps", "cost"),
    [
        (Euler(grid=GRID, nfe=20), RectifiedFlow(), 20, 20),
        (DPMSolverPP2M(grid=GRID, nfe=20), DDPMLinear(), 20, 20),
        (Heun(grid=GRID, nfe=20), DDPMLinear(), 10, 19),  # two a step, one on the last
        (Heun(grid=GRID, nfe=20), RectifiedFlow(), 11, 20),  # one on the first as well
        (HeunT(grid=GRID, nfe=20), RectifiedFlow(), 10, 19),
        (Heun(grid=GRID, nfe=1), Cosine(), 1, 1),
        (Euler(grid=GRID, nfe=5000), DDPMLinear(), 1000, 1000),  # as many as the grid can place
        (Euler(grid=GRID, steps=7), Cosine(), 7, 7),
    ],
)
def test_nfe_is_the_most_steps_that_fit(sampler, path, steps, cost):
    asked = []

    class Counting:
        def __init__(self):
            self.path = path

        def __call__(self, x, t, condition):
            asked.append(float(t))
            return MIXTURE.denoiser(path)(x, t, condition)

        def evaluations(self, t):
            return 1

    points, nfe = sampler.plan(Counting())
    assert (len(points) - 1, nfe) == (steps, cost)
    if steps <= 20:
        asked.clear()
        sampler.sample(Counting(), (1, 1, 2), Condition(), noise(2))
        assert len(asked) == cost
        assert all(path.t_min <= t <= path.t_max for t in asked)


def test_guidance_counts_twice_inside_its_interval():
    path = RectifiedFlow()
    sampler = Euler(grid=GRID, nfe=20)
    plain = MIXTURE.denoiser(path)
    assert sampler.plan(ClassifierFree(plain, scale=1.0))[1] == 20
    points, nfe = sampler.plan(ClassifierFree(plain, scale=2.0))
    assert (len(points) - 1, nfe) == (10, 20)
    points, nfe = sampler.plan(ClassifierFree(plain, scale=2.0, sigma_min=0.3, sigma_max=1.0))
    inside = sum(0.3 <= p.sigma / p.alpha <= 1.0 for p in points[1:-1])
    assert nfe == len(points) - 1 + inside <= 20
    assert 0 < inside < len(points) - 2
    with pytest.raises(ValueError, match="nfe=1: one step of this sampler already costs more"):
        Euler(grid=GRID, nfe=1).plan(ClassifierFree(plain, scale=2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(grid=GRID), "nfe=None: give either nfe or steps"),
        (lambda: Euler(grid=GRID, nfe=3, steps=3), "nfe=3: give either nfe or steps"),
        (lambda: Euler(grid=GRID, nfe=0), "nfe=0: must be at least 1"),
        (lambda: Euler(grid=GRID, steps=0), "steps=0: must be at least 1"),
        (lambda: DDIM(grid=GRID, steps=3, eta=1.5), r"eta=1.5: must be in \[0, 1\]"),
        (lambda: DDPM(grid=GRID, steps=3, variance="medium"), "variance=medium: must be small or large"),
        (lambda: Karras(sigma_min=-1.0), "sigma_min=-1.0: must be positive"),
        (lambda: LogSNR(sigma_min=3.0, sigma_max=2.0), "sigma_min=3.0: must be below sigma_max=2.0"),
        (lambda: Karras(rho=0.5), "rho=0.5: must be at least 1"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", [Heun(grid=GRID, steps=4), DDPM(grid=GRID, steps=6)])
def test_sample_i_does_not_depend_on_its_batch(sampler):
    path = RectifiedFlow()
    denoiser = MIXTURE.denoiser(path)
    together = sampler.sample(denoiser, (1, 1, 2), Condition(), noise(12))
    alone = [
        sampler.sample(denoiser, (1, 1, 2), Condition(), NoiseSource(seed=0, index=torch.tensor([i])))
        for i in range(12)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-6)
