"""Each grid keeps its definition, and places its times on every path that ships; then diffusers' schedulers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import AysSchedules
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from denoiselab.diffusion.grids import (
    Beta,
    Cosine,
    Explicit,
    Karras,
    Leading,
    Linspace,
    LogSNR,
    Quadratic,
    Shifted,
    Uniform,
)
from denoiselab.diffusion.paths import Cosine as CosinePath
from denoiselab.diffusion.paths import (
    DDPMLinear,
    DDPMScaledLinear,
    RectifiedFlow,
    Trigonometric,
    VarianceExploding,
    ZeroTerminalSNR,
)

CONF = Path(__file__).parents[2] / "conf"
every_count = pytest.mark.parametrize("n", [5, 20, 50])
# What numpy says of the way diffusers calls it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def choices(group):
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def paths():
    with initialize_config_dir(str(CONF), version_base=None):
        composed = {name: compose("train", [f"objective/path={name}"]) for name in choices("objective/path")}
    return {name: instantiate(config.objective.path, _convert_="all") for name, config in composed.items()}


def shipped(name):
    return instantiate(yaml.safe_load((CONF / "sampler/grid" / f"{name}.yaml").read_text()), _convert_="all")


def levels(path, t):
    return (-path.log_snr(t) / 2).exp()


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=1e-12)


def steps_of(t):
    """DDPM's step numbers of times on its paths."""
    return 1000 * t - 1


@pytest.mark.parametrize("grid", choices("sampler/grid"))
def test_every_grid_keeps_to_every_path(grid, paths):
    grid = LogSNR(sigma_max=80.0) if grid == "log_snr" else shipped(grid)
    for name, path in paths.items():
        if getattr(grid, "over", grid).in_time and not path.even:
            with pytest.raises(
                ValueError, match=r"^grid=\w+: on (VarianceExploding|Laplace) .*use sampler/grid=karras"
            ):
                grid(path, 10)
            continue
        for n in (1, 2, 10, 33, 100):
            t = grid(path, n)
            assert t.shape == (n,), name
            assert t.dtype == torch.float64
            assert (t.diff() < 0).all(), name
            assert path.t_min <= t[-1], name
            assert t[0] <= path.t_max, name


@pytest.mark.parametrize(
    "grid",
    [Uniform(), Linspace(), Quadratic(), Beta(), Cosine(), Shifted(over=Uniform(), shift=3.0)],
    ids=lambda grid: type(grid).__name__,
)
def test_grids_begin_at_t_max(grid, paths):
    for name, path in paths.items():
        for n in (1, 7) if path.even or not getattr(grid, "over", grid).in_time else ():
            assert math.isclose(grid(path, n)[0], path.t_max, rel_tol=1e-12), name


@pytest.mark.parametrize("grid", [LogSNR(), Karras()])
def test_grids_of_noise_levels_begin_and_end_with_the_path(grid):
    for path in (DDPMLinear(), CosinePath(), VarianceExploding()):
        t = grid(path, 5)
        close(t[[0, -1]], [path.t_max, path.t_min])


def test_spacings_in_time():
    for path in (RectifiedFlow(), DDPMLinear()):
        start, end = path.t_max, path.t_min
        i = torch.arange(12).double()
        close(Uniform()(path, 12), start * (1 - i / 12))
        close(Linspace()(path, 12), start + (end - start) * i / 11)
        close(Quadratic()(path, 12) - end, (start - end) * ((11 - i) / 11) ** 2)
        t, beta = Beta(alpha=2.0, beta=1.0)(path, 12), Beta(alpha=1.0, beta=3.0)(path, 12)
        close(((t - end) / (start - end)) ** 2, 1 - i / 11)  # Beta(2, 1) has the CDF t²
        close(1 - (1 - (beta - end) / (start - end)) ** 3, 1 - i / 11)  # and Beta(1, 3) has 1 − (1 − t)³
    symmetric = Beta()(DDPMLinear(), 11)
    close(symmetric + symmetric.flip(0), torch.full((11,), 1.001, dtype=torch.float64))
    assert symmetric.diff().abs().argmax() in (4, 5)


def test_quadratic_times_are_those_of_ddim():
    i, c = torch.arange(31).double(), 999 / 30**2
    close(steps_of(Quadratic()(DDPMLinear(), 31)).flip(0)[1:], (c * i**2)[1:])


def test_spacings_in_noise_level():
    path = DDPMLinear()
    log_snr = path.log_snr(LogSNR()(path, 12))
    close(log_snr.diff(), log_snr.diff().mean().expand(11))
    sigma = levels(path, Karras(rho=7.0)(path, 12))
    i = torch.arange(12).double() / 11
    close(sigma, (sigma[0] ** (1 / 7) + i * (sigma[-1] ** (1 / 7) - sigma[0] ** (1 / 7))) ** 7)
    angle = levels(path, Cosine()(path, 12)).atan()
    close(angle.diff(), angle.diff().mean().expand(11))


