import pytest
import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.coupling import Independent, MinibatchOT
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.objective import Objective
from denoiselab.diffusion.paths import Cosine, DDPMLinear, RectifiedFlow
from denoiselab.diffusion.prediction import X0, Epsilon, V, Velocity
from denoiselab.diffusion.time_sampling import LossImportance, Uniform
from denoiselab.diffusion.variance import variational_bound
from denoiselab.diffusion.weighting import LearnedUncertainty, MinSNR, Unit

NOISE = NoiseSource(seed=0, index=torch.arange(16))


def objective(**changes):
    parts = {
        "path": Cosine(),
        "prediction": Epsilon(),
        "time_sampling": Uniform(),
        "weighting": Unit(),
        "coupling": Independent(),
    }
    return Objective(**{**parts, **changes})


def images(dtype=torch.float64):
    return NOISE.normal("images", (1, 4, 4), dtype) / 3


@pytest.mark.parametrize("prediction", [Epsilon(), X0(), V(), Velocity()], ids=["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("space", ["x0", "epsilon"])
def test_a_weight_in_another_space_weighs_the_error_there(prediction, space):
    path, x0 = Cosine(), images()
    made = objective(path=path, prediction=prediction, weighting=Unit(space=space))
    network = lambda x, t, y: torch.sin(3 * x)  # noqa: E731
    loss, t = made(network, x0, Condition(), NOISE)
    eps = Independent()(x0, NOISE, Condition())
    x_t = path.alpha(t).reshape(-1, 1, 1, 1) * x0 + path.sigma(t).reshape(-1, 1, 1, 1) * eps
    guess = made.denoiser(network)(x_t, t, Condition())
    error = guess.x0 - x0 if space == "x0" else guess.eps - eps
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=1e-9, atol=1e-12)


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


def test_the_coupling_decides_which_noise_an_image_gets():
    x0, seen = images(), []

    def network(x, t, condition):
        seen.append(x)
        return x

    for coupling in (Independent(), MinibatchOT(group_size=16)):
        made = objective(path=RectifiedFlow(), prediction=Velocity(), coupling=coupling)
        _, t = made(network, x0, Condition(), NOISE)
        t = t.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(seen[-1], (1 - t) * x0 + t * coupling(x0, NOISE, Condition()))
    assert not torch.equal(*seen)


class TwoHalves(torch.nn.Module):
    """A network with one weight for each half of its output."""

    def __init__(self):
        super().__init__()
        self.mean, self.raw = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.3, 0.1))

    def forward(self, x, t, condition):
        return torch.cat([self.mean * x, self.raw + 0 * x], dim=1)


def hybrid(**changes):
    made = objective(path=DDPMLinear(), learned_variance=True, **changes)
    network, x0 = TwoHalves(), (images() * 127.5).round() / 127.5
    loss, t = made(network, x0, Condition(), NOISE)
    return made, network, x0, loss, t


def test_the_hybrid_loss_is_the_simple_loss_and_the_bound():
    made, network, x0, loss, t = hybrid(vlb_weight=0.002, vlb_steps=500)
    simple = objective(path=DDPMLinear())(lambda x, t, y: network.mean * x, x0, Condition(), NOISE).loss
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (made.path.alpha(t), made.path.sigma(t)))
    x_t = alpha * x0 + sigma * Independent()(x0, NOISE, Condition())
    posterior = made.denoiser(network)(x_t, t, Condition())
    torch.testing.assert_close(posterior.share, torch.full_like(x0, 0.55))
    bound = variational_bound(made.path, t, x0, posterior.x0, posterior.share, 500)
    torch.testing.assert_close(loss, simple + 0.002 * 500 * bound, rtol=1e-9, atol=0)


def test_the_bound_trains_the_variance_alone():
    _, network, _, without, _ = hybrid(vlb_weight=0.0)
    without.mean().backward()
    assert network.raw.grad == 0
    mean_alone = network.mean.grad.clone()
    _, network, _, loss, _ = hybrid()
    loss.mean().backward()
    assert network.mean.grad == mean_alone
    assert network.raw.grad != 0


def test_importance_weighs_the_loss_and_is_told_of_it():
    x0, network = images(), lambda x, t, y: 0 * x
    law = LossImportance(bins=2)
    made = objective(time_sampling=law, prediction=X0())
    assert made.observes
    assert not objective().observes
    path = made.path
    t = path.t_min + (path.t_max - path.t_min) * torch.tensor([0.2, 0.8], dtype=torch.float64).repeat(10)
    made.observe(t, torch.tensor([1.0, 3.0]).repeat(10))
    torch.testing.assert_close(law.probabilities(), torch.tensor([0.25, 0.75]).double(), rtol=2e-3, atol=0)
    loss, t = made(network, x0, Condition(), NOISE)
    plain = x0.square().flatten(1).mean(1)
    torch.testing.assert_close(loss, plain * law.weight(path, t))
    made.observe(t[::2], loss[::2])
    seen = torch.cat([ring[ring < 1] for ring in law.losses])
    torch.testing.assert_close(seen.sort().values, plain[::2].sort().values)  # without the weight


def test_what_an_objective_learns_is_its_state():
    made = objective(time_sampling=LossImportance(bins=3), weighting=LearnedUncertainty(over=Unit(), channels=4))
    assert set(made.state_dict()) == {
        "time_sampling.losses",
        "time_sampling.count",
        "weighting.linear",
        "weighting.frequency",
        "weighting.phase",
    }
    assert [name for name, _ in made.named_parameters()] == ["weighting.linear"]
    assert not objective(weighting=MinSNR()).state_dict()


def test_ranges():
    for changes, message in (
        ({"label_dropout": 1.0}, r"label_dropout=1.0: must be in \[0, 1\)"),
        ({"vlb_weight": -0.1}, "vlb_weight=-0.1: must be at least 0"),
        ({"vlb_steps": 1}, "vlb_steps=1: must be at least 2"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            objective(**changes)
