"""The studies' pieces against closed forms, and the rule of the verdicts on made-up data."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from denoiselab.condition import NULL_LABEL, Condition
from denoiselab.diffusion.exact import Mixture
from denoiselab.diffusion.grids import Karras, Uniform
from denoiselab.diffusion.guidance import ClassifierFree
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine, RectifiedFlow
from denoiselab.diffusion.samplers import DDPM, Euler, Heun, HeunT
from denoiselab.evaluation.features import FeatureSet
from denoiselab.evaluation.intervals import wilson
from denoiselab.reports.studies.claims import Claim, above, estimated, shares
from denoiselab.reports.studies.classes import three_arcs
from denoiselab.reports.studies.copying import _never_trained_on, copies
from denoiselab.reports.studies.guidance_scale import jackknife_error, measured, measurements
from denoiselab.reports.studies.page import write_page
from denoiselab.reports.studies.spectrum import Field, Response, octave_power, octaves
from denoiselab.reports.studies.study import Findings

GRID = {"grid": Uniform(), "steps": 1}
FLOW = RectifiedFlow()


def verdict(*differences):
    return Claim("it is positive", "made-up data", differences).verdict


# ---- the rule


def test_all_above_zero_is_confirmed_one_below_is_refuted():
    up, down, wide = estimated("a", 1.0, 0.1), estimated("b", -1.0, 0.1), estimated("c", 0.5, 1.0)
    assert verdict(up, up) == "confirmed"
    assert verdict(up, down) == "refuted"
    assert verdict(up, down, wide) == "refuted"
    assert verdict(up, wide) == "undecided"
    assert verdict(estimated("exact", 1e-12, 0.0)) == "confirmed"
    assert verdict(estimated("exact", -1e-12, 0.0)) == "refuted"
    assert verdict(estimated("exact", 0.0, 0.0)) == "undecided"


def test_intervals_hold_together():
    """2.5 standard errors are enough for one difference and not for twenty, and fewer blocks need more of them."""
    one, sure = estimated("a", 2.5, 1.0), estimated("b", 100.0, 1.0)
    assert verdict(one) == "confirmed"
    assert verdict(one, *[sure] * 19) == "undecided"
    assert verdict(estimated("a", 2.5, 1.0, freedom=5)) == "undecided"
    claim = Claim("", "", [one, *[sure] * 19])
    assert claim.intervals[0] == pytest.approx((2.5 - 3.0233, 2.5 + 3.0233), abs=1e-4)  # the 99.875 % quantile
    assert claim.counts == "19 of 20 above zero, 0 below"
    assert claim.worst.startswith("a: +2.5 [")


def test_intervals_of_shares():
    # Newcombe 1998, "Interval estimation for the difference between independent proportions", table II (a) and (f), method 10
    assert shares("a", (56, 70), (48, 80)).interval(0.95) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert shares("f", (5, 56), (0, 29)).interval(0.95) == pytest.approx((-0.0381, 0.1926), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1, 10)[1] == 1.0
    assert wilson(0.06, 50, 0.999)[1] > wilson(0.06, 50)[1]
    assert verdict(above("all", (500, 500), 0.95)) == "confirmed"
    assert verdict(above("all", (480, 500), 0.95)) == "undecided"
    assert verdict(above("all", (400, 500), 0.95)) == "refuted"
    assert verdict(shares("no more", (0, 500), (5, 500), margin=0.05)) == "confirmed"
    assert verdict(shares("no more", (0, 500), (50, 500), margin=0.05)) == "refuted"


# ---- spectra


def test_octaves_hold_each_frequency_once():
    assert list(octaves(8, 8)) == ["1–2", "2–4", "4–8"]
    assert list(octaves(32, 32)) == ["1–2", "2–4", "4–8", "8–16", "16–32"]
    counted = torch.stack(list(octaves(16, 16).values())).sum(0)
    assert counted[0, 0] == 0
    assert counted.sum() == 16 * 16 - 1


@pytest.mark.parametrize(("cycles", "octave"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2)])
def test_the_power_of_a_wave_is_in_its_octave(cycles, octave):
    wave = 3 * torch.cos(2 * math.pi * cycles * torch.arange(16) / 16).expand(1, 1, 16, 16)
    power = octave_power(wave)[0]
    members = list(octaves(16, 16).values())[octave].sum()
    assert float(power[octave] * members) == pytest.approx(9 / 2 * 256, rel=1e-6)  # a²/2 a pixel
    assert float(power.sum() - power[octave]) < 1e-9


def test_a_field_has_its_spectrum():
    field = Field(side=8, slope=2.0, std=0.5)
    white = NoiseSource(seed=0, index=torch.arange(4000)).normal("white", (1, 8, 8), torch.float64)
    drawn = torch.fft.fft2(field.sample(white), norm="ortho").abs().square().mean((0, 1))
    assert (drawn / field.power - 1).abs().max() < 0.12  # 4000 draws of a variance: 2 % to 3 % each
    assert float(field.power.mean()) == pytest.approx(0.25)
    assert float(field.power[0, 1] / field.power[0, 2]) == pytest.approx(4.0)


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_the_denoiser_of_a_field_is_the_posterior_mean(t):
    """E[x0 | x_t] = α·C·(α²·C + σ²)⁻¹·x_t with the covariance of the pixels, written out."""
    field, side = Field(side=4, slope=1.5), 4
    row = torch.fft.ifft2(field.power.to(torch.complex128)).real
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    shift = (place[:, None] - place[None]) % side
    covariance = row[shift[..., 0], shift[..., 1]]
    x = NoiseSource(seed=0, index=torch.arange(3)).normal("x", (1, side, side), torch.float64)
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = Cosine().alpha(time), Cosine().sigma(time)
    filtered = torch.linalg.solve(
        alpha**2 * covariance + sigma**2 * torch.eye(16, dtype=torch.float64), x.reshape(3, 16).T
    ).T
    said = field.denoiser(Cosine())(x, time, Condition())
    torch.testing.assert_close(said.x0.reshape(3, 16), alpha * filtered @ covariance, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alpha * said.x0 + sigma * said.eps, x)


def test_two_euler_steps_in_closed_form():
    """From pure noise the first answer is 0, so x at t = 1/2 is half the noise, of which P/(P + 1) is data."""
    field = Field(side=8, slope=2.0)
    found = Response(Euler(**GRID), FLOW, field, 2)
    gain = field.power / (field.power + 1)
    torch.testing.assert_close(found.power, gain.square())
    torch.testing.assert_close(found.squared_distance, (gain - field.power.sqrt()).square())


@pytest.mark.parametrize("path", [FLOW, Cosine()])
def test_a_response_converges_to_the_data(path):
    field = Field(side=8, slope=2.0)
    errors = [Response(HeunT(**GRID), path, field, steps).squared_distance.sqrt().max() for steps in (16, 32, 256)]
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 1e-3
    assert (Response(HeunT(**GRID), path, field, 256).power / field.power - 1).abs().max() < 0.02


@pytest.mark.parametrize("sampler", [Euler(**GRID), DDPM(**GRID, variance="large")])
def test_a_response_is_what_drawn_images_have(sampler):
    field = Field(side=4, slope=2.0)
    noise = NoiseSource(seed=0, index=torch.arange(6000))
    points = sampler.points(FLOW, 4)
    drawn = sampler.integrate(
        field.denoiser(FLOW), noise.normal("start", (1, 4, 4), torch.float64), points, Condition(), noise
    )
    found = torch.fft.fft2(drawn, norm="ortho").abs().square().mean((0, 1))
    assert (found / Response(sampler, FLOW, field, 4).power - 1).abs().max() < 0.12


def test_euler_blurs_every_band_and_heun_rings():
    field = Field(side=16, slope=2.0)
    assert (Response(Euler(**GRID), Cosine(), field, 8).power < field.power).all()
    karras = Heun(grid=Karras(sigma_min=0.002, sigma_max=80.0), steps=1)
    assert (Response(karras, Cosine(), field, 8).power > field.power).all()


# ---- classes and guidance


def test_a_density_with_classes_is_its_mixtures():
    classes, t = three_arcs(), torch.tensor(0.4, dtype=torch.float64)
    x = NoiseSource(seed=0, index=torch.arange(6)).normal("x", (2,), torch.float64)
    labels = torch.tensor([0, 1, 2, NULL_LABEL, 1, NULL_LABEL])
    said = classes.denoiser(FLOW)(x, t, Condition(label=labels)).x0
    for i, label in enumerate(labels.tolist()):
        torch.testing.assert_close(said[i], classes.of(label).denoiser(FLOW)(x[i : i + 1], t, Condition()).x0[0])
    each = t.expand(6)
    torch.testing.assert_close(classes.denoiser(FLOW)(x, each, Condition(label=labels)).x0, said)
    # Bayes: the shares of the classes times their densities make up the whole
    joint = torch.stack([m.log_prob(x) for m in classes.mixtures]).exp().mean(0)
    torch.testing.assert_close(classes.everything.log_prob(x).exp(), joint)
    torch.testing.assert_close(classes.log_posterior(x)[:, 1].exp(), classes.mixtures[1].log_prob(x).exp() / joint / 3)


def test_guidance_is_exact_on_a_density_with_classes():
    classes, t = three_arcs(), torch.tensor(0.4, dtype=torch.float64)
    x = NoiseSource(seed=0, index=torch.arange(4)).normal("x", (2,), torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    denoiser = classes.denoiser(FLOW)
    guided = ClassifierFree(denoiser, scale=3.0)(x, t, Condition(label=labels)).x0
    with_label, without = (denoiser(x, t, Condition(label=label)).x0 for label in (labels, labels * 0 + NULL_LABEL))
    torch.testing.assert_close(guided, without + 3 * (with_label - without))


def test_blocks_hold_all_classes_and_are_left_out_in_turn():
    noise = NoiseSource(seed=0, index=torch.arange(90))
    points, real, labels = noise.normal("points", (3,)), noise.normal("real", (3,)), torch.arange(90) % 3
    seen = torch.where(torch.arange(90) < 60, labels, (labels + 1) % 3)
    images = FeatureSet(points, labels, torch.nn.functional.one_hot(seen, 3).float(), classes=3)
    found = {f.measure: f for f in measurements(images, real, "made up", "everywhere", 2.0)}
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["accuracy"].row()["low"] == pytest.approx(wilson(60 / 90, 90)[0])
    distances = [torch.pdist(points[labels == k].double()).square().mean().sqrt() for k in range(3)]
    assert found["class_diversity"].value == pytest.approx(float(sum(distances)) / 3)
    assert 0 < found["recall"].value < 1
    assert len(found["recall"].left_out) == 20
    kept = torch.tensor([i // 3 % 20 != 4 for i in range(90)])
    assert measured(images.take(kept), real) == [float(f.left_out[4]) for f in found.values()]
    assert images.labels[~kept].bincount().tolist() == [2, 2, 2]


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = NoiseSource(seed=0, index=torch.arange(1)).normal("x", (40,), torch.float64)[0]
    left_out = (values.sum() - values) / 39
    assert jackknife_error(left_out) == pytest.approx(float(values.std()) / math.sqrt(40))


# ---- copies


def test_copies_are_counted():
    others = torch.eye(4, dtype=torch.float64)
    points = torch.cat((others, 0.9 * others + 0.025, torch.full((1, 4), 0.25, dtype=torch.float64)))
    assert copies(points, others) == 8  # the last one is as near to all of them


def test_the_ideal_denoiser_of_points_copies_them():
    noise = NoiseSource(seed=0, index=torch.arange(30))
    train = noise.normal("train", (6,), torch.float64)
    sampler = HeunT(grid=Uniform(), steps=10)
    denoiser = Mixture([1 / 30] * 30, train.tolist(), [0.0] * 30).denoiser(FLOW)
    drawn = sampler.integrate(
        denoiser, noise.normal("start", (6,), torch.float64), sampler.points(FLOW, 10), Condition(), noise
    )
    assert copies(drawn, train) == 30
    assert copies(noise.normal("fresh", (6,), torch.float64), train) < 5


def test_images_held_out_are_new_and_as_many():
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
    labels = torch.arange(40) % 4
    everything, test = (images[:30], labels[:30]), (images[30:], labels[30:])
    found = _never_trained_on(images[:8], everything, test)
    assert found.flatten().tolist() == list(range(8, 16))
    assert len(_never_trained_on(images[:30], everything, test)) == 10  # there are no more


# ---- pages


def test_a_page_says_what_was_found(tmp_path):
    findings = Findings(
        title="A study",
        about="How.",
        claims=[Claim("water is wet", "made-up data", [estimated("wetness", 1.0, 0.1)])],
        rows=[{"a": 1, "b": 2.5}, {"a": 2, "b": 3.5}],
        tables={"Numbers": [["a", "b"], ["1", "2.5"]]},
        pictures=[],
        facts={"run": "mine"},
    )
    write_page(findings, tmp_path, "python scripts/study.py", {"seed": 0})
    page = (tmp_path / "README.md").read_text()
    assert (
        "| water is wet | made-up data | **confirmed** | 1 of 1 above zero, 0 below | wetness: +1 [+0.804, +1.2] |"
        in page
    )
    assert '- run: `"mine"`' in page
    with (tmp_path / "table.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "2.5"}, {"a": "2", "b": "3.5"}]
    assert '"seed": 0' in (tmp_path / "protocol.json").read_text()
