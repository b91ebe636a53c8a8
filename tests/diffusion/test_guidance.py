import inspect
import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from exact import PATHS

from denoiselab.condition import Condition
from denoiselab.diffusion import guidance
from denoiselab.diffusion.denoiser import NetworkDenoiser, Posterior
from denoiselab.diffusion.exact import Mixture
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.guidance import (
    APG,
    Autoguidance,
    CFGPlusPlus,
    ClassifierFree,
    Contrast,
    DynamicThreshold,
    Guidance,
    Rescale,
    chain,
    unguided,
)
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, RectifiedFlow, Trigonometric, VarianceExploding, VPLinear
from denoiselab.diffusion.prediction import X0, V, Velocity
from denoiselab.diffusion.samplers import DDIM, Euler, Heun


class Net:
    def __init__(self):
        self.calls = []

    def __call__(self, x, t, condition):
        self.calls.append(len(x))
        return torch.sin(x + condition.label.reshape(-1, 1, 1, 1)) + t.reshape(-1, 1, 1, 1) / 1000


def setup(path=PATHS["cosine"], prediction=None, network=None):
    net = network or Net()
    return net, NetworkDenoiser(network=net, path=path, prediction=prediction or V())


class Classes:
    """The exact denoiser of Gaussian classes; without a label, of their mixture."""

    consistent = True

    def __init__(self, path, means=((1.0, -0.5), (-1.2, 0.4)), stds=(0.3, 0.6)):
        self.path, self.calls = path, 0
        self.all = Mixture([1 / len(means)] * len(means), means, stds)
        self.each = [Mixture([1.0], [mean], [std]) for mean, std in zip(means, stds, strict=True)]

    def __call__(self, x, t, condition):
        self.calls += 1
        times = t.expand(len(x))
        rows = [
            (self.all if label < 0 else self.each[label]).denoiser(self.path)(x[i : i + 1], times[i], Condition())
            for i, label in enumerate(condition.label.tolist())
        ]
        return Posterior(torch.cat([row.x0 for row in rows]), torch.cat([row.eps for row in rows]))

    def evaluations(self, t):
        return 1

    def fresh(self):
        return self

    def score(self, mixture, x, t):
        """∇ ln p(x_t) of a density, by automatic differentiation."""
        x = x.flatten(1).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mixture.log_prob(x, self.path.alpha(t), self.path.sigma(t)).sum(), x)
        return gradient.reshape(len(x), 2, 1, 1)


class Fixed(Classes):
    """Says the same for a label wherever it is asked: x0 by label, two numbers each."""

    def __init__(self, x0):
        super().__init__(Cosine())
        self.x0 = x0

    def __call__(self, x, t, condition):
        x0 = time([self.x0[label] for label in condition.label.tolist()]).reshape(-1, 2, 1, 1)
        return Posterior(x0, (x - self.path.alpha(t) * x0) / self.path.sigma(t))


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def time(t):
    return torch.tensor(t, dtype=torch.float64)


def per_image(t):
    return t.reshape(-1, 1, 1, 1) if t.ndim else t


X = normal(6, 1, 2, 2)
WIDE = normal(6, 2, 4, 4)
LABEL = Condition(label=torch.tensor([0, 1, 2, 3, -1, 5]))
T = time(0.4)
MANY = time([0.1, 0.3, 0.5, 0.6, 0.8, 0.99])


def smaller_guide(path=None):
    return setup(path or Cosine(), network=lambda x, t, condition: 0.8 * torch.tanh(x - 0.1 * per_image(t) / 1000))[1]


