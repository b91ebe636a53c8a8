import math

import pytest
import torch
from diffusers.schedulers import scheduling_ddim

from denoiselab.diffusion.paths import (
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    RectifiedFlow,
    Shifted,
    VarianceExploding,
    VPLinear,
    ZeroTerminalSNR,
    resolution_shifted,
)

T = torch.linspace(1e-3, 1, 1000, dtype=torch.float64)
close = torch.testing.assert_close


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_shifted_rectified_flow_is_the_timestep_shift_of_sd3(shift):
    path = Shifted(path=RectifiedFlow(), shift=shift)
    tau = shift * T / (1 + (shift - 1) * T)
    close(path.sigma(T), tau, rtol=1e-12, atol=0)
    close(path.alpha(T), 1 - tau, rtol=1e-12, atol=1e-15)
    close(path.d_sigma(T), shift / (1 + (shift - 1) * T) ** 2, rtol=1e-11, atol=0)
    close(path.d_alpha(T), -shift / (1 + (shift - 1) * T) ** 2, rtol=1e-11, atol=0)
    close(path.c_noise(T), 1000 * tau, rtol=1e-12, atol=0)


@pytest.mark.parametrize("base", [Cosine(), VPLinear(), DDPMLinear()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("side", [32, 64, 256])
def test_by_resolution_it_is_simple_diffusions_shift(base, side):
    path = resolution_shifted(path=base, resolution=side, base_resolution=64)
    t = torch.linspace(path.t_min, path.t_max, 101, dtype=torch.float64)
    close(path.log_snr(t), base.log_snr(t) + 2 * math.log(64 / side), rtol=1e-13, atol=1e-13)
    close(path.alpha(t) ** 2, torch.sigmoid(path.log_snr(t)), rtol=1e-10, atol=0)
    close(path.sigma(t) ** 2, torch.sigmoid(-path.log_snr(t)), rtol=1e-10, atol=0)


def test_a_shift_multiplies_the_noise_level_and_shifts_compose():
    close(Shifted(path=VarianceExploding(), shift=3.0).sigma(T), 3 * T, rtol=1e-12, atol=0)
    once = Shifted(path=DDPMCosine(), shift=6.0)
    twice = Shifted(path=Shifted(path=DDPMCosine(), shift=2.0), shift=3.0)
    for mine, theirs in zip(twice.coefficients(T), once.coefficients(T), strict=True):
        close(mine, theirs, rtol=1e-8, atol=1e-9)
    close(twice.c_noise(T), once.c_noise(T), rtol=1e-8, atol=1e-8)


def test_a_shift_of_one_is_the_base():
    for base in (RectifiedFlow(), DDPMScaledLinear(), ZeroTerminalSNR(path=DDPMLinear())):
        path = Shifted(path=base, shift=1.0)
        for mine, theirs in zip(path.coefficients(T), base.coefficients(T), strict=True):
            close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_pixels_count_whatever_the_shape():
    assert resolution_shifted(path=RectifiedFlow(), resolution=1024, base_resolution=256).shift == 4
    assert resolution_shifted(path=RectifiedFlow(), resolution=[64, 256], base_resolution=256).shift == 0.5
    path = resolution_shifted(path=RectifiedFlow(), resolution=8, base_resolution=8, t_min=0.1, t_max=0.9)
    assert (path.t_min, path.t_max) == (0.1, 0.9)


@pytest.mark.parametrize("patched", [True, False], ids=["in_float64", "as_shipped"])
@pytest.mark.parametrize(
    ("base", "betas"),
    [
        (DDPMLinear(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        (DDPMScaledLinear(), torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
    ],
    ids=["linear", "scaled_linear"],
)
def test_zero_terminal_snr_is_that_of_diffusers(base, betas, patched):
    theirs = scheduling_ddim.rescale_zero_terminal_snr(betas if patched else betas.float())
    path = ZeroTerminalSNR(path=base)
    alpha_bar = (1 - theirs).cumprod(0).double()
    t = torch.arange(1, 1001).double() / 1000
    close(path.alpha(t) ** 2, alpha_bar, rtol=0, atol=1e-12 if patched else 1e-6)
    close(path.sigma(t) ** 2, 1 - alpha_bar, rtol=0, atol=1e-12 if patched else 1e-6)
    close(path.c_noise(t), torch.arange(1000).double(), rtol=1e-12, atol=1e-12)


def test_zero_terminal_snr_keeps_the_first_point_and_ends_in_pure_noise():
    base = DDPMScaledLinear()
    path = ZeroTerminalSNR(path=base)
    first, last = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    close(path.alpha(first), base.alpha(first), rtol=1e-14, atol=0)
    close(path.sigma(first), base.sigma(first), rtol=1e-14, atol=0)
    assert path.alpha(last) == 0
    assert base.alpha(last) > 0.06


def test_a_narrower_range_does_not_move_the_rescaling():
    path, narrow = ZeroTerminalSNR(path=DDPMLinear()), ZeroTerminalSNR(path=DDPMLinear(), t_min=0.1, t_max=0.9)
    assert torch.equal(path.alpha(T), narrow.alpha(T))
    assert (narrow.t_min, narrow.t_max) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shifted(path=RectifiedFlow(), shift=0.0), "shift=0.0: must be positive"),
        (lambda: Shifted(path=RectifiedFlow(), shift=math.inf), "shift=inf: must be positive"),
        (lambda: Shifted(path=DDPMLinear(), shift=2.0, t_min=1e-4), "t_min=0.0001: must be at least 0.001"),
        (lambda: Shifted(path=RectifiedFlow(), shift=2.0, t_max=2.0), "t_max=2.0: must be at most 1"),
        (
            lambda: resolution_shifted(path=RectifiedFlow(), resolution=0, base_resolution=64),
            "resolution=0: must be at least 1",
        ),
        (
            lambda: resolution_shifted(path=RectifiedFlow(), resolution=64, base_resolution=0),
            "base_resolution=0: must be at least 1",
        ),
        (lambda: ZeroTerminalSNR(path=RectifiedFlow()), "path=RectifiedFlow: must be variance preserving"),
        (
            lambda: ZeroTerminalSNR(path=DDPMLinear(t_max=0.9), t_max=0.95),
            "t_max=0.95: must be at most the base's, 0.9",
        ),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
