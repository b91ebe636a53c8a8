import math

import pytest
import torch
from diffusers import DDPMScheduler

from denoiselab.diffusion.paths import (
    BetaTable,
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    Laplace,
    RectifiedFlow,
    Shifted,
    Sigmoid,
    Trigonometric,
    VarianceExploding,
    VPLinear,
    ZeroTerminalSNR,
)

TABLES = {
    "ddpm_linear": DDPMLinear(),
    "ddpm_scaled_linear": DDPMScaledLinear(),
    "ddpm_cosine": DDPMCosine(),
    "ddpm_cosine_4000": DDPMCosine(steps=4000),
}
PRESERVING = {
    **TABLES,
    "vp_linear": VPLinear(),
    "vp_linear_1e-5": VPLinear(t_min=1e-5),
    "cosine": Cosine(),
    "sigmoid": Sigmoid(),
    "sigmoid_cold": Sigmoid(start=0.0, tau=0.1),
    "laplace": Laplace(),
    "laplace_moved": Laplace(mu=1.0, b=0.75),
    "trigonometric": Trigonometric(),
    "zero_snr": ZeroTerminalSNR(path=DDPMLinear()),
    "zero_snr_scaled": ZeroTerminalSNR(path=DDPMScaledLinear()),
    "cosine_noisier": Shifted(path=Cosine(), shift=4.0),
    "laplace_cleaner": Shifted(path=Laplace(), shift=0.5),
    "ddpm_linear_noisier": Shifted(path=DDPMLinear(), shift=4.0),
    "ddpm_linear_cleaner": Shifted(path=DDPMLinear(), shift=0.25),
    "trigonometric_noisier": Shifted(path=Trigonometric(), shift=3.0),
    "zero_snr_noisier": Shifted(path=ZeroTerminalSNR(path=DDPMLinear()), shift=2.0),
    "noisier_zero_snr": ZeroTerminalSNR(path=Shifted(path=DDPMLinear(), shift=2.0)),
}
ALL = {
    **PRESERVING,
    "rectified_flow": RectifiedFlow(),
    "rectified_flow_sd3": Shifted(path=RectifiedFlow(), shift=3.0),
    "rectified_flow_cleaner": Shifted(path=RectifiedFlow(), shift=0.2),
    "variance_exploding": VarianceExploding(),
    "variance_exploding_louder": Shifted(path=VarianceExploding(), shift=2.0, t_max=100.0),
}
# A table is inverted by Newton's method, which autograd does not follow to the last digit.
BY_NEWTON = ("ddpm_linear_noisier", "ddpm_linear_cleaner", "zero_snr_noisier", "noisier_zero_snr")
SMOOTH = {name: path for name, path in ALL.items() if name not in BY_NEWTON}
ENDS_IN_NOISE = [name for name, path in ALL.items() if path.alpha(torch.tensor(path.t_max).double()) == 0]

every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL)
every_table = pytest.mark.parametrize("path", TABLES.values(), ids=TABLES)
close = torch.testing.assert_close


def times(path, n=802):
    """Uniform, and crowded at both ends; an even number misses Laplace's kink in λ̇ at ½."""
    t = torch.linspace(path.t_min, path.t_max, n, dtype=torch.float64)
    near = torch.logspace(-6, -3, 20, dtype=torch.float64) * (path.t_max - path.t_min)
    return torch.cat([t, path.t_min + near, path.t_max - near]).unique()


@pytest.mark.parametrize("path", SMOOTH.values(), ids=SMOOTH)
def test_derivatives_agree_with_autograd(path):
    t = times(path).requires_grad_()
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(value(t).sum() + 0 * t.sum(), t)  # α = 1 of variance exploding knows no t
        inside = slice(None, -1 if path.alpha(t)[-1] == 0 else None)  # λ = −∞ at pure noise
        close(derivative(t)[inside], expected[inside], rtol=1e-9, atol=1e-11)


@every_path
def test_derivatives_agree_with_central_differences(path):
    """To second order in 1e-5 of the distance to the ends of the time axis, inside the intervals of a table."""
    t = path.t_min + (path.t_max - path.t_min) * (torch.arange(97).double() + 0.4321) / 97
    h = 1e-5 * torch.minimum(t, (1 - t).abs())
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        expected = (value(t + h) - value(t - h)) / (2 * h)
        close(derivative(t), expected, rtol=2e-6, atol=2e-6)