GUIDANCES = {
    "none": unguided,
    "cfg": lambda d: ClassifierFree(d, scale=2.5),
    "cfg_interval": lambda d: ClassifierFree(d, scale=2.5, sigma_min=0.3, sigma_max=2.0),
    "cfg_0": lambda d: ClassifierFree(d, scale=0.0, sigma_max=1.0),
    "apg": lambda d: APG(d, scale=4.0, norm_threshold=1.5, momentum=-0.5, eta=0.3),
    "apg_interval": lambda d: APG(d, scale=4.0, sigma_min=0.3, sigma_max=2.0),
    "autoguidance": lambda d: Autoguidance(d, scale=2.0, guide=smaller_guide()),
    "autoguidance_interval": lambda d: Autoguidance(d, scale=2.0, guide=smaller_guide(), sigma_min=0.3, sigma_max=2.0),
    "autoguidance_elsewhere": lambda d: Autoguidance(d, scale=2.0, guide=smaller_guide(VarianceExploding())),
    "rescaled_cfg": lambda d: Rescale(ClassifierFree(d, scale=2.5, sigma_max=2.0), phi=0.7),
    "rescaled_apg": lambda d: Rescale(APG(d, scale=2.5), phi=0.7),
    "threshold": lambda d: DynamicThreshold(d, percentile=0.9),
    "threshold_over_cfg": lambda d: DynamicThreshold(ClassifierFree(d, scale=4.0), percentile=0.9),
    "cfg_over_threshold": lambda d: ClassifierFree(DynamicThreshold(d, percentile=0.9), scale=2.5),
    "autoguided_cfg": lambda d: Autoguidance(ClassifierFree(d, scale=1.5), scale=2.0, guide=smaller_guide()),
    "cfg_pp": lambda d: CFGPlusPlus(d, scale=0.6, sigma_min=0.3, sigma_max=2.0),
}


# --- what holds for all of them ---


def test_every_class_is_among_those_that_are_tested():
    made = [make(setup()[1]) for make in GUIDANCES.values()]
    classes = {c for _, c in inspect.getmembers(guidance, inspect.isclass) if issubclass(c, Guidance)}
    assert {type(m) for m in made} >= {c for c in classes if not inspect.isabstract(c)}


@pytest.mark.parametrize("t", [T, MANY, time(0.999)], ids=["one_time", "many_times", "noise"])
@pytest.mark.parametrize("name", [name for name in GUIDANCES if name != "cfg_pp"])
def test_the_pair_makes_up_x_t(name, t):
    guided = GUIDANCES[name](setup(RectifiedFlow(), Velocity())[1])
    assert guided.consistent
    for _ in range(2):  # the second time with a memory
        x0, eps, share = guided(WIDE, t, LABEL)
        alpha, sigma = per_image(guided.path.alpha(t)), per_image(guided.path.sigma(t))
        torch.testing.assert_close(alpha * x0 + sigma * eps, WIDE, rtol=1e-12, atol=1e-12)
        assert share is None


@pytest.mark.parametrize(
    "name", [name for name in GUIDANCES if "autoguidance" in name or "cfg" in name or "apg" in name]
)
def test_it_is_defined_at_pure_noise(name):
    path = RectifiedFlow()
    said = GUIDANCES[name](setup(path, Velocity())[1])(WIDE, time(1.0), LABEL)
    assert said.x0.isfinite().all()
    torch.testing.assert_close(said.eps, WIDE, rtol=1e-12, atol=1e-12)  # x_t is the noise, whatever x0


@pytest.mark.parametrize("name", GUIDANCES)
def test_times_may_differ_within_a_batch(name):
    _, plain = setup(RectifiedFlow(), Velocity())
    together, alone = GUIDANCES[name](plain), [GUIDANCES[name](plain) for _ in range(6)]
    for t in (MANY, MANY.roll(2)):  # one that was outside the interval has nothing to remember inside
        batch = together(WIDE, t, LABEL)
        for i, one in enumerate(alone):
            single = one(WIDE[i : i + 1], t[i], LABEL[i : i + 1])
            torch.testing.assert_close(batch.x0[i : i + 1], single.x0)
            torch.testing.assert_close(batch.eps[i : i + 1], single.eps)


@pytest.mark.parametrize("name", GUIDANCES)
def test_evaluations_are_what_is_asked_per_sample(name):
    net, plain = setup(RectifiedFlow(), Velocity())
    guided = GUIDANCES[name](plain)
    guide = Net()
    for layer in (guided, getattr(guided, "denoiser", None)):
        if isinstance(layer, Autoguidance):
            layer.guide.network = guide
    for t in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.95, 1.0):
        net.calls.clear()
        guide.calls.clear()
        guided(X, time(t), LABEL)
        assert guided.evaluations(t) == (sum(net.calls) + sum(guide.calls)) / 6, t
        assert len(net.calls) == 1  # whatever is asked of one network is asked in one call


