import pytest
import torch
from exact import MIXTURE, PATHS, PREDICTIONS, network_denoiser

from denoiselab.condition import Condition
from denoiselab.diffusion.paths import RectifiedFlow
from denoiselab.diffusion.prediction import X0, Epsilon, Velocity, check_legal

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
        got = network_denoiser(MIXTURE, path, prediction)(x, t, Condition())
        want = MIXTURE.denoiser(path)(x, t, Condition())
        # At the ends ε (or x0) of a given x_t is far from its typical size; compare relative to it.
        for g, w in ((got.x0, want.x0), (got.eps, want.eps)):
            assert ((g - w).abs() / w.abs().clamp(min=1)).max() < 1e-10


def test_velocity_is_the_time_derivative():
    for path in PATHS.values():
        t = torch.linspace(path.t_min, path.t_max, 33, dtype=torch.float64)[1:-1]
        a, b = Velocity().ab(path.coefficients(t))
        h = 1e-7
        torch.testing.assert_close(a, (path.alpha(t + h) - path.alpha(t - h)) / (2 * h), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b, (path.sigma(t + h) - path.sigma(t - h)) / (2 * h), rtol=1e-5, atol=1e-5)


def test_illegal_pairs_are_refused_when_built():
    with pytest.raises(ValueError, match=r"prediction=epsilon: .* on RectifiedFlow at t=1; .*t_max=0.999"):
        check_legal(RectifiedFlow(), Epsilon())
    check_legal(RectifiedFlow(t_max=0.999), Epsilon())
    check_legal(RectifiedFlow(), Velocity())
    check_legal(RectifiedFlow(), X0())
