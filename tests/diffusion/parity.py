"""One network, one start and one noise for diffusers' schedulers and for our samplers.

diffusers keeps its tables and states in float32. With the fixture `double` its modules see a torch and a numpy whose
float32 is float64, so that what differs is the formula and not the rounding: results agree to 1e-10 of their largest entry.
The tests `..._as_shipped` leave float32 alone and ask for 1e-5.
"""

import pytest
import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import DDPMLinear, RectifiedFlow
from denoiselab.diffusion.prediction import X0, Epsilon, V
from denoiselab.diffusion.samplers import CLEAN, Visit, points_of

PATH, FLOW, GRID = DDPMLinear(), RectifiedFlow(), Uniform()
PREDICTIONS = {"epsilon": Epsilon(), "sample": X0(), "v_prediction": V()}
SHAPE = (2, 2, 2)
NOISE = NoiseSource(seed=0, index=torch.arange(3))
START = NOISE.normal("start", SHAPE, torch.float64)
TABLE = {"beta_start": 1e-4, "beta_end": 0.02}  # for schedulers whose defaults are others

# What numpy says of the way diffusers calls it.
quiet = pytest.mark.filterwarnings("ignore:__array(_wrap)?__ :DeprecationWarning")
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_count = pytest.mark.parametrize("n", [5, 20])


def network(x, c_noise, condition):
    """Fixed, nonlinear, mixes the entries of a sample, and depends on the time."""
    mix = torch.linspace(-1, 1, 64, dtype=x.dtype).mul(7).cos().reshape(8, 8) / 4
    y = x.flatten(1) @ mix
    return ((2 * y + 0.004 * c_noise.to(x.dtype)[:, None]).sin() + y).reshape(x.shape)


def timeless(x, c_noise, condition):
    """For grids whose times diffusers rounds before it tells the network."""
    return network(x, torch.full_like(c_noise, 300), condition)


def theirs(scheduler, x, network=network, stop=None, **options):
    """What their scheduler makes of x, or has made of it before the timesteps from `stop` on."""
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps[:stop]:
        output = network(scale(x, t), t.double().expand(len(x)), Condition())
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def denoiser(path, prediction, network=network):
    return NetworkDenoiser(network=network, path=path, prediction=prediction)


def ours(sampler, path, prediction, x, points, network=network, before=()):
    return sampler.integrate(denoiser(path, prediction, network), x, points, Condition(), NOISE, before)


def visit(path, prediction, x, point, network=network):
    """What our denoiser says at x."""
    t = torch.tensor(point.t, dtype=torch.float64)
    return Visit(point, denoiser(path, prediction, network)(x, t, Condition()))


def points_like(scheduler, sampler, path=PATH):
    """The points of their integer timesteps, then the clean end; for "trailing" those of our own grid."""
    if scheduler.config.timestep_spacing == "trailing":
        return sampler.points(path, sampler.steps)
    timesteps = scheduler.timesteps.double().unique().flip(0)  # Heun's list holds each inner one twice
    assert len(timesteps) == sampler.steps
    assert torch.equal(timesteps, timesteps.round())
    return [*points_of(path, (timesteps + 1) / 1000), CLEAN]


def end_of(path):
    """The point at t_min, where some schedulers stop: their timestep 0."""
    return points_of(path, torch.tensor([path.t_min], dtype=torch.float64))[0]


def replay(monkeypatch, scheduler, n):
    """Feed our sampler's noise to theirs.

    Their last step gets zeros: where it starts above timestep 0, DDPM's would add noise to the clean image.
    """
    draws = [NOISE.at(i).normal("sampler", SHAPE, torch.float64) for i in range(n - 1)]
    stream = iter([*draws, torch.zeros_like(START)])
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(stream))


def assert_agree(actual, expected, tolerance=1e-10):
    assert expected.isfinite().all()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{error:.3g} of the largest entry, {expected.abs().max():.3g}"
