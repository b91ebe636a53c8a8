"""The recipes of the papers say the papers' numbers, and what is built of them computes what the papers do."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from calls import CONF, composed

from denoiselab.app.nodes import make, make_network
from denoiselab.condition import Condition

OWN = {"digits_guided", "fashion_mnist"}  # not from a paper

# Trainable parameters of the official networks, counted on their code (DiT and SiT: without the fixed position embedding,
# and SiT's with the second half of outputs that it drops); in papers 35.7 M, "50M", about 56 M for EDM, 675 M.
PARAMETERS = {
    "ddpm_cifar10": 35_746_307,
    "iddpm_cifar10": 52_546_438,
    "edm_ddpmpp_cifar10": 55_735_299,
    "edm_ncsnpp_cifar10": 56_400_643,
    "vp_sde_cifar10": 61_804_419,
    "ve_sde_cifar10": 62_758_787,
    "rectified_flow_cifar10": 61_804_419,
    "otcfm_cifar10": 35_746_307,
    "dit_xl_2_imagenet": 674_834_720,
    "sit_xl_2_imagenet": 674_834_720,
}

# batch, steps, images mirrored, classes, dropout, hidden labels, rate, warm-up, largest gradient norm, EMA, its warm-up, NFE
EDM = (512, 200e6 / 512, False, 10, 0.13, 0, 1e-3, 10e6 / 512, None, 2 ** (-512 / 500e3), False, 35)
NUMBERS = {
    "ddpm_cifar10": (128, 800_000, True, 0, 0.1, 0, 2e-4, 5000, 1, 0.9999, False, 1000),
    "iddpm_cifar10": (128, 500_000, False, 0, 0.3, 0, 1e-4, 0, None, 0.9999, False, 4000),
    "edm_ddpmpp_cifar10": EDM,
    "edm_ncsnpp_cifar10": EDM,
    "vp_sde_cifar10": (128, 200e6 / 128, True, 0, 0.1, 0, 2e-4, 0.64e6 / 128, 1, 0.9999, True, 35),
    "ve_sde_cifar10": (128, 200e6 / 128, True, 0, 0.1, 0, 2e-4, 0.64e6 / 128, 2 / 3072, 0.999, True, 35),
    "rectified_flow_cifar10": (128, 800_000, True, 0, 0.15, 0, 2e-4, 5000, 1, 0.999999, True, None),
    "otcfm_cifar10": (128, 400_000, True, 0, 0.1, 0, 2e-4, 5000, 1, 0.9999, False, None),
    "dit_xl_2_imagenet": (256, 7_000_000, True, 1000, None, 0.1, 1e-4, 0, None, 0.9999, False, 500),
    "sit_xl_2_imagenet": (256, 7_000_000, True, 1000, None, 0.1, 1e-4, 0, None, 0.9999, False, 498),
}


@functools.cache
def recipe(name):
    """The resolved config of a recipe; not to be changed."""
    return composed(f"experiment={name}")


def built(config):
    """The objective of a recipe, its sampler, and the guided denoiser of a network that outputs zeros."""
    objective = make(config, "objective")

    def network(x, t, condition):
        return x.new_zeros(len(x), x.shape[1] * (1 + objective.learned_variance), *x.shape[2:])

    return objective, make(config, "sampler"), make(config, "guidance")(objective.denoiser(network))


def weight_of_x0(objective, t):
    """The loss weight of the squared error of x0."""
    pair = objective.prediction.pair(objective.path, t)
    return objective.weighting(objective.path, objective.prediction, t) * (pair.det / pair.sigma).square()


def times(objective, *probabilities):
    """The quantiles of the training times."""
    return objective.time_sampling.times(objective.path, torch.tensor(probabilities, dtype=torch.float64))


def test_every_recipe_is_pinned_and_says_that_it_has_not_been_run():
    files = {file.stem: file.read_text() for file in (CONF / "experiment").glob("*.yaml")}
    assert files.keys() - OWN == PARAMETERS.keys() == NUMBERS.keys()
    for name in PARAMETERS:
        assert files[name].splitlines()[1].endswith("; not run in full here"), name


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_network_has_the_size_of_the_official_one(name, count):
    network = make_network(recipe(name), device="meta")
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(("name", "numbers"), NUMBERS.items())
def test_the_numbers_are_those_of_the_paper(name, numbers):
    config = recipe(name)
    ema, schedule = make(config, "ema"), make(config, "schedule")
    _, sampler, denoiser = built(config)
    data, trainer = config["datamodule"], config["trainer"]
    found = (
        data["batch_size"],
        trainer["max_steps"],
        data["flip"],
        data["num_classes"],
        config["backbone"].get("dropout"),
        config["objective"]["label_dropout"],
        config["optimizer"]["lr"],
        schedule.warmup_steps,
        trainer["gradient_clip"],
        ema.decays["ema"],
        ema.warmup,
        sampler.plan(denoiser)[1],
    )
    for value, expected in zip(found, numbers, strict=True):
        assert value == expected or value == pytest.approx(expected, rel=1e-3), (found, numbers)
    assert schedule.factor(trainer["max_steps"] - 1) == 1  # constant after the warm-up
    optimizer = config["optimizer"]
    assert optimizer["betas"] == [0.9, 0.999]
    assert optimizer.get("weight_decay", 0) == 0
    assert config["objective"]["time_sampling"]["stratified"] is False
    assert trainer["precision"] == "32-true"


@pytest.mark.parametrize(("name", "steps"), [("ddpm_cifar10", 1000), ("iddpm_cifar10", 4000)])
def test_ddpm_and_improved_ddpm_visit_the_whole_chain_and_clip_x0(name, steps):
    objective, sampler, denoiser = built(recipe(name))
    points = sampler.plan(denoiser)[0]
    assert [p.t for p in points[:-1]] == pytest.approx([(steps - i) / steps for i in range(steps)])
    assert objective.path.steps == steps
    assert sampler.variance == ("learned" if objective.learned_variance else "large")
    x, t = torch.linspace(-3, 3, 48).reshape(1, 3, 4, 4), torch.tensor(0.25, dtype=torch.float64)
    found = denoiser(x, t, Condition(label=None)).x0
    torch.testing.assert_close(found, (x / objective.path.alpha(t).float()).clamp(-1, 1))
    assert found.abs().max() == 1
    assert found.abs().min() < 1


def test_the_bound_counts_as_in_improved_ddpm_and_in_dit():
    for name, steps, factor in (("iddpm_cifar10", 4000, 4.0), ("dit_xl_2_imagenet", 1000, 1.0)):
        objective, _, _ = built(recipe(name))
        assert objective.learned_variance
        assert objective.vlb_steps == objective.path.steps == steps
        assert objective.vlb_weight * objective.vlb_steps == factor  # on one step's bound in bits


@pytest.mark.parametrize("name", ["edm_ddpmpp_cifar10", "edm_ncsnpp_cifar10"])
def test_edm_trains_and_samples_at_the_noise_levels_of_its_table_1(name):
    config = recipe(name)
    objective, sampler, denoiser = built(config)
    sigma = times(objective, 0.1, 0.5, 0.9)
    normal = torch.special.ndtri(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(sigma.log(), -1.2 + 1.2 * normal, rtol=0, atol=1e-3)  # cut off below 0.002 and above 80
    torch.testing.assert_close(weight_of_x0(objective, sigma), (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2)
    torch.testing.assert_close(objective.prediction.c_noise(objective.path, sigma), sigma.log() / 4)
    levels = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert [p.level for p in sampler.plan(denoiser)[0]] == pytest.approx([*levels, 0])
    assert config["augmentation"]["p"] == 0.12
    assert config["augmentation"]["dim"] == config["backbone"]["augment_dim"] == 9
    assert make(config, "ema").ramp_up == 0.05
    assert config["optimizer"]["eps"] == pytest.approx(1e-8 / 3072, rel=2e-3)


def test_the_vp_recipe_is_edms_vp_loss():
    objective, sampler, denoiser = built(recipe("vp_sde_cifar10"))
    t = times(objective, 0.0, 0.25, 1.0)
    torch.testing.assert_close(t, torch.tensor([1e-5, 0.25 + 0.75e-5, 1.0], dtype=torch.float64))
    sigma = torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t).sqrt()
    torch.testing.assert_close(objective.path.alpha(t), 1 / (1 + sigma**2).sqrt())  # c_in
    torch.testing.assert_close(objective.path.sigma(t), sigma / (1 + sigma**2).sqrt())
    torch.testing.assert_close(objective.prediction.c_noise(objective.path, t), 999 * t)
    torch.testing.assert_close(weight_of_x0(objective, t), 1 / sigma**2)
    levels = [p.level for p in sampler.plan(denoiser)[0]]
    assert (levels[0], levels[-2]) == pytest.approx((80, 0.002))


def test_the_ve_recipe_is_edms_ve_loss():
    config = recipe("ve_sde_cifar10")
    objective, sampler, denoiser = built(config)
    sigma = times(objective, 0.0, 0.25, 0.5, 0.75, 1.0)
    expected = [0.02 * (100 / 0.02) ** u for u in (0.0, 0.25, 0.5, 0.75, 1.0)]
    torch.testing.assert_close(sigma, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(objective.path.sigma(sigma), sigma)
    torch.testing.assert_close(objective.prediction.c_noise(objective.path, sigma), (sigma / 2).log())
    torch.testing.assert_close(weight_of_x0(objective, sigma), 1 / sigma**2)
    levels = [p.level for p in sampler.plan(denoiser)[0]]
    assert (levels[0], levels[-2]) == pytest.approx((80, 0.02))
    assert config["optimizer"]["eps"] == pytest.approx(1e-8 * 2 / 3072, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("rectified_flow_cifar10", 0.999, 0.0), ("otcfm_cifar10", 1.0, 0.0), ("sit_xl_2_imagenet", 1.0, 0.0)],
)
def test_flows_learn_the_velocity_of_the_straight_path_at_uniform_times(name, first, last):
    objective, _, _ = built(recipe(name))
    t = times(objective, 1.0, 0.5, 0.0)
    assert t.tolist() == pytest.approx([first, (first + last) / 2, last], abs=1.1e-5)
    pair = objective.prediction.pair(objective.path, t)
    torch.testing.assert_close(torch.stack(pair), torch.stack([1 - t, t, -torch.ones(3), torch.ones(3)]).double())
    assert bool((objective.weighting(objective.path, objective.prediction, t) == 1).all())


@pytest.mark.parametrize("name", ["rectified_flow_cifar10", "otcfm_cifar10"])
def test_flows_on_cifar10_are_solved_by_runge_kutta_45(name):
    objective, sampler, _ = built(recipe(name))
    assert sampler.adaptive
    assert (sampler.rtol, sampler.atol) == (1e-5, 1e-5)
    assert getattr(objective.coupling, "group_size", 1) == (128 if name == "otcfm_cifar10" else 1)


def test_dit_and_sit_are_guided_and_sampled_in_latents_as_in_their_papers():
    for name in ("dit_xl_2_imagenet", "sit_xl_2_imagenet"):
        config = recipe(name)
        assert config["guidance"]["scale"] == 1.5
        assert (config["datamodule"]["resolution"], config["datamodule"]["crop"]) == (256, "adm")
        assert (config["backbone"]["channels"], config["backbone"]["resolution"]) == (4, 256 // 8)
        assert (config["codec"]["scale"], config["codec"]["shift"]) == (0.18215, 0.0)
    _, sampler, denoiser = built(recipe("dit_xl_2_imagenet"))
    assert sampler.variance == "learned"
    asked = [1000 * p.t - 1 for p in sampler.plan(denoiser)[0][:-1]]
    assert asked == pytest.approx(
        [999 - i * 999 / 249 for i in range(250)]
    )  # space_timesteps(1000, [250]), not rounded
    _, sampler, denoiser = built(recipe("sit_xl_2_imagenet"))
    assert len(sampler.plan(denoiser)[0]) - 1 == 125  # Heun steps of two evaluations


def test_the_half_life_of_edm_in_images():
    for name, kimg in (("edm_ddpmpp_cifar10", 500), ("vp_sde_cifar10", 890)):
        config = recipe(name)
        updates = -math.log(2) / math.log(make(config, "ema").decays["ema"])
        assert updates * config["datamodule"]["batch_size"] / 1000 == pytest.approx(kimg, rel=0.01)
