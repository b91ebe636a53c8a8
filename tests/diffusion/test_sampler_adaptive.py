"""The adaptive solver is the Dormand-Prince pair, with a step control for each sample."""

import math

import numpy as np
import pytest
import torch
from exact import MIXTURE
from scipy.integrate import solve_ivp

from denoiselab.condition import Condition
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, RectifiedFlow, Trigonometric, VarianceExploding
from denoiselab.diffusion.samplers import DormandPrince, points_of
from denoiselab.diffusion.samplers.adaptive import FIFTH, LESS_FOURTH, PLACES, STAGES

PATHS = {
    "cosine": Cosine(),
    "rectified_flow": RectifiedFlow(),
    "trigonometric": Trigonometric(),
    "variance_exploding": VarianceExploding(),
}
NOISE = NoiseSource(seed=0, index=torch.arange(5))
Z = NOISE.normal("x", (1, 1, 2), torch.float64)

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


class Counting:
    """The denoiser of the mixture, which keeps the times at which it was asked."""

    consistent = True

    def __init__(self, path):
        self.path, self.asked = path, []

    def __call__(self, x, t, condition):
        self.asked.append(t)
        return MIXTURE.denoiser(self.path)(x, t, condition)

    def fresh(self):
        return self


def start(path, rows=slice(None)):
    return points_of(path, torch.tensor([path.t_max], dtype=torch.float64))[0].sigma * Z[rows]


def solve(path, rows=slice(None), **options):
    """To t_min, and what it asked."""
    sampler, denoiser = DormandPrince(**options), Counting(path)
    x = start(path, rows)
    return sampler.integrate(denoiser, x, sampler.points(path, 0)[:-1], Condition(), NOISE), denoiser.asked


def velocity(path):
    """ẋ for scipy, of one sample."""

    def of(t, x):
        time = torch.tensor(t, dtype=torch.float64)
        said = MIXTURE.denoiser(path)(torch.from_numpy(x).reshape(1, 1, 1, 2), time, Condition())
        return (path.d_alpha(time) * said.x0 + path.d_sigma(time) * said.eps).flatten().numpy()

    return of


def test_the_tableau_satisfies_the_order_conditions():
    """Σ b_i·c_i^(k−1) = 1/k to order 5 (4 for the other one), each row sums to its place, and the last row is the step."""
    places = np.array([*PLACES, 1.0])
    fifth = np.array([*FIFTH, 0.0])
    fourth = fifth - np.array(LESS_FOURTH)
    for k in range(1, 6):
        assert fifth @ places ** (k - 1) == pytest.approx(1 / k, rel=1e-13)
        assert (abs(fourth @ places ** (k - 1) - 1 / k) < 1e-13) == (k < 5)
    assert [sum(row) for row in STAGES] == pytest.approx(PLACES, rel=1e-13)
    matrix = np.zeros((6, 6))
    for i, row in enumerate(STAGES):
        matrix[i, : len(row)] = row
    c = places[:6]  # and conditions on the stages (Hairer, Nørsett & Wanner 1993, table II.2.1)
    for power, expected in ((1, 1 / 6), (2, 1 / 12), (3, 1 / 20)):
        assert np.array(FIFTH) @ matrix @ c**power == pytest.approx(expected, rel=1e-13)


@every_path
def test_it_takes_the_steps_of_scipys_rk45(path):
    """From the same first step on: the same times, accepted or refused, and the same result up to rounding."""
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for i in range(3):
        ours, asked = solve(path, slice(i, i + 1), **tolerance)
        first = float(asked[0] - asked[6])  # the last stage is at the end of the step
        of, x = velocity(path), start(path, i).flatten().numpy()
        theirs = solve_ivp(of, (path.t_max, path.t_min), x, method="RK45", first_step=first, **tolerance)
        assert theirs.success
        assert len(asked) == theirs.nfev
        np.testing.assert_allclose(ours.flatten(), theirs.y[:, -1], rtol=0, atol=1e-11)


