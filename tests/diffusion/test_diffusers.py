"""Our one-step samplers take the steps of diffusers' schedulers, given the same times, noise and network (`parity.py`)."""

import itertools
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from parity import (
    GRID,
    NOISE,
    PATH,
    PREDICTIONS,
    START,
    TABLE,
    assert_agree,
    every_count,
    every_prediction,
    network,
    ours,
    points_like,
    quiet,
    replay,
    theirs,
    timeless,
)

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.grids import Karras, LogSNR
from denoiselab.diffusion.paths import DDPMLinear
from denoiselab.diffusion.prediction import V
from denoiselab.diffusion.samplers import CLEAN, DDIM, DDPM, DPMSolverPP2S, Euler, Heun, Midpoint, points_of

HEUN, DPM_2 = partial(HeunDiscreteScheduler, **TABLE), partial(KDPM2DiscreteScheduler, **TABLE)
ANCESTRAL = partial(DDIM, eta=1.0)
MIDDLE = partial(Midpoint, middle="geometric")

pytestmark = quiet


@pytest.mark.parametrize("beta_max", [0.02, 0.01])
def test_the_ddpm_path_is_their_table(double, beta_max):
    scheduler = DDPMScheduler(beta_end=beta_max)
    path = DDPMLinear(beta_max=beta_max)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha_bar = scheduler.alphas_cumprod
    assert alpha_bar.dtype == torch.float64
    torch.testing.assert_close(path.alpha(t).square(), alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(path.sigma(t).square(), 1 - alpha_bar, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [5, 20, 200])
@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_network_is_told_their_integer_timesteps(make, n):
    scheduler = make(timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    told = []

    def listening(x, c_noise, condition):
        told.append(c_noise)
        return x

    denoiser = NetworkDenoiser(network=listening, path=PATH, prediction=V())
    Euler(grid=GRID, steps=n).sample(denoiser, (1, 1, 1), Condition(), NOISE)
    # In float32 this is bit for bit, but for 1e-15 in place of 0.
    expected = scheduler.timesteps.float()[:, None].expand(n, 3)
    torch.testing.assert_close(torch.stack(told), expected, rtol=0, atol=1e-12)


@every_count
@every_prediction
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm(double, monkeypatch, spacing, variance, prediction, n):
    scheduler = DDPMScheduler(
        prediction_type=prediction,
        variance_type=f"fixed_{variance}",
        clip_sample=False,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(n)
    replay(monkeypatch, scheduler, n)
    sampler = DDPM(grid=GRID, variance=variance, steps=n)
    points = points_like(scheduler, sampler)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(double, monkeypatch, spacing, eta, prediction, n):
    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing
    )
    scheduler.set_timesteps(n)
    replay(monkeypatch, scheduler, n)
    sampler = DDIM(grid=GRID, eta=eta, steps=n)
    points = points_like(scheduler, sampler)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START, eta=eta))


# Linspace times are integers where n − 1 divides 999; elsewhere theirs interpolate σ/α linearly.
SPACINGS = [*itertools.product(["leading", "trailing"], [5, 20]), ("linspace", 4), ("linspace", 28)]


@every_prediction
@pytest.mark.parametrize(("spacing", "n"), SPACINGS)
@pytest.mark.parametrize(("make", "sampler"), [(EulerDiscreteScheduler, Euler), (HEUN, Heun)], ids=["euler", "heun"])
def test_euler_and_heun(double, make, sampler, spacing, n, prediction):
    scheduler = make(prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    sampler = sampler(grid=GRID, steps=n)
    points = points_like(scheduler, sampler)
    # Their state is x/α.
    result = theirs(scheduler, START / points[0].alpha)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), result)


@every_count
@every_prediction
@pytest.mark.parametrize(("make", "sampler"), [(EulerDiscreteScheduler, Euler), (HEUN, Heun)], ids=["euler", "heun"])
def test_euler_and_heun_on_the_karras_grid(double, make, sampler, prediction, n):
    scheduler = make(prediction_type=prediction, timestep_spacing="linspace", use_karras_sigmas=True)
    scheduler.set_timesteps(n)
    sampler = sampler(grid=Karras(), steps=n)
    points = sampler.points(PATH, n)
    result = theirs(scheduler, START / points[0].alpha, timeless)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points, timeless), result)


# Theirs does not take "sample".
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("spacing", "n"), SPACINGS)
def test_euler_ancestral(double, monkeypatch, spacing, n, prediction):
    scheduler = EulerAncestralDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    replay(monkeypatch, scheduler, n)
    sampler = ANCESTRAL(grid=GRID, steps=n)
    points = points_like(scheduler, sampler)
    result = theirs(scheduler, START / points[0].alpha)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), result)


# Theirs does not take "sample", and tells the network a middle that is interpolated in its table.
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("spacing", "n"), [("leading", 5), ("trailing", 20), ("linspace", 4)])
def test_dpm_2(double, spacing, n, prediction):
    scheduler = DPM_2(prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    points = [*points_of(PATH, (scheduler.timesteps[::2] + 1) / 1000), CLEAN]
    assert len(points) == n + 1
    result = theirs(scheduler, START / points[0].alpha, timeless)
    assert_agree(ours(MIDDLE(grid=GRID, steps=n), PATH, PREDICTIONS[prediction], START, points, timeless), result)


@pytest.mark.parametrize("n", [3, 21])
@every_prediction
def test_dpm_solver_pp_2s(double, prediction, n):
    """Two of their steps are one of ours, whose middle is halfway in log-SNR; with equal log steps so is theirs."""
    scheduler = DPMSolverSinglestepScheduler(
        prediction_type=prediction, use_exponential_sigmas=True, lower_order_final=True
    )
    scheduler.set_timesteps(n)
    assert scheduler.order_list == [1, 2] * (n // 2) + [1]
    points = [*points_of(PATH, LogSNR()(PATH, n)[::2]), CLEAN]
    result = theirs(scheduler, START, timeless)
    assert_agree(
        ours(DPMSolverPP2S(grid=GRID, steps=1), PATH, PREDICTIONS[prediction], START, points, timeless), result
    )


@every_count
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (partial(DDPMScheduler, clip_sample=False), DDPM),
        (partial(DDIMScheduler, clip_sample=False), DDIM),
        (EulerDiscreteScheduler, Euler),
        (EulerAncestralDiscreteScheduler, ANCESTRAL),
        (HEUN, Heun),
        (DPM_2, MIDDLE),
    ],
    ids=["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm_2"],
)
def test_as_shipped(monkeypatch, make, sampler, prediction, n):
    scheduler = make(prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    sampler = sampler(grid=GRID, steps=n)
    if sampler.stochastic:
        replay(monkeypatch, scheduler, n)
    points = sampler.points(PATH, n)
    start = START if isinstance(scheduler, DDPMScheduler | DDIMScheduler) else START / points[0].alpha
    asked = timeless if make is DPM_2 else network
    result = theirs(scheduler, start, asked)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points, asked), result, tolerance=1e-5)


def test_dpm_solver_pp_2s_as_shipped():
    scheduler = DPMSolverSinglestepScheduler(use_exponential_sigmas=True, lower_order_final=True)
    scheduler.set_timesteps(21)
    points = [*points_of(PATH, LogSNR()(PATH, 21)[::2]), CLEAN]
    result = ours(DPMSolverPP2S(grid=GRID, steps=1), PATH, PREDICTIONS["epsilon"], START, points, timeless)
    assert_agree(result, theirs(scheduler, START, timeless), tolerance=1e-5)
