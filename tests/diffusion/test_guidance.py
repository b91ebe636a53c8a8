import pytest
import torch
from exact import PATHS

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import NetworkDenoiser
from denoiselab.diffusion.guidance import ClassifierFree, unguided
from denoiselab.diffusion.paths import RectifiedFlow
from denoiselab.diffusion.prediction import V, Velocity


class Net:
    def __init__(self):
        self.calls = []

    def __call__(self, x, t, condition):
        self.calls.append(len(x))
        return torch.sin(x + condition.label.reshape(-1, 1, 1, 1)) + t.reshape(-1, 1, 1, 1) / 1000


def setup(path=PATHS["cosine"], prediction=None):
    net = Net()
    return net, NetworkDenoiser(network=net, path=path, prediction=prediction or V())


X = torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABEL = Condition(label=torch.tensor([0, 1, 2, 3, -1, 5]))
T = torch.tensor(0.4, dtype=torch.float64)


def test_guided_network_output_is_the_papers_combination():
    net, plain = setup()
    guided = ClassifierFree(plain, scale=2.5)(X, T, LABEL)
    assert net.calls == [12]  # one batched call
    conditional, unconditional = plain(X, T, LABEL), plain(X, T, LABEL.null())
    torch.testing.assert_close(guided.eps, unconditional.eps + 2.5 * (conditional.eps - unconditional.eps))
    torch.testing.assert_close(guided.x0, unconditional.x0 + 2.5 * (conditional.x0 - unconditional.x0))
    path = plain.path
    torch.testing.assert_close(path.alpha(T) * guided.x0 + path.sigma(T) * guided.eps, X)


@pytest.mark.parametrize(("scale", "condition"), [(1.0, LABEL), (0.0, LABEL.null())])
def test_scale_one_and_zero_cost_one_evaluation_and_are_exact(scale, condition):
    net, plain = setup()
    guided = ClassifierFree(plain, scale=scale)
    got = guided(X, T, LABEL)
    assert net.calls == [6]
    assert guided.evaluations(0.4) == 1
    want = plain(X, T, condition)
    assert torch.equal(got.x0, want.x0)
    assert torch.equal(got.eps, want.eps)


def test_outside_the_interval_the_conditional_model_is_asked_alone():
    net, plain = setup(RectifiedFlow(), Velocity())
    guided = ClassifierFree(plain, scale=3.0, sigma_min=0.5, sigma_max=2.0)
    for t, count in ((0.2, 6), (0.5, 12), (0.9, 6), (1.0, 6)):
        net.calls.clear()
        guided(X, torch.tensor(t, dtype=torch.float64), LABEL)
        assert net.calls == [count]
        assert guided.evaluations(t) == count // 6


def test_times_may_differ_within_a_batch():
    _, plain = setup(RectifiedFlow(), Velocity())
    guided = ClassifierFree(plain, scale=3.0, sigma_max=1.0)
    t = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 0.99], dtype=torch.float64)
    together = guided(X, t, LABEL)
    for i in range(6):
        alone = guided(X[i : i + 1], t[i], Condition(label=LABEL.label[i : i + 1]))
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps)


def test_guidance_composes_and_none_is_the_denoiser_itself():
    _, plain = setup()
    assert unguided(plain) is plain
    twice = ClassifierFree(ClassifierFree(plain, scale=2.0), scale=1.5)
    assert twice.evaluations(0.4) == 4
    assert twice(X, T, LABEL).x0.shape == X.shape


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": -1.0}, "scale=-1.0: must be at least 0"),
        ({"scale": 2.0, "sigma_min": -0.1}, "sigma_min=-0.1: must be at least 0"),
        ({"scale": 2.0, "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max=1.0: must be above sigma_min=2.0"),
    ],
)
def test_ranges_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFree(setup()[1], **kwargs)
