import pytest
import torch
from exact import MIXTURE, PATHS, PREDICTIONS

from denoiselab.condition import Condition
from denoiselab.diffusion.coupling import Independent
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.objective import Objective
from denoiselab.diffusion.paths import RectifiedFlow
from denoiselab.diffusion.prediction import X0, Epsilon, Velocity, check_legal
from denoiselab.diffusion.time_sampling import LogitNormal, Uniform
from denoiselab.diffusion.weighting import MinSNR, Unit

GRID = [(p, q) for p in PATHS for q in PREDICTIONS]


@pytest.mark.parametrize(("path", "prediction"), GRID)
def test_the_pair_is_inverted_exactly(path, prediction):
    path, prediction = PATHS[path], PREDICTIONS[prediction]
    t = torch.linspace(path.t_min, path.t_max, 257, dtype=torch.float64)
    x0, eps = torch.randn(2, 257, 1, 2, 3, dtype=torch.float64)
    pair = prediction.pair(path, t)
    c = [v.reshape(-1, 1, 1, 1) for v in pair]
    x_t, output = c[0] * x0 + c[1] * eps, c[2] * x0 + c[3] * eps
    from denoiselab.diffusion.denoiser import NetworkDenoiser

    denoiser = NetworkDenoiser(network=lambda x, t, y: output, path=path, prediction=prediction)
    got = denoiser(x_t, t, Condition())
    # The gain max(α, σ)/|det| of rounding errors is allowed for; it is at most 1e3 on these ranges.
    gain = (torch.maximum(pair.alpha, pair.sigma) / pair.det.abs()).reshape(-1, 1, 1, 1).clamp(min=1)
    assert ((got.x0 - x0).abs() / gain).max() < 1e-12
    assert ((got.eps - eps).abs() / gain).max() < 1e-12
    assert (got.x0 - x0).abs().max() < 1e-10
    assert (got.eps - eps).abs().max() < 1e-10
    assert (c[0] * got.x0 + c[1] * got.eps - x_t).abs().max() < 1e-12


@pytest.mark.parametrize(("path", "prediction"), GRID)
def test_the_best_network_of_any_prediction_is_the_best_denoiser(path, prediction):
    path, prediction = PATHS[path], PREDICTIONS[prediction]
    x = torch.randn(64, 1, 1, 2, dtype=torch.float64)
    for fraction in (0.0, 0.3, 0.9, 1.0):
        t = torch.tensor(path.t_min + fraction * (path.t_max - path.t_min), dtype=torch.float64)
        got = MIXTURE.network_denoiser(path, prediction)(x, t, Condition())
        want = MIXTURE.denoiser(path)(x, t, Condition())
        # At the ends ε (or x0) of a given x_t is far from its typical size; compare relative to it.
        for g, w in zip(got, want, strict=True):
            assert ((g - w).abs() / w.abs().clamp(min=1)).max() < 1e-10


def test_velocity_is_the_time_derivative():
    for path in PATHS.values():
        t = torch.linspace(path.t_min, path.t_max, 33, dtype=torch.float64)[1:-1]
        a, b = Velocity().ab(path, t)
        h = 1e-7
        torch.testing.assert_close(a, (path.alpha(t + h) - path.alpha(t - h)) / (2 * h), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b, (path.sigma(t + h) - path.sigma(t - h)) / (2 * h), rtol=1e-5, atol=1e-5)


def test_illegal_pairs_are_refused_when_built():
    with pytest.raises(ValueError, match=r"prediction=epsilon: .* on RectifiedFlow at t=1; .*t_max=0.999"):
        check_legal(RectifiedFlow(), Epsilon())
    check_legal(RectifiedFlow(t_max=0.999), Epsilon())
    check_legal(RectifiedFlow(), Velocity())
    check_legal(RectifiedFlow(), X0())


