"""Our samplers take the steps of diffusers' schedulers, given the same times, noise and network.

diffusers keeps its tables and states in float32. Here its scheduler modules see a torch and a numpy whose
float32 is float64, so that what differs is the formula and not the rounding: results agree to 1e-10 of their
largest entry. The tests `..._as_shipped` leave float32 alone and ask for 1e-5.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.grids import Karras, LogSNR, Uniform
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import DDPMLinear, RectifiedFlow
from denoiselab.diffusion.prediction import X0, Epsilon, V, Velocity
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

PATH, FLOW, GRID = DDPMLinear(), RectifiedFlow(), Uniform()
PREDICTIONS = {"epsilon": Epsilon(), "sample": X0(), "v_prediction": V()}
SHAPE = (2, 2, 2)
NOISE = NoiseSource(seed=0, index=torch.arange(3))
START = NOISE.normal("start", SHAPE, torch.float64)
HEUN = partial(HeunDiscreteScheduler, beta_start=1e-4, beta_end=0.02)  # its defaults are Stable Diffusion's
SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
]

# What numpy says of the way diffusers calls it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_count = pytest.mark.parametrize("n", [5, 20, 50])


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture
def double(monkeypatch):
    for scheduler in SCHEDULERS:
        for name, module in (("torch", torch), ("np", np)):
            monkeypatch.setattr(f"{scheduler.__module__}.{name}", Double(module))


def network(x, c_noise, condition):
    """Fixed, nonlinear, mixes the entries of a sample, and depends on the time."""
    mix = torch.linspace(-1, 1, 64, dtype=x.dtype).mul(7).cos().reshape(8, 8) / 4
    y = x.flatten(1) @ mix
    return ((2 * y + 0.004 * c_noise.to(x.dtype)[:, None]).sin() + y).reshape(x.shape)


def timeless(x, c_noise, condition):
    """For grids whose times diffusers rounds before it tells the network."""
    return network(x, torch.full_like(c_noise, 300), condition)


def theirs(scheduler, x, network=network, **options):
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        output = network(scale(x, t), t.double().expand(len(x)), Condition())
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def ours(sampler, path, prediction, x, points, network=network):
    denoiser = NetworkDenoiser(network=network, path=path, prediction=prediction)
    return sampler.integrate(denoiser, x, points, Condition(), NOISE)


def points_like(scheduler, sampler):
    """The points of their integer timesteps, then the clean end; for "trailing" those of our own grid."""
    if scheduler.config.timestep_spacing == "trailing":
        return sampler.points(PATH, sampler.steps)
    timesteps = scheduler.timesteps.double().unique().flip(0)  # Heun's list holds each inner one twice
    assert len(timesteps) == sampler.steps
    assert torch.equal(timesteps, timesteps.round())
    return [*points_of(PATH, (timesteps + 1) / 1000), CLEAN]


def assert_agree(actual, expected, tolerance=1e-10):
    assert expected.isfinite().all()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{error:.3g} of the largest entry, {expected.abs().max():.3g}"


def replay(monkeypatch, scheduler, n):
    """Feed our sampler's noise to theirs.

    Their last step gets zeros: where it starts above timestep 0, DDPM's would add noise to the clean image.
    """
    draws = [NOISE.at(i).normal("sampler", SHAPE, torch.float64) for i in range(n - 1)]
    stream = iter([*draws, torch.zeros_like(START)])
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(stream))


@pytest.mark.parametrize("beta_max", [0.02, 0.01])
def test_the_ddpm_path_is_their_table(double, beta_max):
    scheduler = DDPMScheduler(beta_end=beta_max)
    path = DDPMLinear(beta_max=beta_max)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha_bar = scheduler.alphas_cumprod
    assert alpha_bar.dtype == torch.float64
    torch.testing.assert_close(path.alpha(t).square(), alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(path.sigma(t).square(), 1 - alpha_bar, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [5, 20, 50, 1000])
@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_network_is_told_their_integer_timesteps(make, n):
    scheduler = make(timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    told = []

    def listening(x, c_noise, condition):
        told.append(c_noise)
        return x

    sampler = Euler(grid=GRID, steps=n)
    denoiser = NetworkDenoiser(network=listening, path=PATH, prediction=V())
    sampler.sample(denoiser, (1, 1, 1), Condition(), NOISE)
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


@every_prediction
@pytest.mark.parametrize(
    ("spacing", "n"),
    # Linspace times are integers where n − 1 divides 999; elsewhere theirs interpolate σ/α linearly.
    [
        *itertools.product(["leading", "trailing"], [5, 20, 50]),
        ("linspace", 4),
        ("linspace", 28),
        ("linspace", 38),
    ],
)
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


# A last step onto the clean end is first order anyhow, whatever `lower_order_final` and `euler_at_final` say.
@every_count
@every_prediction
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("lower_order_final", "euler_at_final"), [(True, False), (False, False), (False, True)])
def test_dpm_solver_pp_2m(double, lower_order_final, euler_at_final, spacing, prediction, n):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=prediction,
        timestep_spacing=spacing,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(n)
    sampler = DPMSolverPP2M(grid=GRID, steps=n)
    points = points_like(scheduler, sampler)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
def test_dpm_solver_pp_2m_stopping_at_timestep_0(double, prediction, n):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=prediction,
        timestep_spacing="trailing",
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(n)
    sampler = DPMSolverPP2M(grid=GRID, steps=n)
    end = points_of(PATH, torch.tensor([PATH.t_min], dtype=torch.float64))
    points = [*points_like(scheduler, sampler)[:-1], *end]
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), theirs(scheduler, START))


@every_count
@every_prediction
@pytest.mark.parametrize(
    ("option", "grid"),
    [("use_karras_sigmas", Karras()), ("use_lu_lambdas", LogSNR()), ("use_exponential_sigmas", LogSNR())],
)
def test_dpm_solver_pp_2m_on_noise_level_grids(double, option, grid, prediction, n):
    scheduler = DPMSolverMultistepScheduler(prediction_type=prediction, **{option: True})
    scheduler.set_timesteps(n)
    sampler = DPMSolverPP2M(grid=grid, steps=n)
    points = sampler.points(PATH, n)
    sigmas = torch.tensor([p.sigma / p.alpha for p in points], dtype=torch.float64)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-9, atol=0)
    result = theirs(scheduler, START, timeless)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points, timeless), result)


@every_count
def test_dpm_solver_pp_2m_on_rectified_flow(double, n):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(n)
    points = [*points_of(FLOW, scheduler.sigmas[:-1]), CLEAN]
    sampler = DPMSolverPP2M(grid=GRID, steps=n)
    result = theirs(scheduler, START, timeless)
    assert_agree(ours(sampler, FLOW, Velocity(), START, points, timeless), result)


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
        points = [*points_of(FLOW, scheduler.sigmas[:-1]), CLEAN]
    assert_agree(ours(sampler, FLOW, Velocity(), START, points), theirs(scheduler, START))


@every_count
def test_flow_matching_heun(double, n):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(n)
    points = [*points_of(FLOW, scheduler.timesteps.unique().flip(0) / 1000), CLEAN]
    assert_agree(ours(HeunT(grid=GRID, steps=n), FLOW, Velocity(), START, points), theirs(scheduler, START))


@every_count
@every_prediction
@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (partial(DDPMScheduler, clip_sample=False), DDPM),
        (partial(DDIMScheduler, clip_sample=False), DDIM),
        (EulerDiscreteScheduler, Euler),
        (HEUN, Heun),
        (DPMSolverMultistepScheduler, DPMSolverPP2M),
    ],
    ids=["ddpm", "ddim", "euler", "heun", "dpmpp_2m"],
)
def test_as_shipped(monkeypatch, make, sampler, prediction, n):
    scheduler = make(prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    if sampler is DDPM:
        replay(monkeypatch, scheduler, n)
    sampler = sampler(grid=GRID, steps=n)
    points = sampler.points(PATH, n)
    result = theirs(scheduler, START / points[0].alpha if isinstance(sampler, Euler | Heun) else START)
    assert_agree(ours(sampler, PATH, PREDICTIONS[prediction], START, points), result, tolerance=1e-5)


@every_count
def test_flow_matching_as_shipped(n):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    sampler = EulerT(grid=GRID, steps=n)
    result = theirs(scheduler, START)
    assert_agree(ours(sampler, FLOW, Velocity(), START, sampler.points(FLOW, n)), result, tolerance=1e-5)
