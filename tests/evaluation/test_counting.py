"""Evaluations counted per sample, for solvers that choose their steps."""

from __future__ import annotations

import pytest
import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Posterior
from denoiselab.diffusion.guidance import ClassifierFree
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Cosine
from denoiselab.diffusion.samplers import DormandPrince
from denoiselab.evaluation.counting import Counting

SHAPE = (1, 2, 2)
SOLVER = DormandPrince(rtol=1e-3, atol=1e-3)


class Wells:
    """The denoiser of two narrow peaks: samples need unlike numbers of steps."""

    consistent = True

    def __init__(self):
        self.path, self.calls = Cosine(), 0

    def __call__(self, x, t, condition):
        self.calls += 1
        alpha, sigma = (c(t).to(x.dtype).reshape(-1, 1, 1, 1) for c in (self.path.alpha, self.path.sigma))
        variance = 0.01 * alpha**2 + sigma**2
        mean = torch.tanh(alpha * x.sum((1, 2, 3), keepdim=True) / variance)
        x0 = mean + 0.01 * alpha / variance * (x - alpha * mean)
        return Posterior(x0, (x - alpha * x0) / sigma)

    def evaluations(self, t):
        return 1

    def fresh(self):
        return self


def count(index, denoiser):
    counting = Counting(denoiser)
    n = len(index)
    condition = Condition(label=torch.zeros(n, dtype=torch.int64))
    SOLVER.sample(counting, SHAPE, condition, NoiseSource(seed=0, index=torch.tensor(index)))
    assert counting.samples == n
    return counting.mean()


def test_a_sample_alone_pays_every_question_but_the_repeated_last_one():
    wells = Wells()
    assert count([3], wells) == wells.calls - 1


def test_the_mean_does_not_depend_on_who_waits_for_whom():
    alone = [count([i], Wells()) for i in range(8)]
    assert len(set(alone)) > 1
    assert count(range(8), Wells()) == pytest.approx(sum(alone) / 8)


def test_guidance_counts_where_it_guides():
    plain = count(range(4), Wells())
    assert count(range(4), ClassifierFree(Wells(), scale=1.0)) == plain
    assert count(range(4), ClassifierFree(Wells(), scale=2.0)) == 2 * plain
    assert plain < count(range(4), ClassifierFree(Wells(), scale=2.0, sigma_max=1.0)) < 2 * plain


def test_several_batches_are_one_mean():
    counting = Counting(Wells())
    for start in (0, 4):
        index = torch.arange(start, start + 4)
        SOLVER.sample(counting, SHAPE, Condition(), NoiseSource(seed=0, index=index))
    assert counting.mean() == pytest.approx(count(range(8), Wells()))


def test_without_a_sample_there_is_no_mean():
    assert Counting(Wells()).mean() is None