@pytest.mark.parametrize("name", GUIDANCES)
def test_what_is_learned_about_the_variance_is_that_of_the_conditional_prediction(name):
    def network(x, t, condition):
        label = condition.label.reshape(-1, 1, 1, 1) / 5
        return torch.cat((torch.sin(x + label), torch.tanh(x * label)), dim=1)

    plain = NetworkDenoiser(network=network, path=RectifiedFlow(), prediction=Velocity(), learned_variance=True)
    condition = LABEL.null() if name == "cfg_0" else LABEL
    want = plain(X, T, condition)
    got = GUIDANCES[name](plain)(X, T, LABEL)
    torch.testing.assert_close(got.share, want.share)
    assert got.share.std() > 0


@pytest.mark.parametrize("name", GUIDANCES)
def test_sampling_calls_know_nothing_of_each_other(name):
    _, plain = setup(RectifiedFlow(t_min=0.01), Velocity())
    guided = GUIDANCES[name](plain)
    sampler = DDIM(grid=Uniform(), steps=6)

    def draw(denoiser, count):
        noise = NoiseSource(seed=0, index=torch.arange(count))
        return sampler.sample(denoiser, (1, 2, 2), Condition(label=torch.arange(count)), noise)

    first = draw(guided, 4)
    guided(X, T, LABEL)  # leaves a memory of another batch behind
    torch.testing.assert_close(draw(guided, 4), first, rtol=0, atol=0)
    torch.testing.assert_close(draw(guided, 3), first[:3])
    torch.testing.assert_close(draw(GUIDANCES[name](plain), 4), first, rtol=0, atol=0)


# --- classifier-free guidance ---


def test_guided_network_output_is_the_papers_combination():
    net, plain = setup()
    guided = ClassifierFree(plain, scale=2.5)(X, T, LABEL)
    assert net.calls == [12]  # one batched call
    conditional, unconditional = plain(X, T, LABEL), plain(X, T, LABEL.null())
    torch.testing.assert_close(guided.eps, unconditional.eps + 2.5 * (conditional.eps - unconditional.eps))
    torch.testing.assert_close(guided.x0, unconditional.x0 + 2.5 * (conditional.x0 - unconditional.x0))


