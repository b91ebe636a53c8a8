"""On rectified flow and on EDM's path, too, ours are the steps of diffusers' schedulers (`parity.py`)."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from parity import (
    FLOW,
    GRID,
    START,
    assert_agree,
    every_count,
    ours,
    quiet,
    replay,
    theirs,
    timeless,
)

from denoiselab.diffusion.grids import Karras, LogSNR
from denoiselab.diffusion.paths import VarianceExploding
from denoiselab.diffusion.prediction import EDM, Velocity
from denoiselab.diffusion.samplers import CLEAN, DPMSolverPP, Euler, EulerT, HeunT, points_of

EXPLODING = VarianceExploding()
EDM_GRIDS = {"karras": Karras(), "exponential": LogSNR()}

pytestmark = quiet


def flow_points(scheduler):
    return [*points_of(FLOW, scheduler.sigmas[:-1].double()), CLEAN]


@every_count
@pytest.mark.parametrize("spacing", ["trailing", "theirs"])
@pytest.mark.parametrize("sampler", [Euler, EulerT])
def test_flow_matching_euler(double, sampler, spacing, n):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sampler = sampler(grid=GRID, steps=n)
    if spacing == "trailing":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
        points = sampler.points(FLOW, n)
    else:
        scheduler.set_timesteps(n)
        points = flow_points(scheduler)
    assert_agree(ours(sampler, FLOW, Velocity(), START, points), theirs(scheduler, START))


@every_count
def test_flow_matching_heun(double, n):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(n)
    points = [*points_of(FLOW, scheduler.timesteps.unique().flip(0) / 1000), CLEAN]
    assert_agree(ours(HeunT(grid=GRID, steps=n), FLOW, Velocity(), START, points), theirs(scheduler, START))


@every_count
@pytest.mark.parametrize("corrector", [False, True], ids=["dpmpp_2m", "unipc_2"])
def test_multistep_on_rectified_flow(double, corrector, n):
    """Theirs begins a little off pure noise, at 1 − 1e-6 (UniPC) or where it begins anyhow."""
    make = UniPCMultistepScheduler if corrector else DPMSolverMultistepScheduler
    scheduler = make(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(n)
    sampler = DPMSolverPP(grid=GRID, corrector=corrector, start="lower_order", steps=n)
    result = theirs(scheduler, START, timeless)
    assert_agree(ours(sampler, FLOW, Velocity(), START, flow_points(scheduler), timeless), result)


def edm_points(scheduler, schedule, n):
    """Their noise levels, which are float32 in part; ours are the same ones."""
    levels = scheduler.sigmas[:-1].double()
    torch.testing.assert_close(EDM_GRIDS[schedule](EXPLODING, n), levels, rtol=1e-5, atol=0)
    return [*points_of(EXPLODING, levels), CLEAN]


every_schedule = pytest.mark.parametrize("schedule", EDM_GRIDS)


@every_count
@every_schedule
def test_edm_euler(double, schedule, n):
    scheduler = EDMEulerScheduler(sigma_schedule=schedule)
    scheduler.set_timesteps(n)
    points = edm_points(scheduler, schedule, n)
    assert_agree(ours(Euler(grid=GRID, steps=n), EXPLODING, EDM(), 80 * START, points), theirs(scheduler, 80 * START))


@every_count
@every_schedule
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_edm_dpm_solver_pp_2m(double, monkeypatch, eta, schedule, n):
    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    scheduler = EDMDPMSolverMultistepScheduler(sigma_schedule=schedule, algorithm_type=kind)
    scheduler.set_timesteps(n)
    replay(monkeypatch, scheduler, n)
    sampler = DPMSolverPP(grid=GRID, eta=eta, start="lower_order", steps=n)
    points = edm_points(scheduler, schedule, n)
    assert_agree(ours(sampler, EXPLODING, EDM(), 80 * START, points), theirs(scheduler, 80 * START))


@every_count
def test_flow_matching_as_shipped(n):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    sampler = EulerT(grid=GRID, steps=n)
    result = theirs(scheduler, START)
    assert_agree(ours(sampler, FLOW, Velocity(), START, sampler.points(FLOW, n)), result, tolerance=1e-5)


@every_count
@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (EDMEulerScheduler, Euler(grid=GRID, steps=1)),
        (EDMDPMSolverMultistepScheduler, DPMSolverPP(grid=GRID, steps=1)),
    ],
    ids=["euler", "dpmpp_2m"],
)
def test_edm_as_shipped(make, sampler, n):
    scheduler = make()
    scheduler.set_timesteps(n)
    points = [*points_of(EXPLODING, Karras()(EXPLODING, n)), CLEAN]
    result = theirs(scheduler, 80 * START)
    assert_agree(ours(sampler, EXPLODING, EDM(), 80 * START, points), result, tolerance=1e-5)


@every_count
def test_flow_matching_heun_as_shipped(n):
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(n)
    points = [*points_of(FLOW, scheduler.timesteps.double().unique().flip(0) / 1000), CLEAN]
    result = theirs(scheduler, START)
    assert_agree(ours(HeunT(grid=GRID, steps=n), FLOW, Velocity(), START, points), result, tolerance=1e-5)
