"""DPM-Solver++(3M): where ours differs from the published update that diffusers and k-diffusion follow, and why."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from exact import MIXTURE, Scripted
from parity import GRID, NOISE, START, assert_agree, quiet

from denoiselab.condition import Condition
from denoiselab.diffusion.paths import Cosine
from denoiselab.diffusion.samplers import DPMSolverPP, RungeKutta4, Visit, points_of

PATH = Cosine()
SAMPLER = DPMSolverPP(grid=GRID, order=3, start="lower_order", steps=1)

pytestmark = quiet


def third_order_step_of_theirs(points, x0s, x):
    """Their update from the second point but one on, with what was answered at the first three."""
    scheduler = DPMSolverMultistepScheduler(solver_order=3)
    scheduler.sigmas = torch.tensor([p.level for p in points], dtype=torch.float64)
    scheduler._step_index = len(points) - 2
    return scheduler.multistep_dpm_solver_third_order_update(x0s, sample=x)


def test_their_third_order_multistep_has_half_of_the_second_derivative(double):
    """Where x0 is a quadratic in half the log-SNR ours is exact, and theirs halfway to what the tangent gives."""
    levels = torch.tensor([2.9, 2.3, 1.8, 1.1], dtype=torch.float64)
    points = points_of(PATH, PATH.t_of_log_snr(-2 * levels.log()))
    here = points[2].half_log_snr

    def solve(curvature):
        said = Scripted(PATH, "x0", lambda s: 0.3 - 0.7 * (s - here) + curvature * (s - here) ** 2)
        visits = [Visit(p, said(START, torch.tensor(p.t, dtype=torch.float64), Condition())) for p in points[:3]]
        mine = SAMPLER.integrate(said, START, points[2:], Condition(), NOISE, visits)
        assert_agree(mine, said.solution(START, points[2], points[3]), tolerance=1e-13)
        return mine, third_order_step_of_theirs(points, [v.posterior.x0 for v in visits], START)

    (line, same), (curve, other) = solve(0.0), solve(0.9)
    assert_agree(same, line, tolerance=1e-12)
    assert_agree(other, (line + curve) / 2, tolerance=1e-12)


def test_so_theirs_is_of_second_order_and_ours_of_third(double):
    """On the mixture, from exact starting values."""
    denoiser, first = MIXTURE.denoiser(PATH), NOISE.normal("x", (1, 1, 2), torch.float64)

    def solution(p, q):
        times = points_of(PATH, torch.linspace(p.t, q.t, 200, dtype=torch.float64))
        return RungeKutta4(grid=GRID, steps=1).integrate(denoiser, first, times, Condition(), NOISE)

    def answered(point, x):
        return Visit(point, denoiser(x, torch.tensor(point.t, dtype=torch.float64), Condition()))

    errors = []
    for n in (40, 80):
        levels = torch.logspace(math.log10(1.7), math.log10(1.05), n + 1, dtype=torch.float64)
        points = points_of(PATH, PATH.t_of_log_snr(-2 * levels.log()))
        x = start = solution(points[0], points[2])
        visits = [answered(p, y) for p, y in zip(points, (first, solution(*points[:2]), start), strict=False)]
        mine = SAMPLER.integrate(denoiser, start, points[2:], Condition(), NOISE, visits)
        for i in range(3, n + 1):
            x = third_order_step_of_theirs(points[i - 3 : i + 1], [v.posterior.x0 for v in visits[-3:]], x)
            visits.append(answered(points[i], x))
        end = solution(points[0], points[-1])
        errors.append([float((got - end).square().mean().sqrt()) for got in (x, mine)])
    theirs_order, our_order = (math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True))
    assert theirs_order == pytest.approx(2, abs=0.15)
    assert our_order == pytest.approx(3, abs=0.15)
