import pytest
import torch

from denoiselab.diffusion.paths import (
    Cosine,
    DDPMLinear,
    Laplace,
    RectifiedFlow,
    Trigonometric,
    VarianceExploding,
    VPLinear,
    ZeroTerminalSNR,
)
from denoiselab.diffusion.paths import (
    Sigmoid as SigmoidPath,
)
from denoiselab.diffusion.prediction import EDM, X0, Epsilon, V, Velocity
from denoiselab.diffusion.weighting import P2, EDMWeight, LearnedUncertainty, MinSNR, Sigmoid, SoftMinSNR, Unit

VARIANCE_PRESERVING = {
    "ddpm_linear": DDPMLinear(),
    "vp_linear": VPLinear(),
    "cosine": Cosine(),
    "sigmoid": SigmoidPath(),
    "laplace": Laplace(),
    "trigonometric": Trigonometric(t_max=0.999),
}
PATHS = {**VARIANCE_PRESERVING, "rectified_flow": RectifiedFlow(t_max=0.999), "ve": VarianceExploding()}


def times(path, n=201):
    return torch.linspace(path.t_min, path.t_max, n, dtype=torch.float64)


def snr_of(path, t):
    return (path.alpha(t) / path.sigma(t)) ** 2


@pytest.mark.parametrize("path", VARIANCE_PRESERVING.values(), ids=VARIANCE_PRESERVING.keys())
def test_min_snr_in_its_three_forms(path):
    # Hang et al. 2023, section 3.4: min(SNR, γ) for x0, min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v.
    t = times(path)
    snr, weighting = snr_of(path, t), MinSNR(gamma=5.0)
    torch.testing.assert_close(weighting(path, X0(), t), snr.clamp(max=5), rtol=1e-9, atol=0)
    torch.testing.assert_close(weighting(path, Epsilon(), t), snr.clamp(max=5) / snr, rtol=1e-9, atol=0)
    torch.testing.assert_close(weighting(path, V(), t), snr.clamp(max=5) / (snr + 1), rtol=1e-9, atol=0)


