import math
from collections import deque

import pytest
import torch

from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, RectifiedFlow, Trigonometric, VarianceExploding
from denoiselab.diffusion.time_sampling import (
    Beta,
    CosMap,
    LogitNormal,
    LogNormalSigma,
    LossImportance,
    Mode,
    Uniform,
)

U = torch.linspace(0, 1, 1003, dtype=torch.float64)[1:-1]
LAWS = {
    "uniform": Uniform(),
    "logit_normal": LogitNormal(mean=0.5, std=0.8),
    "mode": Mode(),
    "cosmap": CosMap(),
    "beta": Beta(alpha=1.5, beta=1.0),
    "log_normal_sigma": LogNormalSigma(),
    "loss_importance": LossImportance(bins=5),
}


def logit_normal_density(t, mean, std):
    """Esser et al. 2024, eq. 19."""
    return (-((torch.logit(t) - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi) * t * (1 - t))


DENSITIES = {
    "logit_normal": (LogitNormal(), lambda t: logit_normal_density(t, 0.0, 1.0)),
    "logit_normal_shifted": (LogitNormal(mean=-0.4, std=1.2), lambda t: logit_normal_density(t, -0.4, 1.2)),
    # Esser et al. 2024, below eq. 21
    "cosmap": (CosMap(), lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)),
}


@pytest.mark.parametrize(("law", "density"), DENSITIES.values(), ids=DENSITIES.keys())
def test_the_law_has_the_density_of_its_paper(law, density):
    u = U.clone().requires_grad_()
    t = law.quantile(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(density(t.detach()) * slope, torch.ones_like(u), rtol=1e-9, atol=0)


def test_beta_has_the_density_of_beta():
    law, density = Beta(alpha=1.5, beta=2.5), torch.distributions.Beta(torch.tensor(1.5).double(), 2.5)
    h = 1e-5
    slope = (law.quantile(U + h) - law.quantile(U - h)) / (2 * h)
    inner = slice(20, -20)  # where the quantile is smooth on the scale of h
    product = density.log_prob(law.quantile(U)).exp() * slope
    torch.testing.assert_close(product[inner], torch.ones_like(U)[inner], rtol=1e-5, atol=0)
    # Beta(a, 1) is known outright: the CDF is t^a.
    torch.testing.assert_close(Beta(alpha=1.5, beta=1.0).quantile(U), U ** (1 / 1.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_is_equation_20_and_rises_on_its_whole_range(scale):
    law = Mode(scale=scale)
    v = 1 - U  # their u runs the other way
    torch.testing.assert_close(law.quantile(U), 1 - v - scale * ((math.pi / 2 * v).cos() ** 2 - 1 + v))
    assert (law.quantile(U).diff() > 0).all()
    ends = law.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_cosmap_gives_the_straight_path_the_noise_levels_of_the_cosine():
    path, cosine = RectifiedFlow(t_min=1e-5), Trigonometric(t_min=1e-5)
    torch.testing.assert_close(path.log_snr(CosMap().quantile(U)), cosine.log_snr(U))


def test_log_normal_sigma_is_the_truncated_normal_of_edm():
    path = VarianceExploding()
    log_sigma = LogNormalSigma().times(path, U).log()
    low, high = (torch.special.ndtr(torch.tensor((math.log(t) + 1.2) / 1.2).double()) for t in (0.002, 80))
    torch.testing.assert_close(torch.special.ndtr((log_sigma + 1.2) / 1.2), low + (high - low) * U)
    # On EDM's range next to nothing is cut off: P_mean and P_std are those of table 1.
    fine = LogNormalSigma().times(path, (torch.arange(20000).double() + 0.5) / 20000).log()
    assert abs(fine.mean() + 1.2) < 1e-3
    assert abs(fine.std() - 1.2) < 2e-3
    # On a narrow range much is: the ends are still reached and not passed.
    narrow = VarianceExploding(t_min=0.2, t_max=0.4)
    t = LogNormalSigma().times(narrow, torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64))
    torch.testing.assert_close(t, torch.tensor([0.2, 0.4], dtype=torch.float64))


@pytest.mark.parametrize("path", [Cosine(), RectifiedFlow()], ids=["cosine", "rectified_flow"])
def test_log_normal_sigma_means_the_same_noise_levels_on_every_path(path):
    ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    low, high = torch.special.ndtr((-path.log_snr(ends) / 2 + 0.4) / 1.0)  # pure noise: probability 1
    t = LogNormalSigma(mean=-0.4, std=1.0).times(path, U)
    torch.testing.assert_close(torch.special.ndtr(-path.log_snr(t) / 2 + 0.4), low + (high - low) * U)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), VarianceExploding()], ids=["flow", "cosine", "ve"])
def test_every_law_rises_within_the_range_of_every_path(law, path):
    edges = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)  # what the noise source can give at most
    t = law.times(path, torch.cat([edges[:1], U, edges[1:]]))
    assert t.isfinite().all()
    assert path.t_min <= t.min() <= t.max() <= path.t_max
    assert (t.diff() > 0).all()
    if not law.observes:
        assert torch.equal(law.weight(path, t), torch.ones_like(t))


