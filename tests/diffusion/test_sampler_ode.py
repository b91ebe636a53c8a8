"""Samplers of the ODE: the same one on every path, and exact where what is integrated is a polynomial."""

import math

import numpy as np
import pytest
import torch
from exact import MIXTURE, Scripted, network_denoiser
from numpy.polynomial import Polynomial
from scipy.integrate import quad

from denoiselab.condition import Condition
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow, VarianceExploding
from denoiselab.diffusion.prediction import X0, Epsilon, Velocity
from denoiselab.diffusion.samplers import (
    CLEAN,
    DDIM,
    Adams,
    DPMSolverPP,
    DPMSolverPP2S,
    Euler,
    EulerT,
    Heun,
    HeunT,
    Midpoint,
    RungeKutta4,
    Visit,
    points_of,
)
from denoiselab.diffusion.samplers.multistep import weights

GRID = Uniform()
FLOW, DDPM_PATH, COSINE, EXPLODING = RectifiedFlow(), DDPMLinear(), Cosine(), VarianceExploding()
NOISE = NoiseSource(seed=0, index=torch.arange(8))
START = NOISE.normal("x", (1, 1, 2), torch.float64)
LEVELS = torch.logspace(math.log10(60), math.log10(0.02), 13, dtype=torch.float64)


def at_levels(path, levels=LEVELS):
    """The points with these σ/α."""
    return points_of(path, path.t_of_log_snr(-2 * levels.log()))


class Recorder:
    """A denoiser that keeps what it was asked and what it said."""

    def __init__(self, denoiser):
        self.denoiser, self.path, self.consistent = denoiser, denoiser.path, True
        self.xs, self.answers = [], []

    def __call__(self, x, t, condition):
        said = self.denoiser(x, t, condition)
        self.xs.append(x / self.path.alpha(t))
        self.answers.append(said)
        return said

    def fresh(self):
        return self


def trajectory(sampler, denoiser):
    """x/α wherever the denoiser is asked, and at the end, from the same x/α and at the same σ/α on every path."""
    recorder, points = Recorder(denoiser), [*at_levels(denoiser.path), CLEAN]
    x = points[0].alpha * LEVELS[0] * START
    end = sampler.integrate(recorder, x, points, Condition(), NOISE)
    return torch.stack([*recorder.xs, end])


def test_the_ddim_class_follows_one_trajectory_on_every_path_with_every_prediction():
    """Variance exploding, x0 and Euler; variance preserving, ε and DDIM; rectified flow, velocity and Euler."""
    euler = Euler(grid=GRID, steps=1)
    one = trajectory(euler, network_denoiser(MIXTURE, EXPLODING, X0()))
    two = trajectory(DDIM(grid=GRID, steps=1), network_denoiser(MIXTURE, DDPM_PATH, Epsilon()))
    three = trajectory(euler, network_denoiser(MIXTURE, FLOW, Velocity()))
    assert one.shape == (14, 8, 1, 1, 2)
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(three, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [
        Heun(grid=GRID, steps=1),
        Midpoint(grid=GRID, steps=1),
        Midpoint(grid=GRID, middle="geometric", steps=1),
        RungeKutta4(grid=GRID, steps=1),
        DPMSolverPP2S(grid=GRID, steps=1),
        Adams(grid=GRID, variable="level", order=4, steps=1),
        Adams(grid=GRID, variable="log_level", order=3, steps=1),
        DPMSolverPP(grid=GRID, order=3, steps=1),
        DPMSolverPP(grid=GRID, order=3, corrector=True, steps=1),
    ],
    ids=["heun", "midpoint", "dpm_2", "rk4", "2s", "lms", "deis", "3m", "unipc"],
)
def test_so_does_every_solver_in_noise_levels(sampler):
    one, *others = (trajectory(sampler, MIXTURE.denoiser(path)) for path in (EXPLODING, DDPM_PATH, COSINE, FLOW))
    for other in others:
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def ends(samplers, path):
    return [trajectory(sampler, MIXTURE.denoiser(path))[-1] for sampler in samplers]


@pytest.mark.parametrize("path", [FLOW, DDPM_PATH, COSINE, EXPLODING], ids=lambda path: type(path).__name__)
def test_solvers_of_first_order_are_one_step(path):
    samplers = [Euler(grid=GRID, steps=1), DDIM(grid=GRID, steps=1), DPMSolverPP(grid=GRID, order=1, steps=1)]
    samplers += [Adams(grid=GRID, variable=v, order=1, steps=1) for v in ("level", "log_level", "time")]
    if path in (FLOW, EXPLODING):  # where x moves on straight lines in t when x0 and ε do
        samplers.append(EulerT(grid=GRID, steps=1))
    first, *others = ends(samplers, path)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-11, atol=1e-11)