def test_cosine_is_uniform_on_the_quarter_circle():
    close(Cosine()(Trigonometric(), 9), Linspace()(Trigonometric(), 9))
    for path in (RectifiedFlow(), ZeroTerminalSNR(path=DDPMLinear())):
        assert Cosine()(path, 9)[0] == path.t_max
        close(levels(path, Cosine(sigma_min=0.02)(path, 3)[1:]), [math.tan((math.pi / 2 + math.atan(0.02)) / 2), 0.02])


@pytest.mark.parametrize("grid", [LogSNR, Karras, Cosine])
def test_noise_levels_are_clamped_to_the_path(grid):
    for path in (RectifiedFlow(), CosinePath(), DDPMLinear()):
        t = grid(sigma_min=0.02, sigma_max=80.0)(path, 9)
        close(levels(path, t)[[0, -1]], [80.0, 0.02])
    wide = grid(sigma_min=1e-9, sigma_max=1e9)(CosinePath(), 9)
    close(wide[[0, -1]], [0.999, 0.001])


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_multiplies_the_noise_levels(shift):
    flow = RectifiedFlow()
    t = Linspace()(RectifiedFlow(t_min=0.01), 9)
    narrow = Shifted(over=Explicit(times=t.tolist()), shift=shift)(flow, 9)
    close(narrow, shift * t / (1 + (shift - 1) * t))
    assert narrow[0] == 1  # pure noise stays pure noise
    for path in (DDPMLinear(), VarianceExploding(), CosinePath()):
        moved = levels(path, Shifted(over=LogSNR(), shift=shift)(path, 9))
        close(moved.log().diff(), moved.log().diff().mean().expand(8))
        top, bottom = levels(path, torch.tensor([path.t_max, path.t_min], dtype=torch.float64)).tolist()
        close(moved[[0, -1]], [top * min(shift, 1), bottom * max(shift, 1)])


def test_shifted_by_one_is_the_other_grid(paths):
    for path in paths.values():
        torch.testing.assert_close(
            Shifted(over=Quadratic(), shift=1.0)(path, 9), Quadratic()(path, 9), rtol=1e-6, atol=1e-9
        )


def test_lists_are_taken_as_they_are_and_interpolated_log_linearly():
    path, listed = VarianceExploding(), [80.0, 8.0, 0.8, 0.02]
    for grid in (Explicit(sigmas=listed), Explicit(times=listed)):
        close(grid(path, 4), listed)
        # The path's 0.002 is the fifth level: with eight steps there is one in the middle of each pair.
        expected = [80.0, 640**0.5, 8.0, 6.4**0.5, 0.8, 0.016**0.5, 0.02, 4e-5**0.5]
        close(grid(path, 8), expected)
        close(grid(path, 2), [80.0, 0.8])
    close(Explicit(sigmas=[80.0, 8.0, 0.002])(path, 4), [80.0, 640**0.5, 8.0, 0.016**0.5])
    close(Explicit(sigmas=[800.0, 200.0, 8.0])(path, 2), [80.0, 8.0])  # the path begins at 80
    close(Explicit(times=[1.0, 0.5, 0.1])(RectifiedFlow(), 3), [1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    ("name", "key", "timesteps"),
    [
        ("ays_sd", "StableDiffusionSigmas", "StableDiffusionTimesteps"),
        ("ays_sdxl", "StableDiffusionXLSigmas", "StableDiffusionXLTimesteps"),
        ("ays_svd", "StableDiffusionVideoSigmas", None),
    ],
)
def test_published_lists(name, key, timesteps):
    grid = shipped(name)
    path = VarianceExploding(t_max=700.0) if timesteps is None else DDPMScaledLinear()
    t = grid(path, 10)
    close(levels(path, t), [min(s, levels(path, t)[0]) for s in AysSchedules[key][:-1]])
    if timesteps is not None:
        # They give three decimals of σ/α, and whole time steps.
        assert (steps_of(t) - torch.tensor(AysSchedules[timesteps])).abs().max() < 0.6


def euler(**options):
    """Their scheduler on DDPM's betas, with 1 − ᾱ computed in float64: in float32 it is 8e-5 off at the first step."""
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **options)
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return scheduler


@every_count
@pytest.mark.parametrize("offset", [0, 1])
def test_leading_is_diffusers(n, offset):
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
    for count in (n, 30, 999):
        scheduler.set_timesteps(count)
        t = Leading(steps_offset=offset)(DDPMLinear(), count)
        torch.testing.assert_close(steps_of(t), scheduler.timesteps.double(), rtol=0, atol=1e-9)


@every_count
def test_trailing_and_linspace_are_diffusers_before_rounding(n):
    for spacing, grid in (("trailing", Uniform()), ("linspace", Linspace())):
        rounded = DDIMScheduler(timestep_spacing=spacing)
        for count in (n, 30, 7):
            rounded.set_timesteps(count)
            assert (steps_of(grid(DDPMLinear(), count)) - rounded.timesteps).abs().max() <= 0.5 + 1e-9
    exact = euler(timestep_spacing="linspace")
    exact.set_timesteps(n)
    torch.testing.assert_close(steps_of(Linspace()(DDPMLinear(), n)), exact.timesteps.double(), rtol=1e-6, atol=1e-4)