@pytest.mark.parametrize("sampling", LAWS.values(), ids=LAWS.keys())
def test_stratified_times_fill_every_slice_of_the_global_batch(sampling):
    path = RectifiedFlow()
    halves = [NoiseSource(seed=1, index=torch.arange(64)[part::2], total=64) for part in (0, 1)]
    whole = sampling(path, NoiseSource(seed=1, index=torch.arange(64), total=64))
    edges = torch.arange(65).double() / 64
    edges = sampling.times(path, edges.clamp(1e-12, 1 - 1e-12))
    assert ((edges[:-1] <= whole) & (whole <= edges[1:])).all()
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


def test_ranges():
    for law, message in (
        (lambda: LogitNormal(std=0.0), "std=0.0: must be positive"),
        (lambda: LogNormalSigma(std=-1.0), "std=-1.0: must be positive"),
        (lambda: Mode(scale=-1.01), r"scale=-1.01: must be in \[-1, "),
        (lambda: Mode(scale=1.76), r"scale=1.76: must be in .*1.7519"),
        (lambda: Beta(alpha=0.0, beta=1.0), "alpha=0.0: must be positive"),
        (lambda: Beta(alpha=1.0, beta=-1.0), "beta=-1.0: must be positive"),
        (lambda: LossImportance(bins=0), "bins=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            law()


def batch_of_losses(step, count=12):
    """Times and losses that are small near the data and large near noise, with a spread."""
    noise = NoiseSource(seed=3, index=torch.arange(count), step=step)
    t = 0.001 + 0.999 * noise.uniform("t")
    return t, (0.1 + t) * noise.uniform("loss")


def taught(bins=4, steps=12):
    law, path = LossImportance(bins=bins), RectifiedFlow()
    for step in range(steps):
        t, loss = batch_of_losses(step)
        law.observe(path, t, loss * law.weight(path, t))
    return law, path


def test_importance_follows_the_last_ten_losses_of_each_bin():
    law, path = LossImportance(bins=4), RectifiedFlow()
    kept, was_ready = [deque(maxlen=10) for _ in range(4)], []
    for step in range(12):
        t, loss = batch_of_losses(step, count=40 if step == 7 else 12)  # 40: more than ten for some bin at once
        law.observe(path, t, loss * law.weight(path, t))
        for each, value in zip(t.tolist(), loss.tolist(), strict=True):
            kept[int((each - 0.001) / 0.999 * 4)].append(value)
        size = torch.tensor([math.sqrt(sum(v * v for v in k) / 10) for k in kept]).double()
        ready = all(len(k) == 10 for k in kept)
        want = 0.999 * size / size.sum() + 0.001 / 4 if ready else torch.full((4,), 0.25).double()
        torch.testing.assert_close(law.probabilities(), want)
        was_ready.append(ready)
    assert set(was_ready[:7]) == {False, True}
    for ring, values in zip(law.losses, kept, strict=True):
        torch.testing.assert_close(ring.sort().values, torch.tensor(sorted(values)).double())


def test_importance_draws_each_bin_as_often_as_it_says():
    law, path = taught()
    p = law.probabilities()
    assert p[3] > 3 * p[0]
    t = law.times(path, (torch.arange(100_000).double() + 0.5) / 100_000)
    drawn = torch.bincount(((t - 0.001) / 0.999 * 4).long(), minlength=4) / 100_000
    torch.testing.assert_close(drawn.double(), p, rtol=0, atol=2e-5)
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double())


def test_importance_keeps_the_mean_loss():
    law, path = taught()
    nodes, weights = (torch.tensor(v).double() for v in ([-1, 0, 1], [5, 8, 5]))  # Gauss-Legendre, three points
    nodes, weights = nodes * math.sqrt(3 / 5) / 2 + 0.5, weights / 18
    p = law.probabilities()
    u = (p.cumsum(0) - p)[:, None] + p[:, None] * nodes  # within each bin the inverse CDF is linear
    t = law.times(path, u.flatten())
    f = 3 * t**5 - t**2 + 0.7  # a polynomial, so that the quadrature is exact
    mean = ((law.weight(path, t) * f).reshape(4, 3) * weights * p[:, None]).sum()
    a, b = path.t_min, path.t_max
    want = ((b**6 - a**6) / 2 - (b**3 - a**3) / 3) / (b - a) + 0.7
    assert abs(mean - want) < 1e-12
    unweighted = (f.reshape(4, 3) * weights * p[:, None]).sum()
    assert abs(unweighted - want) > 0.05


def test_importance_is_saved_and_restored():
    law, path = taught()
    state = {key: value.clone() for key, value in law.state_dict().items()}
    again = LossImportance(bins=4)
    again.load_state_dict(state)
    noise = NoiseSource(seed=0, index=torch.arange(32))
    assert torch.equal(again(path, noise), law(path, noise))
    assert not torch.equal(LossImportance(bins=4)(path, noise), law(path, noise))


def test_importance_survives_what_is_not_finite():
    law, path = taught()
    before = law.probabilities()
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    law.observe(path, t, torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(law.probabilities(), before)
    silent = LossImportance(bins=1)
    silent.observe(path, torch.full((10,), 0.5).double(), torch.zeros(10))
    assert silent.weight(path, t).isfinite().all()