def objective(**changes):
    parts = {
        "path": PATHS["cosine"],
        "prediction": Epsilon(),
        "time_sampling": Uniform(),
        "weighting": Unit(),
        "coupling": Independent(),
    }
    return Objective(**{**parts, **changes})


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("space", ["x0", "epsilon"])
def test_a_weight_in_another_space_weighs_the_error_there(prediction, space):
    path, prediction = PATHS["cosine"], PREDICTIONS[prediction]
    noise = NoiseSource(seed=0, index=torch.arange(16))
    x0 = torch.randn(16, 1, 4, 4, dtype=torch.float64)
    made = objective(path=path, prediction=prediction, weighting=Unit(space=space))
    network = lambda x, t, y: torch.sin(3 * x)  # noqa: E731
    loss, t = made(network, x0, Condition(), noise)
    eps = Independent()(x0, noise)
    x_t = path.alpha(t).reshape(-1, 1, 1, 1) * x0 + path.sigma(t).reshape(-1, 1, 1, 1) * eps
    guess = made.denoiser(network)(x_t, t, Condition())
    error = guess.x0 - x0 if space == "x0" else guess.eps - eps
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=1e-9, atol=1e-12)


def test_min_snr_is_the_papers_weight_on_epsilon():
    # Hang et al. 2023: min(SNR, γ)/SNR for a network that predicts ε.
    path, t = PATHS["cosine"], torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    snr = path.log_snr(t).exp()
    torch.testing.assert_close(MinSNR(gamma=5.0)(path, Epsilon(), t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(MinSNR(gamma=5.0)(path, X0(), t), snr.clamp(max=5))


@pytest.mark.parametrize("sampling", [Uniform(), LogitNormal(mean=0.5, std=0.8)], ids=["uniform", "logit_normal"])
def test_stratified_times_fill_every_slice_of_the_global_batch(sampling):
    path = RectifiedFlow()
    halves = [NoiseSource(seed=1, index=torch.arange(64)[part::2], total=64) for part in (0, 1)]
    whole = sampling(path, NoiseSource(seed=1, index=torch.arange(64), total=64))
    fraction = (whole - path.t_min) / (path.t_max - path.t_min)
    u = fraction if isinstance(sampling, Uniform) else torch.special.ndtr((torch.logit(fraction) - 0.5) / 0.8)
    assert torch.equal((u * 64).floor(), torch.arange(64).double())
    # Two ranks draw the same times as one.
    assert torch.equal(sampling(path, halves[0]), whole[0::2])
    assert torch.equal(sampling(path, halves[1]), whole[1::2])


def test_unstratified_times_have_the_right_law():
    t = LogitNormal(mean=-0.4, std=1.2, stratified=False)(
        RectifiedFlow(t_min=1e-5), NoiseSource(seed=0, index=torch.arange(20000))
    )
    logit = torch.logit((t - 1e-5) / (1 - 1e-5))
    assert abs(logit.mean() + 0.4) < 4 * 1.2 / 20000**0.5
    assert abs(logit.std() - 1.2) < 4 * 1.2 / 40000**0.5


def test_label_dropout_hides_the_asked_share_and_nothing_without_it():
    seen = []

    def network(x, t, condition):
        seen.append(condition.label)
        return x

    noise = NoiseSource(seed=0, index=torch.arange(4000))
    label = torch.arange(4000) % 10
    for share in (0.0, 0.25):
        objective(label_dropout=share)(network, torch.zeros(4000, 1, 1, 1), Condition(label=label), noise)
    assert torch.equal(seen[0], label)
    dropped = seen[1] == -1
    assert abs(dropped.double().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(seen[1][~dropped], label[~dropped])


def test_objective_ranges():
    with pytest.raises(ValueError, match=r"label_dropout=1.0: must be in \[0, 1\)"):
        objective(label_dropout=1.0)
    with pytest.raises(ValueError, match="std=0.0: must be positive"):
        LogitNormal(std=0.0)
    with pytest.raises(ValueError, match="gamma=0.0: must be positive"):
        MinSNR(gamma=0.0)