@every_path
def test_it_is_as_exact_as_it_is_asked_to_be(path):
    x = start(path, 0).flatten().numpy()
    exact = solve_ivp(velocity(path), (path.t_max, path.t_min), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        ours, _ = solve(path, slice(0, 1), rtol=tolerance, atol=tolerance)
        errors.append(np.abs(ours.flatten().numpy() - exact).max())
        assert errors[-1] < 100 * tolerance
    assert errors[2] < errors[1] < errors[0]


@every_path
def test_each_sample_has_its_own_steps(path):
    together, asked = solve(path)
    alone = [solve(path, slice(i, i + 1)) for i in range(5)]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), rtol=0, atol=1e-13)
    costs = [len(times) for _, times in alone]
    assert len(asked) == max(costs)  # the others wait
    assert len(set(costs)) > 1
    times = torch.stack(asked)
    assert times.max() == path.t_max
    assert times.min() == path.t_min
    assert (times[-1] == path.t_min).all()


def test_the_last_answer_is_the_image():
    path = RectifiedFlow()
    sampler, denoiser = DormandPrince(), Counting(path)
    points, nfe = sampler.plan(denoiser)
    assert nfe is None
    x0 = sampler.integrate(denoiser, start(path), points, Condition(), NOISE)
    end, asked = solve(path)
    assert len(denoiser.asked) == len(asked) + 1
    t_min = torch.tensor(path.t_min, dtype=torch.float64)
    torch.testing.assert_close(x0, MIXTURE.denoiser(path)(end, t_min, Condition()).x0, rtol=0, atol=1e-14)


def test_a_part_of_the_path():
    path, sampler = Cosine(), DormandPrince(rtol=1e-9, atol=1e-9)
    whole = points_of(path, torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64))
    middle = sampler.integrate(MIXTURE.denoiser(path), Z, whole[:2], Condition(), NOISE)
    parts = sampler.integrate(MIXTURE.denoiser(path), middle, whole[1:], Condition(), NOISE)
    once = sampler.integrate(MIXTURE.denoiser(path), Z, whole[::2], Condition(), NOISE)
    torch.testing.assert_close(parts, once, rtol=0, atol=1e-8)


def test_float32_is_enough_for_the_tolerance_that_ships():
    path, sampler = RectifiedFlow(), DormandPrince()
    x0 = sampler.sample(MIXTURE.denoiser(path), (1, 1, 2), Condition(), NOISE)
    assert x0.dtype == torch.float32
    z = NOISE.normal("start", (1, 1, 2), torch.float64)
    exact = DormandPrince(rtol=1e-9, atol=1e-9).integrate(
        MIXTURE.denoiser(path), z, sampler.points(path, 0), Condition(), NOISE
    )
    assert (x0 - exact).abs().max() < 1e-3


def test_too_many_steps_are_an_error_and_as_many_as_it_takes_are_not():
    path = RectifiedFlow()
    _, asked = solve(path)
    needed = (len(asked) - 1) // 6
    assert math.isclose(needed, (len(asked) - 1) / 6)
    solve(path, max_steps=needed)
    with pytest.raises(RuntimeError, match=f"max_steps={needed - 1}: not enough for rtol=1e-05, atol=1e-05"):
        solve(path, max_steps=needed - 1)


def test_what_is_not_a_number_ends_at_once():
    class Broken(Counting):
        def __call__(self, x, t, condition):
            said = super().__call__(x, t, condition)
            return said if t.min() > 0.5 else said._replace(eps=said.eps * math.nan)

    denoiser, sampler = Broken(RectifiedFlow()), DormandPrince()
    with pytest.raises(RuntimeError, match="the denoiser's answer is not a number"):
        sampler.integrate(denoiser, Z, sampler.points(RectifiedFlow(), 0), Condition(), NOISE)
    assert len(denoiser.asked) < 100