def test_where_time_is_the_noise_level_it_does_not_matter_which_one_heun_has():
    one, other = ends([Heun(grid=GRID, steps=1), HeunT(grid=GRID, steps=1)], EXPLODING)
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ((0, -1), (3 / 2, -1 / 2)),
        ((0, -1, -2), (23 / 12, -16 / 12, 5 / 12)),
        ((0, -1, -2, -3), (55 / 24, -59 / 24, 37 / 24, -9 / 24)),
        ((0, 1), (1 / 2, 1 / 2)),  # implicit: Adams-Moulton
        ((0, -1, 1), (8 / 12, -1 / 12, 5 / 12)),
    ],
)
def test_weights_of_equal_steps_are_those_of_adams(nodes, expected):
    """Hairer, Nørsett & Wanner 1993, section III.1."""
    for scale in (1.0, -0.01):
        got = weights(tuple(scale * node for node in nodes), 0.0, scale, 0.0)
        np.testing.assert_allclose(got, scale * np.array(expected), rtol=1e-13)


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("h", [1e-3, 0.7, 10.0])
@pytest.mark.parametrize("nodes", [(0.0,), (0.0, -0.6), (0.0, -0.6, -1.9), (0.0, -0.6, -1.9, 1.0)])
def test_weights_are_the_integrals(nodes, h, rate):
    """10 in half log-SNR is the whole way from a noise level of 80 to one of 0.004."""
    start = -1.3
    nodes, end = tuple(start + h * node for node in nodes), start + h
    for node, got in zip(nodes, weights(nodes, start, end, rate), strict=True):

        def integrand(s, node=node):
            return math.exp(rate * (s - end)) * math.prod((s - o) / (node - o) for o in nodes if o != node)

        assert got == pytest.approx(quad(integrand, start, end, epsabs=0, epsrel=1e-13)[0], rel=1e-11)


@pytest.mark.parametrize(
    ("what", "degree", "sampler"),
    [
        ("level", 1, Heun(grid=GRID, steps=1)),
        ("level", 1, Midpoint(grid=GRID, steps=1)),
        ("level", 3, RungeKutta4(grid=GRID, steps=1)),
        ("level", 1, Adams(grid=GRID, variable="level", order=2, steps=1)),
        ("level", 2, Adams(grid=GRID, variable="level", order=3, steps=1)),
        ("level", 3, Adams(grid=GRID, variable="level", order=4, steps=1)),
        ("log_level", 1, Adams(grid=GRID, variable="log_level", order=2, steps=1)),
        ("log_level", 2, Adams(grid=GRID, variable="log_level", order=3, steps=1)),
        ("log_level", 3, Adams(grid=GRID, variable="log_level", order=4, steps=1)),
        ("x0", 2, DPMSolverPP(grid=GRID, order=3, steps=1)),
        ("x0", 2, DPMSolverPP(grid=GRID, order=2, corrector=True, steps=1)),
        ("x0", 3, DPMSolverPP(grid=GRID, order=3, corrector=True, steps=1)),
    ],
)
@pytest.mark.parametrize("path", [COSINE, FLOW], ids=["cosine", "rectified_flow"])
def test_polynomials_are_integrated_exactly_over_unequal_steps(path, what, degree, sampler):
    denoiser = Scripted(path, what, Polynomial([0.3, -1.1, 0.8, 0.5][: degree + 1]))
    points = at_levels(path, torch.tensor([2.9, 2.4, 2.1, 1.6, 1.3, 0.7], dtype=torch.float64))
    before = [Visit(p, denoiser(START, torch.tensor(p.t, dtype=torch.float64), Condition())) for p in points[:3]]
    end = sampler.integrate(denoiser, START, points[3:], Condition(), NOISE, before)
    torch.testing.assert_close(end, denoiser.solution(START, points[3], points[-1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sampler",
    [
        Adams(grid=GRID, variable="level", order=4, start="lower_order", steps=1),
        Adams(grid=GRID, variable="time", order=4, start="lower_order", steps=1),
        DPMSolverPP(grid=GRID, order=3, start="lower_order", steps=1),
        DPMSolverPP(grid=GRID, order=3, corrector=True, start="lower_order", steps=1),
    ],
    ids=["lms", "pndm", "3m", "unipc"],
)
def test_a_trajectory_goes_on_from_earlier_visits_and_asks_once_a_step(sampler):
    points, recorder = [*at_levels(COSINE), CLEAN], Recorder(MIXTURE.denoiser(COSINE))
    whole = sampler.integrate(recorder, START, points, Condition(), NOISE)
    assert len(recorder.xs) == len(points) - 1  # a corrected step's answer serves the next step
    visits = [Visit(p, said) for p, said in zip(points, recorder.answers, strict=False)]
    for k in (1, 5, 9):
        middle = sampler.integrate(MIXTURE.denoiser(COSINE), START, points[: k + 1], Condition(), NOISE)
        end = sampler.integrate(MIXTURE.denoiser(COSINE), middle, points[k:], Condition(), NOISE, visits[: k + 1])
        assert torch.equal(end, whole)