@every_count
@pytest.mark.parametrize(("option", "grid"), [("karras", Karras()), ("exponential", LogSNR())])
def test_noise_levels_are_diffusers(n, option, grid):
    scheduler = euler(**{f"use_{option}_sigmas": True})
    scheduler.set_timesteps(n)
    close(levels(DDPMLinear(), grid(DDPMLinear(), n)), scheduler.sigmas[:-1], 1e-5)


@every_count
def test_beta_is_diffusers_where_time_is_the_noise_level(n):
    scheduler = euler(use_beta_sigmas=True)
    scheduler.set_timesteps(n)
    top, bottom = scheduler.sigmas[0].item(), scheduler.sigmas[-2].item()
    close(Beta()(VarianceExploding(t_min=bottom, t_max=top), n), scheduler.sigmas[:-1], 1e-5)
    flow = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    flow.set_timesteps(n)
    close(Beta()(RectifiedFlow(), n), flow.sigmas[:-1], 1e-5)


@every_count
def test_shifted_is_diffusers_flow_shift(n):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    close(Shifted(over=Uniform(), shift=3.0)(RectifiedFlow(), n), scheduler.sigmas[:-1], 1e-5)
    # Left to itself it goes down to its smallest level, which was shifted when it was built, and shifts it again.
    scheduler.set_timesteps(n)
    path = RectifiedFlow(t_min=3 * 0.001 / (1 + 2 * 0.001))
    close(Shifted(over=Linspace(), shift=3.0)(path, n), scheduler.sigmas[:-1], 1e-5)


def test_what_does_not_fit_is_refused():
    flow, ddpm = RectifiedFlow(), DDPMLinear()
    for make, message in (
        (lambda: Uniform()(ddpm, 1001), r"^steps=1001: at most 1000 uniform steps fit above t_min=0.001"),
        (lambda: LogSNR()(flow, 10), r"needs a largest noise level .*set sampler.grid.sigma_max=80"),
        (lambda: Karras()(flow, 10), r"needs a largest noise level .*set sampler.grid.sigma_max=80"),
        (lambda: Leading()(ddpm, 1001), "^steps=1001: does not fit into train_steps=1000 with steps_offset=0"),
        (lambda: Leading(steps_offset=1)(ddpm, 1000), "^steps=1000: does not fit into train_steps=1000 with steps_offset=1"),
        (lambda: Shifted(over=Uniform(), shift=1e5)(ddpm, 3), r"^grid\.shift=100000.0: is more than the whole range"),
        (lambda: Explicit(times=[1.2, 0.5])(flow, 2), r"^grid\.times=\[1.2, 0.5\]: must lie between t_min=0.001"),
        (lambda: Explicit(times=[1.0, 0.5])(flow, 3), r"^steps=3: a list that begins in pure noise is for steps=2 alone"),
        (lambda: Explicit(sigmas=[1e-7, 1e-8])(ddpm, 2), r"^steps=2: some times of the grid Explicit coincide"),
        (lambda: Karras(sigma_min=500.0, sigma_max=600.0)(ddpm, 2), r"^steps=2: some times of the grid Karras coincide"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Karras(sigma_min=-1.0), "sigma_min=-1.0: must be positive"),
        (lambda: LogSNR(sigma_min=3.0, sigma_max=2.0), "sigma_min=3.0: must be below sigma_max=2.0"),
        (lambda: Karras(rho=0.5), "rho=0.5: must be at least 1"),
        (lambda: Leading(train_steps=1), "train_steps=1: must be at least 2"),
        (lambda: Leading(steps_offset=-1), "steps_offset=-1: must be at least 0 and below train_steps=1000"),
        (lambda: Beta(alpha=0.0), "alpha=0.0: must be positive"),
        (lambda: Beta(beta=math.inf), "beta=inf: must be positive"),
        (lambda: Shifted(over=Uniform(), shift=0.0), "shift=0.0: must be positive"),
        (lambda: Explicit(), "times=None: give either times or sigmas"),
        (lambda: Explicit(times=[1.0], sigmas=[1.0]), r"times=\[1.0\]: give either times or sigmas"),
        (lambda: Explicit(sigmas=[1.0]), r"sigmas=\[1.0\]: must be at least two positive numbers"),
        (lambda: Explicit(sigmas=[1.0, 2.0]), r"sigmas=\[1.0, 2.0\]: must be .* each below the one before"),
        (lambda: Explicit(times=[1.0, 0.0]), r"times=\[1.0, 0.0\]: must be at least two positive numbers"),
        (lambda: Explicit(sigmas=[math.nan, 1.0]), r"sigmas=\[nan, 1.0\]: must be"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
