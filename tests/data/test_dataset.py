from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from denoiselab.data.dataset import TRIES, InMemoryImages, LazyImages, flips
from denoiselab.data.decoding import BrokenImageError
from denoiselab.data.order import Draw

IMAGES = torch.arange(6 * 1 * 2 * 3, dtype=torch.uint8).reshape(6, 1, 2, 3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_an_index_gives_the_image_as_it_is():
    samples = InMemoryImages(IMAGES, LABELS, flip=True, seed=1)
    assert len(samples) == 6
    for index in range(6):
        sample = samples[index]
        assert torch.equal(sample["image"], IMAGES[index])
        assert (sample["label"], sample["index"], sample["step"], sample["place"]) == (
            index % 3,
            index,
            0,
            index,
        )


def test_a_draw_carries_its_step_and_place_and_collates_to_int64():
    samples = InMemoryImages(IMAGES, LABELS)
    batch = default_collate([samples[Draw(4, 7, 0, 0)], samples[Draw(2, 7, 1, 3)]])
    assert torch.equal(batch["image"], IMAGES[[4, 2]])
    assert batch["image"].dtype == torch.uint8
    wanted = {"label": [1, 2], "index": [4, 2], "step": [7, 7], "place": [0, 1], "stand_in": [0, 0]}
    for key, values in wanted.items():
        assert batch[key].dtype == torch.int64
        assert batch[key].tolist() == values


def test_without_labels_every_label_is_null():
    assert [InMemoryImages(IMAGES, None)[i]["label"] for i in range(6)] == [-1] * 6


def test_flips_are_keyed_to_seed_epoch_and_index_alone():
    samples = InMemoryImages(IMAGES, LABELS, flip=True, seed=5)
    for epoch in range(4):
        for index in range(6):
            seen = samples[Draw(index, 9, 0, epoch)]["image"]
            mirrored = flips(5, epoch, index)
            assert torch.equal(seen, IMAGES[index].flip(-1) if mirrored else IMAGES[index])
            assert torch.equal(seen, samples[Draw(index, 2, 5, epoch)]["image"])  # not to step and place


def test_flips_are_fair_and_differ_between_keys():
    coins = torch.tensor([[flips(s, e, i) for i in range(2000)] for s, e in [(0, 0), (0, 1), (1, 0)]]).float()
    assert torch.allclose(coins.mean(1), torch.tensor(0.5), atol=0.05)
    assert torch.allclose(torch.corrcoef(coins), torch.eye(3), atol=0.1)


def test_nothing_is_flipped_unless_asked_for():
    samples = InMemoryImages(IMAGES, LABELS, seed=5)
    assert all(torch.equal(samples[Draw(i, 0, 0, e)]["image"], IMAGES[i]) for i in range(6) for e in range(8))


def test_the_global_generators_are_left_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    samples = InMemoryImages(IMAGES, LABELS, flip=True)
    _ = [samples[Draw(i, 0, i, 0)] for i in range(6)]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_the_digest_is_that_of_the_pixels():
    samples = InMemoryImages(IMAGES, LABELS)
    again = InMemoryImages(IMAGES.clone(), None, flip=True, seed=4)
    assert samples.digest(2) == again.digest(2) != samples.digest(3)


class Fragile(LazyImages):
    """Grey values that are the index; those in `broken` cannot be read."""

    def __init__(self, size, broken, **changes):
        super().__init__(**({"on_corrupt": "skip"} | changes))
        self.size, self.broken, self.reads = size, set(broken), []

    def __len__(self):
        return self.size

    def path(self, index):
        return f"{index}.png"

    def read(self, index):
        self.reads.append(index)
        if index in self.broken:
            raise BrokenImageError(f"{index}.png is empty")
        return torch.full((1, 1, 2), index % 256, dtype=torch.uint8)

    def peers(self, index):
        return range(self.size)

    def label(self, index):
        return 0


def test_a_stand_in_depends_on_the_index_and_the_files_alone():
    broken = range(0, 200, 2)
    whole, some = Fragile(200, broken), Fragile(200, broken, flip=True, seed=8)
    choices = {i: int(whole.image(i)[0, 0, 0]) for i in range(200)}
    assert all(choices[i] == i for i in range(1, 200, 2))
    assert all(choices[i] % 2 for i in range(200))
    for i in (150, 4, 4, 90):
        sample = some[Draw(i, 3, 1, 2)]
        assert (int(sample["image"][0, 0, 0]), sample["stand_in"], sample["index"]) == (choices[i], 1, i)
    some.broken.remove(4)
    assert (int(some.image(4)[0, 0, 0]), some[4]["stand_in"]) == (4, 0)


def test_no_image_takes_the_place_of_many():
    samples = Fragile(250, range(100))
    shown = torch.tensor([int(samples.image(i)[0, 0, 0]) for i in range(100)])
    assert shown.bincount().max() <= 10


def test_a_search_that_finds_nothing_ends():
    samples = Fragile(3, range(3))
    with pytest.raises(
        BrokenImageError, match=r"^1\.png is empty; 2 others were tried in its place, the last: \d\.png is empty$"
    ):
        samples.image(1)
    assert sorted(samples.reads) == [0, 1, 2]  # none is tried twice
    samples = Fragile(10_000, range(10_000))
    with pytest.raises(BrokenImageError, match=r"^1\.png is empty; \d+ others were tried"):
        samples.image(1)
    assert TRIES < len(samples.reads) <= 2 * TRIES + 1


class OfTwoClasses(Fragile):
    """The last image is alone in its class."""

    def peers(self, index):
        return [i for i in range(self.size) if self.label(i) == self.label(index)]

    def label(self, index):
        return int(index == self.size - 1)


def test_where_a_class_has_no_other_image_any_stands_in_under_its_own_label(caplog):
    samples = OfTwoClasses(6, [2, 5])
    sample = samples[Draw(5, 7, 0, 1)]
    shown = int(sample["image"][0, 0, 0])
    assert shown not in (2, 5)
    assert (sample["label"], sample["stand_in"], sample["index"]) == (0, 1, 5)
    assert torch.equal(samples.image(5), sample["image"])
    assert [record.getMessage() for record in caplog.records] == [
        "on_corrupt=skip: 5.png is empty; none of its class was found that can be decoded; "
        f"{shown}.png stands in, with its label"
    ]


def test_stand_ins_are_named_once(caplog):
    samples = Fragile(9, [3, 5])
    samples.image(3)
    samples.tell([5, 3, 5])
    samples.image(5)
    samples.tell(iter([]))
    samples.tell([7])
    assert [record.getMessage() for record in caplog.records] == [
        "on_corrupt=skip: 3.png is empty; an image of the same class stands in",
        "on_corrupt=skip: 5.png is empty; an image of the same class stands in",
        "on_corrupt=skip: 7.png could not be read when it was drawn, but now it can",
    ]


def test_without_skip_there_are_no_stand_ins():
    samples = Fragile(9, [3], on_corrupt="fail")
    assert samples[4]["stand_in"] == 0
    with pytest.raises(BrokenImageError, match=r"^3\.png is empty; repair or remove it, or set on_corrupt=skip$"):
        samples[3]
    assert samples.reads == [4, 3]
    with pytest.raises(ValueError, match=r"^on_corrupt=no: must be fail or skip$"):
        Fragile(9, [], on_corrupt="no")
