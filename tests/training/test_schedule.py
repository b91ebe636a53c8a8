from __future__ import annotations

import math

import pytest
import torch

from denoiselab.training.schedule import Schedule


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_warm_up_is_linear_and_its_first_step_counts(decay):
    schedule = Schedule(decay=decay, steps=100, warmup_steps=10)
    assert [schedule.factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert schedule.factor(0) > 0
    assert schedule.factor(10) == 1


def test_no_warm_up_starts_at_the_full_rate():
    assert Schedule(decay="cosine", steps=100).factor(0) == 1


def test_constant_stays():
    schedule = Schedule(decay="constant", steps=100, warmup_steps=2, final=0.1)
    assert {schedule.factor(step) for step in (2, 50, 99, 100, 1000)} == {1.0}


@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
def test_cosine_closed_form(final):
    schedule = Schedule(decay="cosine", steps=110, warmup_steps=10, final=final)
    for step in range(10, 111):
        expected = final + (1 - final) * math.cos(math.pi * (step - 10) / 200) ** 2
        assert schedule.factor(step) == pytest.approx(expected, abs=1e-12)
    assert schedule.factor(60) == pytest.approx((1 + final) / 2)
    assert schedule.factor(110) == pytest.approx(final, abs=1e-12)
    assert schedule.factor(500) == pytest.approx(final, abs=1e-12)  # and never rises again


def test_a_warm_up_as_long_as_the_run():
    schedule = Schedule(decay="cosine", steps=10, warmup_steps=10, final=0.0)
    assert schedule.factor(9) == 1
    assert schedule.factor(10) == 1


def test_the_factor_multiplies_the_optimizers_own_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = Schedule(decay="cosine", steps=4, warmup_steps=2)(optimizer)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": 5, "warmup_steps": -1}, "warmup_steps=-1: must be at least 0"),
        ({"steps": 5, "final": 1.5}, r"final=1.5: must be in \[0, 1\]"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(decay="cosine", **arguments)
