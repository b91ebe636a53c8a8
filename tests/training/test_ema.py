from __future__ import annotations

import pytest
import torch
from tiny import TinyNetwork, equal, fit, tiny_module, weights_of
from torch import nn

from denoiselab.training.ema import EMA, half_life_ema


def moved(network, by):
    """The network with every weight moved."""
    with torch.no_grad():
        for p in network.parameters():
            p += by


def small_network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("warmup", [False, True])
def test_after_n_updates_an_average_is_the_weighted_sum_of_the_weights(warmup):
    network, ema = small_network(), EMA(decays={"ema": 0.6}, warmup=warmup)
    ema.start(network)
    history = [network.weight.detach().clone()]
    for n in range(20):
        moved(network, 0.1 * (n + 1))
        ema.update(network)
        history.append(network.weight.detach().clone())
    # ema_n = w_0·Π d_j + Σ_i w_i·(1 − d_i)·Π_{j > i} d_j
    decays = [min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(20)]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i, weights in enumerate(history):
        share = 1.0 if i == 0 else 1 - decays[i - 1]
        for decay in decays[i:]:
            share *= decay
        expected += share * weights.double()
    torch.testing.assert_close(ema.averages["ema"]["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.updates == 20


def test_warmup_starts_with_a_tenth_of_the_old_average():
    network, ema = small_network(), EMA(decays={"ema": 0.999})
    ema.start(network)
    before = network.bias.detach().clone()
    moved(network, 1.0)
    ema.update(network)
    torch.testing.assert_close(ema.averages["ema"]["bias"], before + 0.9)


@pytest.mark.parametrize("batch_size", [64, 512])
def test_the_half_life_ramps_up_as_in_edm(batch_size):
    ema = half_life_ema(half_lives={"ema": 500.0, "short": 20.0}, batch_size=batch_size, ramp_up=0.05)
    for n in (0, 1, 2, 100, 2000, 20_000, 200_000):
        ema.updates = n
        for name, kimg in (("ema", 500), ("short", 20)):
            images = max(min(1000 * kimg, 0.05 * n * batch_size), 1e-8)  # EDM's training_loop.py, "Update EMA"
            assert ema.bounded(ema.decays[name]) == pytest.approx(0.5 ** (batch_size / images), rel=1e-12)
    network = small_network()
    ema.start(network)
    moved(network, 1.0)
    ema.update(network)
    assert torch.equal(ema.averages["ema"]["weight"], network.weight)  # nothing is left of the initial weights


def test_after_a_half_life_of_images_half_of_the_old_average_is_left():
    network = small_network()
    ema = half_life_ema(half_lives={"ema": 1.0}, batch_size=100, ramp_up=None)
    ema.start(network)
    before = network.weight.detach().clone()
    moved(network, 2.0)
    for _ in range(10):
        ema.update(network)
    torch.testing.assert_close(ema.averages["ema"]["weight"], before + 1.0)


def test_several_averages_run_side_by_side():
    network, both = small_network(), EMA(decays={"fast": 0.5, "slow": 0.9}, warmup=False)
    alone = EMA(decays={"slow": 0.9}, warmup=False)
    both.start(network)
    alone.start(network)
    for _ in range(5):
        moved(network, 0.3)
        both.update(network)
        alone.update(network)
    assert both.default == "fast"
    assert both.names == ["fast", "slow", "raw"]
    assert equal(both.averages["slow"], alone.averages["slow"])
    assert not torch.equal(both.averages["fast"]["weight"], both.averages["slow"]["weight"])
    for name in ("fast", "slow"):
        with both.applied(network, name):
            assert torch.equal(network.weight, both.averages[name]["weight"])


def test_no_average_means_the_raw_weights():
    network, ema = small_network(), EMA(decays={})
    ema.start(network)
    ema.update(network)
    before = network.weight.detach().clone()
    assert ema.default == "raw"
    with ema.applied(network, ema.default):
        assert torch.equal(network.weight, before)


def test_the_weights_come_back_after_an_exception():
    network, ema = small_network(), EMA(decays={"ema": 0.5})
    ema.start(network)
    moved(network, 1.0)
    raw, storage = network.weight.detach().clone(), network.weight.data_ptr()

    def fail_midway():
        with ema.applied(network, "ema"):
            assert torch.equal(network.weight, ema.averages["ema"]["weight"])
            assert not torch.equal(network.weight, raw)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert torch.equal(network.weight, raw)
    assert network.weight.data_ptr() == storage  # the optimizer's state belongs to this very tensor
    ema.update(network)  # not refused: nothing is applied any more


def test_writing_into_an_applied_average_does_not_change_the_average_of_bf16_weights():
    network, ema = small_network().to(torch.bfloat16), EMA(decays={"ema": 0.5})
    ema.start(network)
    before = ema.averages["ema"]["weight"].clone()
    with ema.applied(network, "ema"):
        assert network.weight.dtype == torch.bfloat16
        moved(network, 1.0)
    assert torch.equal(ema.averages["ema"]["weight"], before)


def test_nested_use_is_refused():
    network, ema = small_network(), EMA(decays={"fast": 0.5, "slow": 0.9})
    ema.start(network)
    moved(network, 1.0)
    raw = network.weight.detach().clone()
    with ema.applied(network, "fast"):
        with pytest.raises(AssertionError, match="already"), ema.applied(network, "slow"):
            pass
        assert torch.equal(network.weight, ema.averages["fast"]["weight"])
        with pytest.raises(AssertionError, match="holds an average"):
            ema.update(network)
    assert torch.equal(network.weight, raw)


def test_raw_weights_inside_an_average_are_refused_too():
    network, ema = small_network(), EMA(decays={"ema": 0.5})
    ema.start(network)
    with ema.applied(network, "ema"), pytest.raises(AssertionError), ema.applied(network, "raw"):
        pass


def test_unknown_weights_are_named():
    ema = EMA(decays={"ema": 0.5})
    ema.start(small_network())
    with pytest.raises(ValueError, match="weights=slow: must be one of ema, raw"), ema.applied(small_network(), "slow"):
        pass


def test_bf16_weights_move_the_float32_average():
    network, ema = nn.Linear(1, 1, bias=False), EMA(decays={"ema": 0.999}, warmup=False)
    nn.init.constant_(network.weight, 1.0)
    network.to(torch.bfloat16)
    ema.start(network)
    with torch.no_grad():
        network.weight.fill_(1 + 2**-7)  # the next bf16 number; one update moves the average by 1/1000 of that
    for n in range(1, 401):
        ema.update(network)
        if n == 1:
            assert ema.averages["ema"]["weight"].to(torch.bfloat16) == 1  # invisible in bf16
    average = ema.averages["ema"]["weight"]
    assert average.dtype == torch.float32
    assert float(average) == pytest.approx(1 + 2**-7 * (1 - 0.999**400), abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_one_update_per_optimizer_step(tmp_path, accumulate):
    module = tiny_module(ema=EMA(decays={"ema": 0.9}, warmup=False))
    before = weights_of(module)
    trainer = fit(module, tmp_path, steps=1, accumulate=accumulate)
    assert trainer.global_step == module.ema.updates == 1
    after = weights_of(module)
    for key, average in module.ema.averages["ema"].items():
        torch.testing.assert_close(average, 0.9 * before[key] + 0.1 * after[key])
    module = tiny_module()
    fit(module, tmp_path, steps=3, accumulate=accumulate)
    assert module.ema.updates == 3


def test_a_state_dict_goes_round():
    network, ema = TinyNetwork(), EMA(decays={"ema": 0.5, "slow": 0.9})
    ema.start(network)
    moved(network, 0.5)
    ema.update(network)
    again = EMA(decays={"slow": 0.9})
    again.load_state_dict(ema.state_dict())
    assert again.updates == 1
    assert list(again.averages) == ["slow"]
    assert equal(again.averages["slow"], ema.averages["slow"])
    with pytest.raises(ValueError, match="ema: the checkpoint has no other"):
        EMA(decays={"other": 0.9}).load_state_dict(ema.state_dict())


@pytest.mark.parametrize(
    ("decays", "message"),
    [
        ({"ema": 1.0}, r"decays.ema=1.0: must be in \[0, 1\)"),
        ({"ema": 0.9, "slow": -0.1}, r"decays.slow=-0.1: must be in \[0, 1\)"),
        ({"raw": 0.9}, "decays.raw=0.9: the name raw is taken"),
    ],
)
def test_bad_decays(decays, message):
    with pytest.raises(ValueError, match=message):
        EMA(decays=decays)


def test_bad_half_lives_and_ramp_ups():
    with pytest.raises(ValueError, match=r"^half_lives.ema=0: must be positive$"):
        half_life_ema(half_lives={"ema": 0}, batch_size=512)
    with pytest.raises(ValueError, match=r"^ramp_up=0.0: must be positive, or null$"):
        EMA(decays={"ema": 0.5}, ramp_up=0.0)


def test_averages_are_few():
    EMA(decays={f"a{i}": 0.9 for i in range(64)})
    with pytest.raises(ValueError, match="decays: must be at most 64 averages, not 65"):
        EMA(decays={f"a{i}": 0.9 for i in range(65)})