@every_path
def test_log_snr_falls_and_its_inverse_agrees(path):
    t = times(path)
    log_snr = path.log_snr(t)
    assert (log_snr.diff() < 0).all()
    close(path.log_snr(path.t_of_log_snr(log_snr)), log_snr, rtol=1e-9, atol=1e-11)
    close(path.t_of_log_snr(log_snr), t, rtol=1e-10, atol=1e-12)
    alpha, sigma = path.alpha(t), path.sigma(t)
    close(alpha / sigma, torch.exp(log_snr / 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PRESERVING.values(), ids=PRESERVING)
def test_variance_is_preserved(path):
    t = times(path)
    close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


@every_path
def test_everything_is_finite_on_the_closed_range_and_agrees_in_float32(path):
    t = torch.linspace(path.t_min, path.t_max, 101, dtype=torch.float32)
    single, double = path.coefficients(t), path.coefficients(t.double())
    for name, low, high in zip(double._fields, single, double, strict=True):
        assert low.dtype == torch.float32
        assert high.dtype == torch.float64
        assert low.shape == high.shape == t.shape
        assert high.isfinite().all(), name
        if not name.startswith("d_"):
            close(low.double(), high, rtol=0, atol=5e-5 * float(high.max()))
    assert (double.sigma > 0).all()
    assert path.c_noise(t).isfinite().all()


@every_path
def test_shape_of_t_is_kept(path):
    t = torch.tensor((path.t_min + path.t_max) / 2, dtype=torch.float64)
    for shape in ((), (1,), (2, 3)):
        assert all(value.shape == shape for value in path.coefficients(t.expand(shape)))
        assert path.t_of_log_snr(path.log_snr(t.expand(shape))).shape == shape


def test_which_paths_end_in_pure_noise():
    assert set(ENDS_IN_NOISE) == {
        *("trigonometric", "trigonometric_noisier", "zero_snr", "zero_snr_scaled", "zero_snr_noisier"),
        *("noisier_zero_snr", "rectified_flow", "rectified_flow_sd3", "rectified_flow_cleaner"),
    }
    one = torch.ones((), dtype=torch.float64)
    for name in ENDS_IN_NOISE:
        path = ALL[name]
        assert path.sigma(one) == pytest.approx(1, abs=1e-15)
        assert path.log_snr(one) == -math.inf
        assert path.t_of_log_snr(path.log_snr(one)) == 1
        assert path.d_alpha(one) < 0


@every_table
def test_a_table_is_exact_at_its_points(path):
    i = torch.arange(path.steps)
    f = torch.cos((torch.arange(path.steps + 1).double() / path.steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = {
        DDPMLinear: torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        DDPMScaledLinear: torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2,
        DDPMCosine: (1 - f[1:] / f[:-1]).clamp(max=0.999),
    }[type(path)]
    alpha_bar = (1 - betas).cumprod(0)
    t = (i + 1).double() / path.steps
    close(path.alpha(t) ** 2, alpha_bar, rtol=1e-10, atol=0)
    close(path.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-10, atol=0)
    close(path.c_noise(t), i.double() * (1000 / path.steps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patched", [True, False], ids=["in_float64", "as_shipped"])
@pytest.mark.parametrize(
    ("schedule", "ends", "path"),
    [
        ("linear", (1e-4, 0.02), DDPMLinear()),
        ("scaled_linear", (0.00085, 0.012), DDPMScaledLinear()),
        ("squaredcos_cap_v2", (1e-4, 0.02), DDPMCosine()),
    ],
)
def test_tables_are_those_of_diffusers(schedule, ends, path, patched, monkeypatch):
    if patched:
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.torch", Double())
    theirs = DDPMScheduler(beta_schedule=schedule, beta_start=ends[0], beta_end=ends[1]).betas.double()
    t = torch.arange(1, 1001).double() / 1000
    alpha_bar = torch.cat([torch.ones(1).double(), path.alpha(t) ** 2])
    close(1 - alpha_bar[1:] / alpha_bar[:-1], theirs, rtol=0, atol=1e-12 if patched else 1e-7)


class Double:
    """A torch whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@every_table
def test_the_spline_agrees_with_scipy(path):
    from scipy.interpolate import CubicSpline

    knots = torch.arange(1, path.steps + 1).double() / path.steps
    spline = CubicSpline(knots.numpy(), path.log_snr(knots).numpy(), bc_type="not-a-knot")
    t = torch.linspace(path.t_min, path.t_max, 12345, dtype=torch.float64)
    close(path.log_snr(t), torch.from_numpy(spline(t.numpy())), rtol=1e-10, atol=1e-10)
    close(path.d_log_snr(t), torch.from_numpy(spline(t.numpy(), 1)), rtol=1e-7, atol=1e-7)


@every_table
def test_a_table_goes_on_straight_beyond_its_ends(path):
    for end in (path.t_min, path.t_max):
        inside = torch.tensor(end, dtype=torch.float64)
        t = inside + math.copysign(1, end - 0.5) * torch.tensor([1e-4, 0.5, 3.0], dtype=torch.float64)
        expected = path.log_snr(inside) + path.d_log_snr(inside) * (t - inside)
        close(path.log_snr(t), expected, rtol=1e-12, atol=1e-12)
        close(path.d_log_snr(t), path.d_log_snr(inside).expand(3), rtol=1e-12, atol=0)
        close(path.t_of_log_snr(expected), t, rtol=1e-10, atol=1e-12)


def test_short_tables_work_too():
    path = BetaTable(betas=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), t_min=None, t_max=1.0)
    alpha_bar = torch.tensor([0.9, 0.72, 0.504, 0.3024], dtype=torch.float64)
    close(path.alpha(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)) ** 2, alpha_bar)
    assert path.t_min == 0.25


def test_continuous_paths_are_the_published_formulae():
    t = torch.linspace(1e-3, 0.999, 801, dtype=torch.float64)
    angle = (t + 0.008) / 1.008 * math.pi / 2
    close(Cosine().alpha(t) ** 2, angle.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-11, atol=1e-15)
    close(VPLinear().alpha(t), torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2), rtol=1e-12, atol=0)
    close(VPLinear().c_noise(t), 999 * t)
    for tau, start, end in ((1.0, -3, 3), (0.5, 0, 3), (1.1, 0, 3)):
        s = [
            1 / (1 + torch.exp(-torch.as_tensor(u / tau, dtype=torch.float64)))
            for u in (start, end, start + t * (end - start))
        ]
        path = Sigmoid(start=float(start), end=float(end), tau=tau)
        close(path.alpha(t) ** 2, (s[1] - s[2]) / (s[1] - s[0]), rtol=1e-11, atol=1e-15)
    expected = 0.3 - 0.7 * torch.sign(0.5 - t) * torch.log(1 - 2 * (t - 0.5).abs())
    close(Laplace(mu=0.3, b=0.7).log_snr(t), expected, rtol=1e-11, atol=1e-12)
    close(Trigonometric().alpha(t), torch.cos(t * math.pi / 2), rtol=1e-12, atol=1e-15)
    close(Trigonometric().sigma(t), torch.sin(t * math.pi / 2), rtol=1e-12, atol=0)


def test_uniform_times_give_laplace_distributed_log_snrs():
    law = torch.distributions.Laplace(torch.tensor(1.0, dtype=torch.float64), 0.5)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    close(law.cdf(Laplace(mu=1.0).log_snr(t)), 1 - t, rtol=1e-12, atol=1e-12)


def test_variance_exploding_is_edms():
    path = VarianceExploding()
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    assert torch.equal(path.sigma(sigma), sigma)
    assert torch.equal(path.alpha(sigma), torch.ones(3, dtype=torch.float64))
    close(path.c_noise(sigma), torch.log(0.5 * sigma))
    close(path.log_snr(sigma), -2 * sigma.log())
    assert (path.t_min, path.t_max) == (0.002, 80.0)


def test_rectified_flow_is_straight():
    t = torch.linspace(0.001, 1, 11, dtype=torch.float64)
    assert torch.equal(RectifiedFlow().alpha(t), 1 - t)
    assert torch.equal(RectifiedFlow().sigma(t), t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlow(t_max=1.5), "t_max=1.5: must be at most 1"),
        (lambda: RectifiedFlow(t_min=0.0), "t_min=0.0: must be at least 1e-05"),
        (lambda: RectifiedFlow(t_min=0.5, t_max=0.4), "t_min=0.5: .*below t_max=0.4"),
        (lambda: DDPMLinear(t_min=1e-4), "t_min=0.0001: must be at least 0.001"),
        (lambda: DDPMCosine(steps=4000, t_min=1e-4), "t_min=0.0001: must be at least 0.00025"),
        (lambda: DDPMLinear(beta_max=1.0), "beta_min=0.0001: .*beta_max=1.0 < 1"),
        (lambda: DDPMScaledLinear(beta_min=0.02), "beta_min=0.02: .*beta_max=0.012 < 1"),
        (lambda: DDPMScaledLinear(steps=3), "steps=3: must be at least 4"),
        (lambda: DDPMLinear(steps=-1), "steps=-1: must be at least 4"),
        (lambda: DDPMCosine(steps=0), "steps=0: must be at least 4"),
        (lambda: DDPMCosine(s=-1.0), "s=-1.0: must be positive"),
        (lambda: VPLinear(beta_min=0.0), "beta_min=0.0: .*0 < beta_min"),
        (lambda: VPLinear(beta_max=math.inf), "beta_max=inf < inf"),
        (lambda: Cosine(s=0.0), "s=0.0: must be positive"),
        (lambda: Cosine(t_max=math.nan), "t_min=0.001: .*t_max=nan"),
        (lambda: Sigmoid(t_max=1.0), "t_max=1.0: must be at most 0.99999"),
        (lambda: Sigmoid(start=3.0), "start=3.0: must be below end=3.0"),
        (lambda: Sigmoid(tau=0.0), "tau=0.0: must be positive"),
        (lambda: Sigmoid(tau=0.01), "tau=0.01: .*at least .end - start./100"),
        (lambda: Laplace(b=0.0), "b=0.0: must be positive"),
        (lambda: Laplace(t_max=1.0), "t_max=1.0: must be at most 0.999999999"),
        (lambda: VarianceExploding(t_max=1e5), "t_max=100000.0: must be at most 10000"),
        (lambda: VarianceExploding(t_min=0.0), "t_min=0.0: must be at least 1e-05"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
