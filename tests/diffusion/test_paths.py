import math

import pytest
import torch
from exact import PATHS

from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow

ALL = {**PATHS, "rectified_flow_to_1": RectifiedFlow()}


def times(path, n=801):
    return torch.linspace(path.t_min, path.t_max, n, dtype=torch.float64)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_derivatives_agree_with_autograd(path):
    t = times(path).requires_grad_()
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_log_snr_falls_and_its_inverse_agrees(path):
    t = times(path)
    log_snr = path.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(path.t_of_log_snr(log_snr), t, rtol=1e-10, atol=1e-12)
    alpha, sigma = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(alpha / sigma, torch.exp(log_snr / 2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", [DDPMLinear(), Cosine()], ids=["ddpm_linear", "cosine"])
def test_variance_is_preserved(path):
    t = times(path)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


def test_ddpm_is_exact_at_its_thousand_points():
    i = torch.arange(1000)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    path = DDPMLinear()
    t = (i + 1).double() / 1000
    torch.testing.assert_close(path.alpha(t) ** 2, alpha_bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.c_noise(t), i.double(), rtol=1e-12, atol=1e-12)


def test_ddpm_spline_agrees_with_scipy():
    from scipy.interpolate import CubicSpline

    path = DDPMLinear()
    knots = torch.arange(1, 1001).double() / 1000
    spline = CubicSpline(knots.numpy(), path.log_snr(knots).numpy(), bc_type="not-a-knot")
    t = times(path, 12345)
    torch.testing.assert_close(path.log_snr(t), torch.from_numpy(spline(t.numpy())), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(path.d_log_snr(t), torch.from_numpy(spline(t.numpy(), 1)), rtol=1e-8, atol=1e-8)


def test_cosine_is_the_published_formula():
    t = times(Cosine())
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(
        Cosine().alpha(t) ** 2, f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-11, atol=1e-15
    )


def test_rectified_flow_ends_in_pure_noise():
    one = torch.ones((), dtype=torch.float64)
    path = RectifiedFlow()
    assert path.alpha(one) == 0
    assert path.sigma(one) == 1
    assert path.log_snr(one) == -math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlow(t_max=1.5), "t_max=1.5: must be at most 1"),
        (lambda: RectifiedFlow(t_min=0.0), "t_min=0.0: must be at least 1e-05"),
        (lambda: RectifiedFlow(t_min=0.5, t_max=0.4), "t_min=0.5: .*below t_max=0.4"),
        (lambda: DDPMLinear(t_min=1e-4), "t_min=0.0001: must be at least 0.001"),
        (lambda: DDPMLinear(beta_max=1.0), "beta_min=0.0001: .*beta_max=1.0 < 1"),
        (lambda: Cosine(s=0.0), "s=0.0: must be positive"),
        (lambda: Cosine(t_max=math.nan), "t_min=0.001: .*t_max=nan"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
