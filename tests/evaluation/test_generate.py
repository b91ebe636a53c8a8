from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from denoiselab.codecs.rgb import RGB
from denoiselab.diffusion.denoiser import NetworkDenoiser, Posterior
from denoiselab.diffusion.grids import Uniform
from denoiselab.diffusion.paths import Cosine
from denoiselab.diffusion.prediction import V
from denoiselab.diffusion.samplers import DDPM, Heun
from denoiselab.evaluation.generate import balanced_labels, generate

SHAPE = (1, 8, 8)
CLASSES = 3


class Network(nn.Module):
    """Untrained, but each pixel depends on its neighbours, the time and the class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1))
        self.label = nn.Embedding(CLASSES + 1, 1)

    def forward(self, x, t, condition):
        shift = t / 1000
        if condition.label is not None:
            shift = shift + self.label(condition.label + 1)[:, 0]
        return self.layers(x + shift[:, None, None, None])


def denoiser():
    return NetworkDenoiser(network=Network(), path=Cosine(t_min=0.001, t_max=0.999), prediction=V())


def sampler(kind=DDPM):
    return kind(grid=Uniform(), steps=4)  # DDPM draws fresh noise in every step


def sampled(indices, *, batch_size=64, labels=None, seed=0, kind=DDPM):
    return generate(
        denoiser(),
        sampler(kind),
        indices=indices,
        labels=labels,
        shape=SHAPE,
        codec=RGB(),
        seed=seed,
        batch_size=batch_size,
        device="cpu",
    )


def same_pictures(left, right):
    """Whether two sets differ by one grey level at most, on at most 0.1 % of the pixels (design invariant 2)."""
    difference = (left.int() - right.int()).abs()
    return int(difference.max()) <= 1 and float((difference > 0).double().mean()) <= 0.001


class NoiseItself:
    """A denoiser whose x0 is 1/4 of the first noise: the picture shows the noise, bit by bit."""

    path = Cosine(t_min=0.001, t_max=0.999)
    consistent = True

    def __call__(self, x, t, condition):
        return Posterior(x / 4, torch.zeros_like(x))

    def evaluations(self, t):
        return 1

    def fresh(self):
        return self


class Exactly:
    """A codec that keeps what it gets."""

    def decode(self, x):
        return x


def noise(indices, batch_size):
    arguments = {"labels": None, "shape": SHAPE, "codec": Exactly(), "seed": 5, "device": "cpu"}
    return generate(NoiseItself(), sampler(), indices=indices, batch_size=batch_size, **arguments)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(batch_size):
    whole = noise(range(7), 64)
    assert torch.equal(noise(range(7), batch_size), whole)
    assert torch.equal(noise([6, 2, 3], batch_size), whole[[6, 2, 3]])
    assert len({tuple(sample.flatten().tolist()) for sample in whole}) == 7


@pytest.mark.parametrize("kind", [DDPM, Heun])
def test_a_sample_does_not_depend_on_batch_size_or_company(kind):
    labels = balanced_labels(40, CLASSES)
    whole = sampled(range(40), labels=labels, kind=kind)
    assert whole.shape == (40, *SHAPE)
    assert whole.dtype == torch.uint8
    for batch_size in (1, 7, 39):
        assert same_pictures(sampled(range(40), labels=labels, batch_size=batch_size, kind=kind), whole)
    some = [38, 3, 20, 4]
    assert same_pictures(sampled(some, labels=labels, batch_size=3, kind=kind), whole[some])
    assert not same_pictures(whole[:1].expand(5, -1, -1, -1), whole[1:6])


def test_the_first_samples_of_a_larger_set_are_the_smaller_set():
    large = sampled(range(30), labels=balanced_labels(30, CLASSES))
    assert same_pictures(sampled(range(10), labels=balanced_labels(10, CLASSES)), large[:10])


def test_another_seed_draws_other_samples():
    assert not same_pictures(sampled(range(4), seed=0), sampled(range(4), seed=1))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise(range(3), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_belong_to_sample_numbers_not_to_places_in_a_batch():
    asked = []

    class Listening(NoiseItself):
        def __call__(self, x, t, condition):
            asked.append(condition.label.tolist())
            return super().__call__(x, t, condition)

    labels = torch.tensor([2, 0, 1, 2, 2, 1])
    arguments = {"labels": labels, "shape": SHAPE, "codec": RGB(), "seed": 0, "device": "cpu"}
    generate(Listening(), DDPM(grid=Uniform(), steps=1), indices=[5, 0, 2], batch_size=2, **arguments)
    assert asked == [[1, 2], [1]]


def test_balanced_labels():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(5, 10, [3, 5]).tolist() == [3, 5, 3, 5, 3]
    assert balanced_labels(2, 3, range(3)).tolist() == [0, 1]
    assert balanced_labels(3, 3).dtype == torch.int64
    assert balanced_labels(4, 0) is None
    counts = torch.bincount(balanced_labels(2000, 10))
    assert counts.tolist() == [200] * 10


@pytest.mark.parametrize(
    ("num_classes", "classes", "message"),
    [
        (10, [3, 10], "classes=[3, 10]: must be among 0 to 9"),
        (10, [-1], "classes=[-1]: must be among 0 to 9"),
        (10, [], "classes=[]: must be among 0 to 9"),
        (0, [0], "classes=[0]: the data has no classes"),
    ],
)
def test_classes_that_the_data_does_not_have(num_classes, classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        balanced_labels(4, num_classes, classes)