@pytest.mark.parametrize("path", [*PATHS.values(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_the_guided_score_is_that_of_the_sharpened_density(path):
    """∇ [(1 − s)·ln p(x_t) + s·ln p(x_t | c)], with both densities in closed form."""
    exact, x, t = Classes(path), normal(5, 2, 1, 1), time(0.4)
    label = torch.tensor([0, 1, 0, 1, 1])
    said = ClassifierFree(exact, scale=3.0)(x, t, Condition(label=label))
    each = torch.stack([exact.score(mixture, x, t) for mixture in exact.each])[label, torch.arange(5)]
    want = (1 - 3.0) * exact.score(exact.all, x, t) + 3.0 * each
    torch.testing.assert_close(-said.eps / path.sigma(t), want, rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_outside_the_interval_the_conditional_model_is_asked_alone(scale):
    net, plain = setup(RectifiedFlow(), Velocity())
    guided = ClassifierFree(plain, scale=scale, sigma_min=0.5, sigma_max=2.0)
    for t, inside in (
        (0.2, False),
        (1 / 3 - 1e-6, False),
        (1 / 3 + 1e-6, True),
        (0.5, True),
        (0.9, False),
        (1.0, False),
    ):
        net.calls.clear()
        got, want = guided(X, time(t), LABEL), plain(X, time(t), LABEL)
        count = 2 if inside and scale else 1
        assert net.calls[0] == 6 * count
        assert guided.evaluations(t) == count
        assert torch.equal(got.x0, want.x0) == (not inside)


def test_a_heun_sampler_pays_for_the_interval_only():
    _, plain = setup(RectifiedFlow(), Velocity())
    sampler = Heun(grid=Uniform(), steps=4)  # asks at 1, at ¾ and ½, at ½ and ¼, at ¼
    for interval, nfe in (
        ({}, 12),
        ({"sigma_min": 0.9}, 10),
        ({"sigma_max": 0.5}, 8),
        ({"sigma_min": 2, "sigma_max": 4}, 7),
    ):
        assert sampler.plan(ClassifierFree(plain, scale=2.0, **interval))[1] == nfe, interval


# --- CFG++ ---


@pytest.mark.parametrize("path", [Cosine(), RectifiedFlow(), VarianceExploding()], ids=lambda path: type(path).__name__)
def test_cfg_pp_removes_the_guided_noise_and_adds_the_unconditional_one(path):
    """One DDIM step of algorithm 2, in any path's α and σ."""
    exact, label = Classes(path), Condition(label=torch.tensor([0, 1, 0, 1, 1]))
    t, s = time(0.6), time(0.5)
    x = 2 * normal(5, 2, 1, 1)
    conditional, unconditional = exact(x, t, label), exact(x, t, label.null())
    guided_noise = unconditional.eps + 0.6 * (conditional.eps - unconditional.eps)
    x0 = (x - path.sigma(t) * guided_noise) / path.alpha(t)
    want = path.alpha(s) * x0 + path.sigma(s) * unconditional.eps
    exact.calls = 0
    said = CFGPlusPlus(exact, scale=0.6)(x, t, label)
    assert exact.calls == 1
    torch.testing.assert_close(path.alpha(s) * said.x0 + path.sigma(s) * said.eps, want, rtol=1e-10, atol=1e-10)


def test_cfg_pp_at_the_ends_of_its_scale():
    _, plain = setup()
    conditional, unconditional = plain(X, T, LABEL), plain(X, T, LABEL.null())
    none, full = CFGPlusPlus(plain, scale=0.0), CFGPlusPlus(plain, scale=1.0)
    assert (none.evaluations(0.4), full.evaluations(0.4)) == (1, 2)
    torch.testing.assert_close(none(X, T, LABEL), unconditional)
    torch.testing.assert_close(full(X, T, LABEL), Posterior(conditional.x0, unconditional.eps))


def test_cfg_pp_is_its_own_kind_of_pair_and_nothing_wraps_it():
    broken = CFGPlusPlus(setup()[1], scale=0.6)
    assert not broken.consistent
    assert not broken.fresh().consistent
    assert not chain(setup()[1], parts={"pp": lambda d: CFGPlusPlus(d, scale=0.6)}).consistent
    wrappers = [make for name, make in GUIDANCES.items() if name != "none"]
    for wrap in wrappers:
        with pytest.raises(ValueError, match="^denoiser=CFGPlusPlus: cannot be guided further"):
            wrap(broken)


def test_cfg_pp_goes_with_ddim_and_euler_only():
    broken = CFGPlusPlus(setup(RectifiedFlow(), Velocity())[1], scale=0.6)
    label = Condition(label=torch.arange(4))
    drawn = [
        sampler.sample(broken, (1, 2, 2), label, NoiseSource(seed=0, index=torch.arange(4)))
        for sampler in (DDIM(grid=Uniform(), steps=4), Euler(grid=Uniform(), steps=4))
    ]
    torch.testing.assert_close(*drawn)
    with pytest.raises(ValueError, match="does not fit CFG"):
        Heun(grid=Uniform(), steps=4).plan(broken)


# --- adaptive projected guidance ---


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_apg_is_diffusers_on_x0(eta):
    """With their `use_original_formulation`, whose scale is one less. Without it they add the update to the unconditional
    prediction, which for η < 1 or a cut norm is not the paper's formula, and lets the momentum scale the whole difference."""
    _, plain = setup()
    guided, buffer = APG(plain, scale=4.0, eta=eta, momentum=-0.5, norm_threshold=1.2), MomentumBuffer(-0.5)
    clipped = []
    for t in (0.7, 0.5, 0.3):
        said = guided(WIDE, time(t), LABEL)
        conditional, unconditional = plain(WIDE, time(t), LABEL), plain(WIDE, time(t), LABEL.null())
        options = {"momentum_buffer": buffer, "eta": eta, "norm_threshold": 1.2, "use_original_formulation": True}
        want = normalized_guidance(conditional.x0, unconditional.x0, 3.0, **options)
        torch.testing.assert_close(said.x0, want)
        clipped += (buffer.running_average.flatten(1).norm(dim=1) > 1.2).tolist()
    assert {True, False} == set(clipped)  # both sides of the threshold


def test_apg_is_the_papers_update_by_hand():
    """One pixel pair each, so that parallel and orthogonal can be seen."""
    plain, label = Fixed({0: [3.0, 4.0], 1: [1.0, 0.0], -1: [0.0, 1.0]}), Condition(label=torch.tensor([0, 1]))
    x = normal(2, 2, 1, 1)
    # Differences (3, 3) and (1, −1). Parallel to (3, 4)/5: 21/5·(0.6, 0.8) = (2.52, 3.36); to (1, 0): (1, 0).
    no_memory = {"scale": 3.0, "momentum": 0.0}
    got = APG(plain, eta=0.0, **no_memory)(x, T, label).x0.flatten(1)
    torch.testing.assert_close(got, time([[3 + 2 * 0.48, 4 - 2 * 0.36], [1, -2]]))
    got = APG(plain, eta=0.5, **no_memory)(x, T, label).x0.flatten(1)
    torch.testing.assert_close(got, time([[3 + 2 * (0.48 + 1.26), 4 + 2 * (-0.36 + 1.68)], [1 + 1, -2]]))
    # Norms √18 and √2: only the first is cut, to 2.
    got = APG(plain, eta=1.0, norm_threshold=2.0, **no_memory)(x, T, label).x0.flatten(1)
    torch.testing.assert_close(got, time([[3 + 2 * math.sqrt(2), 4 + 2 * math.sqrt(2)], [3, -2]]))
    # The same difference three times: Δ, Δ·(1 + β), Δ·(1 + β + β²).
    guided = APG(plain, scale=3.0, eta=1.0, momentum=-0.5)
    for factor in (1, 0.5, 0.75):
        got = guided(x, T, label).x0.flatten(1)
        torch.testing.assert_close(got, time([[3 + 6 * factor, 4 + 6 * factor], [1 + 2 * factor, -2 * factor]]))


def test_apg_without_its_three_steps_is_classifier_free_guidance():
    _, plain = setup()
    for scale in (1.0, 2.5):
        got = APG(plain, scale=scale, eta=1.0, momentum=0.0)(WIDE, T, LABEL)
        torch.testing.assert_close(got, ClassifierFree(plain, scale=scale)(WIDE, T, LABEL))


def test_apg_of_predictions_that_are_zero_or_equal():
    for network in (lambda x, t, condition: torch.zeros_like(x), lambda x, t, condition: x):
        _, plain = setup(RectifiedFlow(), Velocity(), network)
        guided = APG(plain, scale=4.0, norm_threshold=1.0)
        x = torch.zeros_like(X)
        torch.testing.assert_close(guided(x, T, LABEL), plain(x, T, LABEL))


def test_fresh_forgets_and_leaves_the_original_alone():
    _, plain = setup()
    guided = APG(plain, scale=4.0)
    first = guided(X, T, LABEL)
    fresh = guided.fresh()
    torch.testing.assert_close(fresh(X, T, LABEL), first, rtol=0, atol=0)
    assert (guided(X, T, LABEL).x0 - first.x0).abs().max() > 1e-3  # it still remembers
    for wrap in (
        lambda d: Rescale(d),
        lambda d: DynamicThreshold(Rescale(d)),
        lambda d: Autoguidance(d, scale=2.0, guide=smaller_guide()),
        lambda d: Autoguidance(smaller_guide(), scale=2.0, guide=d),
    ):
        outer = wrap(APG(plain, scale=4.0))
        first = outer(X, T, LABEL)
        assert (outer(X, T, LABEL).x0 - first.x0).abs().max() > 1e-4
        torch.testing.assert_close(outer.fresh()(X, T, LABEL), first, rtol=0, atol=0)


# --- autoguidance ---


@pytest.mark.parametrize(
    "theirs", [Cosine(), RectifiedFlow(), VarianceExploding(), Trigonometric()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("ours", [Cosine(), RectifiedFlow(), VarianceExploding()], ids=lambda p: type(p).__name__)
def test_autoguidance_sharpens_against_a_broader_density_on_any_path(ours, theirs):
    """∇ [s·ln p_1(x_t) + (1 − s)·ln p_0(x_t)] on our own path, though the guide knows another."""
    better, guide = Classes(ours, stds=(0.3, 0.6)), Classes(theirs, stds=(0.7, 1.1))
    x, t, label = normal(5, 2, 1, 1), time([0.2, 0.3, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 0, 1, 1])
    guided = Autoguidance(better, scale=1.8, guide=guide)
    assert guided.evaluations(0.4) == 2
    said = guided(x, t, Condition(label=label))
    broad = [Mixture([1.0], [mean], [std]) for mean, std in zip(((1.0, -0.5), (-1.2, 0.4)), (0.7, 1.1), strict=True)]
    for i, k in enumerate(label.tolist()):
        here = x[i : i + 1], t[i]
        want = 1.8 * better.score(better.each[k], *here) + (1 - 1.8) * better.score(broad[k], *here)
        torch.testing.assert_close(-said.eps[i : i + 1] / ours.sigma(t[i]), want, rtol=1e-9, atol=1e-9)


def test_autoguidance_at_scale_one_asks_no_guide_and_at_zero_is_the_guide():
    _, plain = setup()
    one, zero = (Autoguidance(plain, scale=scale, guide=smaller_guide()) for scale in (1.0, 0.0))
    assert (one.evaluations(0.4), zero.evaluations(0.4)) == (1, 2)
    torch.testing.assert_close(one(X, T, LABEL), plain(X, T, LABEL), rtol=0, atol=0)
    torch.testing.assert_close(zero(X, T, LABEL), smaller_guide()(X, T, LABEL))


def test_a_guide_is_asked_where_its_path_reaches():
    ours, theirs = RectifiedFlow(t_min=1e-3), VarianceExploding(t_min=0.01, t_max=50.0)
    guided = Autoguidance(Classes(ours), scale=2.0, guide=Classes(theirs))
    levels = {0.001: 1, 0.0099: 1, 0.0101: 2, 1.0: 2, 49.9: 2, 50.1: 1}
    assert {level: guided.evaluations(level / (1 + level)) for level in levels} == levels
    assert guided.evaluations(1.0) == 1  # pure noise


def test_a_guide_is_asked_at_both_ends_of_its_path_and_never_beyond():
    for i in range(1, 50):
        ours, theirs = RectifiedFlow(t_min=i / 500, t_max=1 - i / 500), RectifiedFlow(t_min=i / 500, t_max=1 - i / 500)
        _, guide = setup(theirs, Velocity())
        asked = []
        guide.network = lambda x, t, condition, asked=asked: asked.append(t) or x
        guided = Autoguidance(setup(ours, Velocity())[1], scale=2.0, guide=guide)
        for t in (ours.t_min, ours.t_max):
            assert guided.evaluations(t) == 2
            guided(X, time(t), LABEL)
        assert 1000 * theirs.t_min <= torch.cat(asked).min()
        assert torch.cat(asked).max() <= 1000 * theirs.t_max


def test_a_guide_that_does_not_reach_some_of_the_times_is_asked_at_its_end_for_them():
    asked = []

    def network(x, t, condition):
        asked.append((x, t))
        return x

    _, guide = setup(VPLinear(), V(), network)
    _, plain = setup(RectifiedFlow(), Velocity())
    t = time([0.001, 0.2, 0.5, 0.9, 0.99, 1.0])
    said, want = Autoguidance(plain, scale=2.0, guide=guide)(X, t, LABEL), plain(X, t, LABEL)
    assert all(part.isfinite().all() for part in asked[0])
    assert ((guide.path.c_noise(time(guide.path.t_min)) <= asked[0][1]) & (asked[0][1] <= 999)).all()
    assert [torch.equal(said.x0[i], want.x0[i]) for i in range(6)] == [True, False, False, False, False, True]


def test_a_guide_asks_for_labels_without_label_dropout():
    _, plain = setup()
    assert not Autoguidance(plain, scale=2.0, guide=smaller_guide()).needs_null


# --- rescale ---


def test_rescale_is_diffusers_rule_on_x0():
    _, plain = setup()
    contrast = ClassifierFree(plain, scale=4.0)
    got, guided, conditional = (
        Rescale(contrast, phi=0.7)(WIDE, T, LABEL),
        contrast(WIDE, T, LABEL),
        plain(WIDE, T, LABEL),
    )
    torch.testing.assert_close(got.x0, rescale_noise_cfg(guided.x0, conditional.x0, 0.7))
    deviation = [p.x0.flatten(1).std(1) for p in (Rescale(contrast, phi=1.0)(WIDE, T, LABEL), conditional)]
    torch.testing.assert_close(*deviation)
    torch.testing.assert_close(Rescale(contrast, phi=0.0)(WIDE, T, LABEL), guided)


def test_rescale_is_the_papers_rule_on_v_where_the_path_ends_in_pure_noise():
    """At α = 0 the network's v is −x0."""
    net, plain = setup(Trigonometric())
    t = time(1.0)
    guided = Rescale(ClassifierFree(plain, scale=4.0), phi=0.7)(WIDE, t, LABEL)
    conditional, unconditional = (net(WIDE, (1000 * t).expand(6), c) for c in (LABEL, LABEL.null()))
    v = rescale_noise_cfg(unconditional + 4.0 * (conditional - unconditional), conditional, 0.7)
    torch.testing.assert_close(guided.x0, -v)


def test_rescale_asks_once_and_changes_nothing_where_nothing_guides():
    net, plain = setup(RectifiedFlow(), Velocity())
    want = plain(WIDE, time(0.9), LABEL)
    for phi in (0.1, 0.3, 0.7, 0.9):
        net.calls.clear()
        rescaled = Rescale(ClassifierFree(plain, scale=4.0, sigma_max=1.0), phi=phi)
        torch.testing.assert_close(rescaled(WIDE, time(0.9), LABEL), want, rtol=0, atol=0)
        assert net.calls == [6]
        assert (rescaled.evaluations(0.9), rescaled.evaluations(0.4)) == (1, 2)


def test_rescale_of_predictions_that_are_zero():
    _, plain = setup(RectifiedFlow(), Velocity(), lambda x, t, condition: torch.zeros_like(x))
    said = Rescale(ClassifierFree(plain, scale=4.0))(torch.zeros_like(X), T, LABEL)
    torch.testing.assert_close(said, Posterior(torch.zeros_like(X), torch.zeros_like(X)))


@pytest.mark.parametrize("make", [lambda d: d, lambda d: DynamicThreshold(ClassifierFree(d, scale=2.0))])
def test_rescale_wants_two_predictions_below_it(make):
    with pytest.raises(
        ValueError, match="^denoiser=(NetworkDenoiser|DynamicThreshold): must be a guidance with two predic"
    ):
        Rescale(make(setup()[1]))


# --- dynamic thresholding ---


def test_dynamic_threshold_is_the_papers_by_sorting():
    _, plain = setup()
    x = WIDE * time([0.1, 0.5, 1, 2, 4, 8]).reshape(-1, 1, 1, 1)
    before, after = plain(x, T, LABEL).x0, DynamicThreshold(plain, percentile=0.9)(x, T, LABEL).x0
    changed = 0
    for image, got in zip(before, after, strict=True):
        ordered = sorted(image.abs().flatten().tolist())
        place = 0.9 * (len(ordered) - 1)
        low = int(place)
        s = max(1.0, ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]))
        torch.testing.assert_close(got, image.clip(-s, s) / s)
        changed += s > 1
    assert 0 < changed < 6
    assert after.abs().max() <= 1


def test_dynamic_threshold_leaves_images_within_the_range_alone():
    _, plain = setup(prediction=X0(), network=lambda x, t, condition: torch.sin(x))
    assert 0.99 < plain(WIDE, T, LABEL).x0.abs().max() <= 1
    torch.testing.assert_close(DynamicThreshold(plain)(WIDE, T, LABEL), plain(WIDE, T, LABEL), rtol=0, atol=0)


# --- one over the other ---


def test_a_chain_wraps_in_order_and_skips_what_is_none():
    _, plain = setup()
    parts = {"cfg": lambda d: ClassifierFree(d, scale=8.0), "off": None, "last": lambda d: DynamicThreshold(d)}
    chained = chain(plain, parts=parts)
    assert isinstance(chained, DynamicThreshold)
    assert isinstance(chained.denoiser, ClassifierFree)
    assert chained.denoiser.denoiser is plain
    threshold_last = chained(WIDE, T, LABEL).x0
    threshold_first = chain(plain, parts=dict(reversed(parts.items())))(WIDE, T, LABEL).x0
    assert threshold_last.abs().max() <= 1 < threshold_first.abs().max()
    assert chain(plain, parts={}) is plain
    assert unguided(plain) is plain


def test_guidance_composes():
    _, plain = setup()
    twice = ClassifierFree(ClassifierFree(plain, scale=2.0), scale=1.5)
    assert twice.evaluations(0.4) == 4
    # Without labels the inner one finds nothing to contrast: the scales multiply.
    torch.testing.assert_close(twice(X, T, LABEL), ClassifierFree(plain, scale=3.0)(X, T, LABEL))


def test_who_needs_a_network_that_knows_no_labels():
    _, plain = setup()
    needs = {name: getattr(make(plain), "needs_null", False) for name, make in GUIDANCES.items()}
    without = {"none", "threshold", "autoguidance", "autoguidance_interval", "autoguidance_elsewhere"}
    assert needs == {name: name not in without for name in GUIDANCES}
    assert not ClassifierFree(plain, scale=1.0).needs_null
    assert CFGPlusPlus(plain, scale=1.0).needs_null


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: ClassifierFree(d, scale=-1.0), "scale=-1.0: must be at least 0"),
        (lambda d: ClassifierFree(d, scale=math.inf), "scale=inf: must be at least 0"),
        (lambda d: ClassifierFree(d, scale=2.0, sigma_min=-0.1), "sigma_min=-0.1: must be at least 0"),
        (
            lambda d: ClassifierFree(d, scale=2.0, sigma_min=2.0, sigma_max=1.0),
            "sigma_max=1.0: must be above sigma_min=2.0",
        ),
        (lambda d: CFGPlusPlus(d, scale=1.5), r"scale=1.5: must be in \[0, 1\]"),
        (lambda d: APG(d, scale=0.5), "scale=0.5: must be at least 1"),
        (lambda d: APG(d, scale=2.0, momentum=1.0), r"momentum=1.0: must be in \(-1, 1\)"),
        (lambda d: APG(d, scale=2.0, norm_threshold=0.0), "norm_threshold=0.0: must be positive, or null"),
        (lambda d: Autoguidance(d, scale=2.0), "guide=null: must be the run folder or the checkpoint file"),
        (lambda d: Autoguidance(d, scale=2.0, guide="runs/x"), "guide=runs/x: must be the run folder"),
        (
            lambda d: Autoguidance(d, scale=2.0, guide=smaller_guide(VarianceExploding(t_max=10.0)), sigma_min=20.0),
            "guide=VarianceExploding: its path reaches no noise level of the interval",
        ),
        (lambda d: Rescale(ClassifierFree(d, scale=2.0), phi=1.5), r"phi=1.5: must be in \[0, 1\]"),
        (lambda d: DynamicThreshold(d, percentile=0.0), r"percentile=0.0: must be in \(0, 1\]"),
        (lambda d: DynamicThreshold(d, percentile=99.5), r"percentile=99.5: must be in \(0, 1\]"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(setup()[1])


def test_contrasts_give_the_better_prediction_too():
    _, plain = setup()
    for name in ("cfg", "apg", "autoguidance"):
        contrast = GUIDANCES[name](plain)
        assert isinstance(contrast, Contrast)
        torch.testing.assert_close(contrast.both(X, T, LABEL)[1], plain(X, T, LABEL))
