from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny import TinyData, equal, fit, tiny_module, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from denoiselab.runs.launch import launch
from denoiselab.training.dropout import KeyedDropout, key_dropout
from denoiselab.training.trainer import TrainerSettings


def keyed(p=0.25, kind=nn.Dropout, seed=0):
    """A network of two dropout layers, and its places."""
    network = nn.Sequential(kind(p), nn.Identity(), kind(p))
    return network, key_dropout(network, seed)


def masks(layer, places, place, step=0, shape=(5, 4, 4)):
    places.set(torch.tensor(place), step)
    return layer(torch.ones(len(place), *shape))


class SeenMasks(Callback):
    """What the tiny network's dropout layer let through, by (step, place)."""

    def __init__(self):
        self.kept = {}

    def on_train_start(self, trainer, module):
        def remember(layer, inputs, output):
            for place, kept in zip(module.places.place.tolist(), output != 0, strict=True):
                self.kept[int(module.places.step), place] = kept

        module.network.dropout.register_forward_hook(remember)


def train_two_ranks(folder):
    """One of two ranks."""
    module, seen = tiny_module(dropout=0.3), SeenMasks()
    settings = TrainerSettings(accelerator="cpu", devices=2, max_steps=3, val_every=1000)
    settings.build(Path(folder), [], [seen]).fit(module, datamodule=TinyData())
    torch.save(list(seen.kept.items()), Path(folder) / f"rank_{module.global_rank}.pt")


def train_one_rank(run_dir, accumulate=1):
    seen = SeenMasks()
    fit(tiny_module(dropout=0.3), run_dir, steps=3, callbacks=[seen], accumulate=accumulate)
    assert seen.kept.keys() == {(step, place) for step in range(3) for place in range(8)}
    return seen.kept


def test_masks_do_not_depend_on_accumulation(tmp_path):
    assert equal(train_one_rank(tmp_path, accumulate=2), train_one_rank(tmp_path))


@pytest.mark.slow
def test_masks_do_not_depend_on_ranks(tmp_path):
    launch(train_two_ranks, (str(tmp_path),), 2)
    ranks = [dict(torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)) for rank in (0, 1)]
    assert not ranks[0].keys() & ranks[1].keys()
    assert equal(ranks[0] | ranks[1], train_one_rank(tmp_path))


def test_other_layers_steps_places_and_seeds_have_other_masks():
    network, places = keyed()
    first = masks(network[0], places, [3, 4])
    assert torch.equal(masks(network[0], places, [4, 3]), first.flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(masks(network[0], places, [3, 4], step=1), first)
    assert not torch.equal(masks(network[0], places, [3, 4], step=2**32), first)
    assert not torch.equal(masks(network[2], places, [3, 4]), first)
    other, others = keyed(seed=1)
    assert not torch.equal(masks(other[0], others, [3, 4]), first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p):
    network, places = keyed(p)
    kept = masks(network[0], places, list(range(64)), shape=(64, 8, 8)) != 0
    for part in (kept, kept[:, 0], kept[..., 0, 0], kept[..., ::2], kept[5]):  # no row, column or place is special
        deviation = math.sqrt(p * (1 - p) / part.numel())
        assert abs(float(part.double().mean()) - (1 - p)) < 4 * deviation
    both = (kept[:, 1:] & kept[:, :-1]).double().mean()
    assert abs(float(both) - (1 - p) ** 2) < 4 * math.sqrt(1 / kept.numel())  # neighbours are independent


def test_the_scale_is_of_the_rounded_probability():
    network, places = keyed(0.1)
    assert network[0].dropped == 6554  # of 65536
    found = masks(network[0], places, list(range(8))).unique().tolist()
    assert found == [0, pytest.approx(65536 / (65536 - 6554), rel=1e-7)]
    assert str(network[0]) == "KeyedDropout(p=0.100006)"


def test_whole_channels():
    for kind, shape in ((nn.Dropout1d, (6, 8)), (nn.Dropout2d, (6, 8, 8)), (nn.Dropout3d, (6, 2, 8, 8))):
        network, places = keyed(0.5, kind)
        kept = masks(network[0], places, list(range(20)), shape=shape) != 0
        assert torch.equal(kept, kept.flatten(2)[..., 0].reshape(20, 6, *(1,) * (len(shape) - 1)).expand_as(kept))
        assert 0.3 < kept.double().mean() < 0.7


def test_evaluation_is_the_identity():
    network, places = keyed()
    x = torch.randn(3, 4)
    assert network.eval()(x) is x  # and asks for no place
    places.set(torch.arange(3), 0)
    assert not torch.equal(network.train()(x), x)


def test_bf16_stays_bf16_and_drops_the_same():
    network, places = keyed()
    full = masks(network[0], places, [0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        half = network[0](torch.ones(3, 5, 4, 4, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half != 0, full != 0)


def test_checkpointed_activations_have_the_same_gradient():
    places = key_dropout(network := nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)), 0)
    places.set(torch.arange(4), 7)
    x, gradients = torch.randn(4, 6), []
    for through in (network, lambda x: checkpoint(network, x, use_reentrant=False, preserve_rng_state=False)):
        network.zero_grad()
        through(x).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in network.named_parameters()})
        torch.rand(3)  # whatever draws in between
    assert equal(*gradients)


def test_layers_are_replaced_by_name_and_weights_keep_theirs():
    shared = nn.Dropout(0.5)
    network = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "b": shared, "c": shared})
    network["none"] = nn.Dropout(0.0)
    network["b"].eval()
    before = list(network.state_dict())
    key_dropout(network, 0)
    assert list(network.state_dict()) == before
    assert isinstance(network["a"][1], KeyedDropout)
    assert network["a"][1].name == "a.1"
    assert network["b"] is network["c"]
    assert not network["b"].training
    assert type(network["none"]) is nn.Dropout


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.1), nn.Dropout(1.0)])
def test_what_cannot_be_keyed_is_refused(layer):
    with pytest.raises(ValueError, match=r"^0=\w+\(p=.*must be Dropout, Dropout1d, 2d or 3d with p below 1$"):
        key_dropout(nn.Sequential(layer), 0)


def test_rows_that_are_no_samples_are_refused():
    network, places = keyed()
    places.set(torch.arange(4), 0)
    with pytest.raises(AssertionError, match="0: 8 rows of 4 samples"):
        network(torch.ones(8, 2))


@pytest.mark.slow
def test_compiled_once_for_all_steps():
    network, places = keyed()
    x, expected = torch.randn(4, 6, 5), []
    for step in range(4):
        places.set(torch.arange(4) + 4 * step, step)
        expected.append(network(x))
    network.compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            places.set(torch.arange(4) + 4 * step, step)
            assert torch.equal(network(x), expected[step])


def test_training_with_dropout_is_repeatable_and_resumes(tmp_path):
    whole, saved, resumed = (tiny_module(dropout=0.5) for _ in range(3))
    fit(whole, tmp_path, steps=4)
    torch.rand(5)
    fit(saved, tmp_path, steps=2).save_checkpoint(tmp_path / "saved.ckpt")
    torch.rand(5)
    fit(resumed, tmp_path, steps=4, resume=tmp_path / "saved.ckpt")
    assert equal(weights_of(resumed), weights_of(whole))
    other = tiny_module(dropout=0.5, seed=1)
    fit(other, tmp_path, steps=4)
    assert not equal(weights_of(other), weights_of(whole))