def test_min_snr_of_v_is_another_function_where_variance_is_not_preserved():
    path = RectifiedFlow(t_max=0.999)
    t = times(path)
    snr, got = snr_of(path, t), MinSNR(gamma=5.0)(path, V(), t)
    # det = α² + σ² is not 1: the error in x0 is σ/(α² + σ²) times that in v.
    want = snr.clamp(max=5) * (path.sigma(t) / (path.alpha(t) ** 2 + path.sigma(t) ** 2)) ** 2
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    on_vp = snr.clamp(max=5) / (snr + 1)
    assert (got / on_vp).max() > 1.9  # at t = 1/2, α² + σ² = 1/2
    # And the velocity of the straight path, F = ε − x0, has det = 1.
    torch.testing.assert_close(MinSNR(gamma=5.0)(path, Velocity(), t), snr.clamp(max=5) * t**2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_soft_min_snr_is_min_snr_without_its_corner(path):
    t = times(path)
    snr, got = snr_of(path, t), SoftMinSNR(gamma=4.0)(path, X0(), t)
    torch.testing.assert_close(got, 4 * snr / (snr + 4), rtol=1e-9, atol=0)
    # Crowson et al. 2024 state it for an EDM network with σ_d = 1/2, where it is 1/(σ² + σ_d²) on x0.
    ratio = path.sigma(t) / path.alpha(t)
    torch.testing.assert_close(got, 1 / (ratio**2 + 0.25), rtol=1e-9, atol=0)
    assert (got <= MinSNR(gamma=4.0)(path, X0(), t) * (1 + 1e-9)).all()
    assert (got >= MinSNR(gamma=4.0)(path, X0(), t) / 2 * (1 - 1e-9)).all()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_p2_on_epsilon(path):
    t = times(path)
    snr = snr_of(path, t)
    torch.testing.assert_close(P2(k=2.0, gamma=0.5)(path, Epsilon(), t), (2 + snr) ** -0.5, rtol=1e-9, atol=0)
    torch.testing.assert_close(P2(gamma=0.0)(path, Epsilon(), t), torch.ones_like(t))
    # With the defaults, 1/(1 + SNR) is σ² on variance preserving paths.
    if path in VARIANCE_PRESERVING.values():
        torch.testing.assert_close(P2()(path, Epsilon(), t), path.sigma(t) ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_sigmoid_is_the_weighted_bound(path):
    t = times(path)[1:-1].requires_grad_()
    log_snr = path.log_snr(t)
    (slope,) = torch.autograd.grad(log_snr.sum(), t)
    t, log_snr = t.detach(), log_snr.detach()
    want = torch.sigmoid(1.5 - log_snr) * -slope / 2
    torch.testing.assert_close(Sigmoid(bias=1.5)(path, Epsilon(), t), want, rtol=1e-7, atol=0)
    # Hoogeboom et al. 2024 write it on x0: ½·(−dλ/dt)·e^b·sigmoid(λ − b).
    want = -slope / 2 * torch.exp(torch.tensor(1.5)) * torch.sigmoid(log_snr - 1.5)
    torch.testing.assert_close(Sigmoid(bias=1.5)(path, X0(), t), want, rtol=1e-7, atol=0)


PURE_NOISE = {"rectified_flow": (RectifiedFlow(), Velocity()), "zero_snr": (ZeroTerminalSNR(path=DDPMLinear()), V())}


@pytest.mark.parametrize(
    "weighting", [MinSNR(), SoftMinSNR(), P2(), Sigmoid(), EDMWeight(), Unit(space="x0")], ids=repr
)
@pytest.mark.parametrize(("path", "prediction"), PURE_NOISE.values(), ids=PURE_NOISE.keys())
def test_weights_are_finite_and_continuous_up_to_pure_noise(weighting, path, prediction):
    t = torch.tensor([1 - 1e-9, 1.0], dtype=torch.float64)
    assert path.alpha(t[1]) == 0
    near, at = weighting(path, prediction, t)
    assert at.isfinite()
    assert at >= 0
    assert abs(near - at) < 1e-4 * (1 + at)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_edm_weighs_its_network_by_exactly_one(path, sigma_data):
    t = times(path)
    got = EDMWeight(sigma_data=sigma_data)(path, EDM(sigma_data=sigma_data), t)
    assert (got - 1).abs().max() < 1e-12
    # Table 1 states it on x0.
    ratio = path.sigma(t) / path.alpha(t)
    want = (ratio**2 + sigma_data**2) / (ratio * sigma_data) ** 2
    torch.testing.assert_close(EDMWeight(sigma_data=sigma_data)(path, X0(), t), want, rtol=1e-9, atol=0)


def test_learned_uncertainty_starts_as_what_it_weighs():
    path, t, error = Cosine(), times(Cosine()), torch.rand(201)
    learned, plain = LearnedUncertainty(over=MinSNR()), MinSNR()
    torch.testing.assert_close(learned.loss(error, path, V(), t), plain.loss(error, path, V(), t))
    again = LearnedUncertainty(over=MinSNR())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in learned.state_dict().items())


def test_the_features_of_the_uncertainty_have_unit_magnitude():
    learned, path = LearnedUncertainty(over=Unit(), channels=4096), VarianceExploding()
    for t in times(path, 5):
        (slope,) = torch.autograd.grad(learned.log_uncertainty(path, t[None]).sum(), learned.linear)
        assert abs(slope.square().sum() - 1) < 4 / (2 * 4096) ** 0.5  # each is √2·cos of a phase of its own


def test_learned_uncertainty_learns_the_logarithm_of_the_expected_loss():
    path, prediction = VarianceExploding(), EDM()
    learned = LearnedUncertainty(over=EDMWeight(sigma_data=0.5))
    noise_level = torch.linspace(-4, 2, 64, dtype=torch.float64)
    t = noise_level.exp()
    expected = (0.2 + torch.sigmoid(noise_level)).float()
    # Losses are spread about their expectation: the optimum follows the mean, not the mean of the logarithm (0.29 less).
    losses = torch.cat([0.2 * expected, 1.8 * expected])
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = learned.loss(losses, path, prediction, t.repeat(2)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    u = learned.log_uncertainty(path, t).detach()
    assert (u - expected.log()).abs().max() < 0.02
    # There all levels pull equally: the weight is one over the expectation.
    torch.testing.assert_close(
        learned(path, prediction, t).detach().float() * expected, torch.ones(64), rtol=0.02, atol=0
    )


def test_learned_uncertainty_is_finite_at_pure_noise():
    learned = LearnedUncertainty(over=Unit())
    loss = learned.loss(torch.ones(2), RectifiedFlow(), Velocity(), torch.tensor([0.5, 1.0], dtype=torch.float64))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert learned.linear.grad.isfinite().all()


def test_ranges():
    for make, message in (
        (lambda: MinSNR(gamma=0.0), "gamma=0.0: must be positive"),
        (lambda: SoftMinSNR(gamma=-1.0), "gamma=-1.0: must be positive"),
        (lambda: P2(k=0.0), "k=0.0: must be positive"),
        (lambda: P2(gamma=-1.0), "gamma=-1.0: must be at least 0"),
        (lambda: EDMWeight(sigma_data=0.0), "sigma_data=0.0: must be positive"),
        (lambda: LearnedUncertainty(over=Unit(), channels=0), "channels=0: must be from 1 to 65536"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make()
