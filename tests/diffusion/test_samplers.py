"""What every sampler of conf/sampler holds. The certificate on all paths is `make certify`; here are two of them."""

from functools import cache

import pytest
import torch
from exact import GAUSSIAN, MIXTURE, law_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from denoiselab.app.compose import config_folder
from denoiselab.condition import Condition
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow, Trigonometric, ZeroTerminalSNR
from denoiselab.diffusion.samplers import (
    CLEAN,
    DDIM,
    DDPM,
    Adams,
    DormandPrince,
    DPMSolverPP,
    Euler,
    Heun,
    HeunT,
    Midpoint,
    RungeKutta4,
    StochasticHeun,
    points_of,
)
from denoiselab.reports.certificate import certify_sampler

GRID = Uniform()
NAMES = sorted(file.stem for file in (config_folder() / "sampler").glob("*.yaml"))
CERTIFIED = {"cosine": Cosine(), "rectified_flow": RectifiedFlow()}
PURE_NOISE = {
    "rectified_flow": RectifiedFlow(),
    "trigonometric": Trigonometric(),
    "zero_terminal_snr": ZeroTerminalSNR(path=DDPMLinear()),
}

every_sampler = pytest.mark.parametrize("name", NAMES)


@cache
def shipped(name):
    """The sampler of a file of conf/sampler."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return instantiate(compose(f"sampler/{name}").sampler, _convert_="all")


def noise(n, seed=0):
    return NoiseSource(seed=seed, index=torch.arange(n))


class Counting:
    """The denoiser of the mixture, which remembers when it was asked."""

    consistent = True

    def __init__(self, path):
        self.path, self.asked = path, []

    def __call__(self, x, t, condition):
        self.asked += t.flatten().tolist()
        return MIXTURE.denoiser(self.path)(x, t, condition)

    def evaluations(self, t):
        return 1

    def fresh(self):
        return self


@pytest.mark.slow  # and every path in `make certify`
@every_sampler
@pytest.mark.parametrize("path", CERTIFIED)
def test_order_moments_and_cost(path, name):
    rows = certify_sampler(name, shipped(name), path, CERTIFIED[path])
    checks = {row.check for row in rows}
    assert {"moments", "nfe"} <= checks
    assert "order" in checks or shipped(name).stochastic or shipped(name).adaptive
    assert [row for row in rows if not row.inside] == []


@every_sampler
@pytest.mark.parametrize("path", PURE_NOISE)
def test_pure_noise_is_a_place_to_start_from(path, name):
    sampler, path = shipped(name), PURE_NOISE[path]
    points = sampler.points(path, 0) if sampler.adaptive else [*points_of(path, GRID(path, 100)), CLEAN]
    assert points[0].alpha == 0
    x = noise(8).normal("x", (1, 1, 2), torch.float64)
    end = sampler.integrate(MIXTURE.denoiser(path), x, points, Condition(), noise(8))
    assert end.isfinite().all()
    if not sampler.adaptive:
        mean, variance = law_of(sampler, GAUSSIAN.denoiser(path), points, 0.0, 1.0)
        assert (mean - GAUSSIAN.mean).abs().max() < 0.05
        assert (variance.sqrt() - GAUSSIAN.stds[0]).abs().max() < 0.05


@every_sampler
def test_a_pair_that_is_not_consistent_is_refused_but_where_it_does_no_harm(name):
    denoiser = Counting(RectifiedFlow())
    denoiser.consistent = False
    if name in ("ddim", "euler", "euler_ancestral"):
        shipped(name).plan(denoiser)
    else:
        with pytest.raises(ValueError, match="does not fit CFG++.*use sampler=ddim or sampler=euler"):
            shipped(name).plan(denoiser)


@every_sampler
def test_sample_i_does_not_depend_on_its_batch(name):
    sampler, path = shipped(name), Cosine()
    points = sampler.points(path, 6)
    x = noise(7).normal("x", (1, 1, 2), torch.float64)

    def result(rows):
        source = NoiseSource(seed=0, index=rows)
        return sampler.integrate(MIXTURE.denoiser(path), x[rows], points, Condition(), source)

    together = result(torch.arange(7))
    for rows in ([3], [6, 0]):
        torch.testing.assert_close(result(torch.tensor(rows)), together[rows], rtol=0, atol=1e-12)


@every_sampler
@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine()], ids=["rectified_flow", "cosine"])
def test_nfe_is_kept_and_no_further_step_fits(path, name):
    sampler = shipped(name)
    if sampler.adaptive:
        assert sampler.plan(Counting(path))[1] is None
        return

    def cost(points):
        denoiser = Counting(path)
        x = points[0].sigma * noise(1).normal("start", (1, 1, 2), torch.float64)
        assert sampler.integrate(denoiser, x, points, Condition(), noise(1)).isfinite().all()
        assert all(path.t_min <= t <= path.t_max for t in denoiser.asked)
        return len(denoiser.asked)

    points, nfe = sampler.plan(Counting(path))
    assert cost(points) == nfe <= sampler.nfe == 20
    assert cost(sampler.points(path, len(points))) > 20


@pytest.mark.parametrize(
    ("sampler", "path", "steps", "cost"),
    [
        (Euler(grid=GRID, nfe=20), RectifiedFlow(), 20, 20),
        (DPMSolverPP(grid=GRID, nfe=20), DDPMLinear(), 20, 20),
        (DPMSolverPP(grid=GRID, corrector=True, start="lower_order", nfe=20), DDPMLinear(), 20, 20),
        (Heun(grid=GRID, nfe=20), DDPMLinear(), 10, 19),  # two a step, one on the last
        (Heun(grid=GRID, nfe=20), RectifiedFlow(), 11, 20),  # one on the first as well
        (HeunT(grid=GRID, nfe=20), RectifiedFlow(), 10, 19),
        (RungeKutta4(grid=GRID, nfe=20), DDPMLinear(), 5, 17),
        (Adams(grid=GRID, variable="level", nfe=20), DDPMLinear(), 19, 20),  # Heun on the first
        (Adams(grid=GRID, variable="level", order=4, nfe=20), DDPMLinear(), 16, 20),  # two more on two steps
        (Heun(grid=GRID, nfe=1), Cosine(), 1, 1),
        (Euler(grid=GRID, nfe=5000), DDPMLinear(), 1000, 1000),  # as many as the grid can place
        (Euler(grid=GRID, steps=7), Cosine(), 7, 7),
    ],
)
def test_nfe_is_the_most_steps_that_fit(sampler, path, steps, cost):
    points, nfe = sampler.plan(Counting(path))
    assert (len(points) - 1, nfe) == (steps, cost)


@pytest.mark.parametrize("sampler", [DDIM(grid=GRID, steps=60), Heun(grid=GRID, steps=30), DDPM(grid=GRID, steps=60)])
def test_drawn_samples_have_the_moments_of_a_mixture(sampler):
    x0 = sampler.sample(MIXTURE.denoiser(RectifiedFlow()), (1, 1, 2), Condition(), noise(4000)).double().flatten(1)
    assert (x0.mean(0) - MIXTURE.mean).abs().max() < 0.08
    assert (x0.T.cov() - MIXTURE.covariance).abs().max() < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(grid=GRID), "nfe=None: give either nfe or steps"),
        (lambda: Euler(grid=GRID, nfe=3, steps=3), "nfe=3: give either nfe or steps"),
        (lambda: Euler(grid=GRID, nfe=0), "nfe=0: must be at least 1"),
        (lambda: Euler(grid=GRID, steps=0), "steps=0: must be at least 1"),
        (lambda: DDIM(grid=GRID, steps=3, eta=1.5), r"eta=1.5: must be in \[0, 1\]"),
        (lambda: DDPM(grid=GRID, steps=3, variance="medium"), "variance=medium: must be small, large or learned"),
        (lambda: Midpoint(grid=GRID, steps=3, middle="right"), "middle=right: must be arithmetic or geometric"),
        (lambda: StochasticHeun(grid=GRID, steps=3, s_churn=-1.0), "s_churn=-1.0: must be at least 0"),
        (lambda: StochasticHeun(grid=GRID, steps=3, s_min=-1.0), "s_min=-1.0: must be at least 0"),
        (lambda: StochasticHeun(grid=GRID, steps=3, s_max=0.01), "s_max=0.01: must be above s_min=0.05"),
        (lambda: StochasticHeun(grid=GRID, steps=3, s_noise=0.0), "s_noise=0.0: must be positive"),
        (lambda: Adams(grid=GRID, steps=3, variable="rho"), "variable=rho: must be level, log_level or time"),
        (lambda: Adams(grid=GRID, steps=3, variable="level", order=5), "order=5: must be from 1 to 4"),
        (lambda: DPMSolverPP(grid=GRID, steps=3, order=4), "order=4: must be from 1 to 3"),
        (lambda: DPMSolverPP(grid=GRID, steps=3, eta=-0.1), "eta=-0.1: must be at least 0"),
        (lambda: DPMSolverPP(grid=GRID, steps=3, start="cold"), "start=cold: must be lower_order or runge_kutta"),
        (lambda: DormandPrince(rtol=0.0), r"rtol=0.0: must be in \(0, 1\)"),
        (lambda: DormandPrince(atol=1.0), r"atol=1.0: must be in \(0, 1\)"),
        (lambda: DormandPrince(max_steps=0), "max_steps=0: must be at least 1"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
